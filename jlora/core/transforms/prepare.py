"""`prepare`: the starts of methods that look at data before training, at gradients (SHiRA's masks) or inputs (EVA)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jlora import _compat, paths
from jlora.core.products.contraction import accumulation_dtype
from jlora.core.protocol import statistics
from jlora.core.protocol.kept import Kept
from jlora.core.protocol.method import Arrays, Site
from jlora.core.protocol.readings import Sites
from jlora.core.protocol.statistics import GRADIENTS, INPUTS, RESIDUAL
from jlora.core.protocol.stored import decoded
from jlora.core.transforms.lift import lift
from jlora.core.transforms.observe import Observer, finished, tapped
from jlora.core.tree.adapted import Adapted, Plan
from jlora.core.tree.spec import Spec, resolve
from jlora.core.tree.starts import Prepared, start_of
from jlora.core.walk.interpreter import Walk


def prepare(
    params: Any,
    spec: Spec,
    loss_fn: Callable[[Any, Any], jax.Array],
    batches: Iterable[Any],
    key: jax.Array | None = None,
    sites: Sites | None = None,
    memory: int = 2**30,
    mask: Callable[[Any], jax.Array] | None = None,
) -> Prepared:
    """Takes what each leaf's method needs of its gradients or its inputs, and makes the leaf's start of it.

    Leaves are taken in groups whose statistics fit `memory`, so that no gradient of the whole model ever exists; each group
    goes once through the batches. A leaf is never divided: of a stack, all matrices' statistics exist at a time.

    Args:
        params: as for `adapterize`.
        spec: as for `adapterize`; methods that need nothing are passed over, and so are those that need a residual alone.
        loss_fn: `loss_fn(params, batch) -> scalar`, on ordinary params. Inputs are those that it gives the weights, and where
            no method needs gradients none is computed.
        batches: calibration data. Deep LoRA takes the first batch of training alone, SHiRA and LoRA-GA a few; EVA and CorDA
            want many more tokens than their matrices have inputs. A generator is read once, and its batches are kept only
            where there are several groups.
        key: as for `adapterize`.
        sites: as for `adapterize`.
        memory: bytes that statistics may take at a time, before they are turned into starts.
        mask: `mask(batch) -> [rows, tokens]`, which tokens count in statistics of inputs, to leave out padding; by default all.
            An input of one vector a row, such as a pooler's, counts in full. Gradients are those of `loss_fn` as it is.

    Returns:
        A `Prepared` for `adapterize(params, spec, key, sites, prepared=...)`, with the same spec.

    Raises:
        ValueError: where no method of the spec needs data, there is no batch, a statistic or start is not finite, an input
            can't be observed (see `observe`), or the mask is not of its tokens.

    Example:
        >>> spec = {r".*/(q|v)_proj/kernel": jlora.SHiRA("gradient", density=0.01)}
        >>> loss_fn = lambda params, tokens: jnp.mean(model.apply({"params": params}, tokens) ** 2)
        >>> batches = [tokens, tokens + 1]
        >>> prepared = jlora.prepare(params, spec, loss_fn, batches, key=key)
        >>> adapted = jlora.adapterize(params, spec, key=key, prepared=prepared)
    """
    key = jax.random.key(0) if key is None else _compat.typed_key(key)
    leaves, treedef = paths.flatten_with_keys(params)
    needing = [site for site in resolve(leaves, spec, sites) if site.method.needs - {RESIDUAL}]
    if not needing:
        raise ValueError(
            "no method of the spec starts from data; call adapterize without prepared, or with that of jlora.residuals where "
            "one starts from a residual"
        )
    by_keys, groups = dict(leaves), _groups(needing, memory)
    data = batches if len(groups) == 1 else list(batches)
    loss = _Loss(loss_fn, treedef, by_keys, mask)
    starts = {}
    for group in groups:
        for site, taken in zip(group, _means(loss, group, data), strict=True):
            starts[site] = start_of(site, by_keys[site.keys], key, **taken)
            _check_finite(f"{site.path}: the start of {site.method}", starts[site].params)
    return Prepared(starts)


def _groups(sites: list[Site], memory: int) -> list[list[Site]]:
    """The sites in order, cut where their statistics would pass `memory`."""
    groups: list[list[Site]] = []
    room = 0
    for site in sites:
        size = statistics.size(site)
        if not groups or size > room:
            groups.append([])
            room = memory
        groups[-1].append(site)
        room -= size
    return groups


@dataclass(frozen=True)
class _Loss:
    """The loss as a function of arrays by the keys of their leaves.

    Attributes:
        fn: of params and a batch.
        treedef: the structure of the params.
        leaves: all leaves; what is no array stays what it is.
        mask: see `prepare`.
    """

    fn: Callable[[Any, Any], jax.Array]
    treedef: Any
    leaves: dict[tuple[str, ...], Any]
    mask: Callable[[Any], jax.Array] | None

    @property
    def arrays(self) -> dict[tuple[str, ...], Any]:
        """The leaves that are arrays, to be arguments of a program and no constants in it."""
        return {keys: leaf for keys, leaf in self.leaves.items() if _compat.is_array(leaf)}

    def params(self, arrays: dict[tuple[str, ...], Any]) -> Any:
        """The params with these arrays."""
        return jax.tree.unflatten(self.treedef, list((self.leaves | arrays).values()))


def _means(loss: _Loss, group: list[Site], data: Iterable[Any]) -> list[Arrays]:
    """For each site what its method needs, a mean over the batches, in float32 at least.

    Raises:
        ValueError: where there is no batch, or a mean is not finite.
    """
    measure = jax.jit(lambda arrays, batch: _measured(loss, group, arrays, batch))
    add = jax.jit(lambda *both: jax.tree.map(jnp.add, *both), donate_argnums=0)
    total = None
    for batch in data:
        found = measure(loss.arrays, batch)
        total = found if total is None else add(total, found)
    if total is None:
        raise ValueError("prepare got no batch")
    means = jax.jit(lambda total: [{name: _ratio(*pair) for name, pair in each.items()} for each in total])(total)
    for site, taken in zip(group, means, strict=True):
        for name, array in taken.items():
            of = "the gradient of loss_fn" if name in GRADIENTS else f"the {name} of its inputs"
            _check_finite(f"{site.path}: {of}", array)
    return means


def _ratio(total: jax.Array, count: jax.Array) -> jax.Array:
    return total / count.reshape(*count.shape, *[1] * (total.ndim - count.ndim))


def _check_finite(what: str, arrays: Any) -> None:
    for array in jax.tree.leaves(arrays):
        if not isinstance(array, Tracer) and not bool(jnp.all(jnp.isfinite(array))):
            raise ValueError(f"{what} is not finite")


def _measured(loss: _Loss, group: list[Site], arrays: dict[Any, Any], batch: Any) -> list[dict[str, Any]]:
    """For each site pairs of sum and count, by the name of what its method needs, of one batch."""
    found: list[dict[str, Any]] = [{} for _ in group]
    some = {site.keys: arrays[site.keys] for site in group if site.method.needs & GRADIENTS.keys()}
    if some:
        some = {keys: decoded(leaf) for keys, leaf in some.items()}
        fn = lift(loss.fn, unread="allow")  # other leaves may be kept in the form of a code
        gradients = jax.grad(lambda some: fn(loss.params({**arrays, **some}), batch))(some)
        for site, own in zip(group, found, strict=True):
            for name in sorted(site.method.needs & GRADIENTS.keys()):
                gradient = gradients[site.keys]
                own[name] = GRADIENTS[name](gradient.astype(accumulation_dtype(gradient.dtype))), jnp.ones(())
    watching = [site for site in group if site.method.needs & INPUTS.keys()]
    seen = _seen(loss, watching, arrays, batch) if watching else {}
    for site, own in zip(group, found, strict=True):
        own |= {name: seen[site.path][name] for name in sorted(site.method.needs & INPUTS.keys())}
    return found


def _seen(loss: _Loss, group: list[Site], arrays: dict[Any, Any], batch: Any) -> dict[str, dict[str, Any]]:
    """By path the sums and counts of all that the group needs of inputs; JAX leaves out what is then not used."""
    names = sorted(frozenset().union(*(site.method.needs for site in group)) & INPUTS.keys())
    given = () if loss.mask is None else (loss.mask(batch),)

    def measure(x: jax.Array, *mask: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        x = x.astype(accumulation_dtype(x.dtype))
        return {name: INPUTS[name].measure(x, _counts(x, *mask)) for name in names}

    watching = tuple(replace(site, method=Kept()) for site in group)
    watched = Adapted(loss.params(arrays), {}, {}, {}, Plan(watching))
    _, taps = tapped(loss.fn, (watched, batch), {}, Observer(measure, given=given), watching, Walk())
    return {site.path: finished([tap for tap in taps if tap.name == site.path], site) for site in watching}


def _counts(x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Which of an input's tokens count, `[*leading]`, as ones and zeros.

    Raises:
        ValueError: for a mask of other tokens.
    """
    leading = x.shape[:-1]
    if mask is None or leading == mask.shape[:1]:
        return jnp.ones(leading, x.dtype)
    if leading not in (mask.shape, (mask.size,)):
        raise ValueError(f"its input has the leading axes {leading}, and the mask of prepare {mask.shape}")
    return mask.reshape(leading).astype(x.dtype)
