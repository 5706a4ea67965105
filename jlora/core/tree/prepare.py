"""`prepare`: the starts of methods that look at gradients before training (Deep LoRA's compression, SHiRA's masks)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jlora import _compat, paths
from jlora.core.products.contraction import accumulation_dtype
from jlora.core.protocol.method import Site
from jlora.core.protocol.readings import Sites
from jlora.core.tree.spec import Spec, resolve
from jlora.core.tree.starts import Prepared, start_of

#: What `Method.needs` may name, as a function of one batch's gradient; means over the batches are taken.
STATISTICS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gradient": lambda gradient: gradient,
    "absolute_gradient": jnp.abs,
}


def prepare(
    params: Any,
    spec: Spec,
    loss_fn: Callable[[Any, Any], jax.Array],
    batches: Iterable[Any],
    key: jax.Array | None = None,
    sites: Sites | None = None,
    memory: int = 2**30,
) -> Prepared:
    """Takes the mean gradient, or mean absolute gradient, of each leaf whose method needs it, and makes its start of it.

    Leaves are taken in groups whose gradients fit `memory`, so that no gradient of the whole model ever exists; each group
    goes once through the batches.

    Args:
        params: as for `adapterize`.
        spec: as for `adapterize`.
        loss_fn: `loss_fn(params, batch) -> scalar`, on ordinary params.
        batches: calibration data; Deep LoRA takes the first batch of training alone, SHiRA a few.
        key: as for `adapterize`.
        sites: as for `adapterize`.
        memory: bytes that gradients may take at a time, before they are turned into starts.

    Returns:
        A `Prepared` for `adapterize(params, spec, key, sites, prepared=...)`, with the same spec.

    Raises:
        ValueError: where no method of the spec needs data, there is no batch, or a gradient is not finite.

    Example:
        >>> spec = {r".*/(q|v)_proj/kernel": jlora.SHiRA("gradient", density=0.01)}
        >>> loss_fn = lambda params, tokens: jnp.mean(model.apply({"params": params}, tokens) ** 2)
        >>> batches = [tokens, tokens + 1]
        >>> prepared = jlora.prepare(params, spec, loss_fn, batches, key=key)
        >>> adapted = jlora.adapterize(params, spec, key=key, prepared=prepared)
    """
    key = jax.random.key(0) if key is None else _compat.typed_key(key)
    leaves, treedef = paths.flatten_with_keys(params)
    needing = [site for site in resolve(leaves, spec, sites) if site.method.needs]
    if not needing:
        raise ValueError("no method of the spec starts from data; call adapterize without prepared")
    data = list(batches)
    if not data:
        raise ValueError("prepare got no batch")
    by_keys = dict(leaves)

    def loss(some: dict[tuple[str, ...], jax.Array], others: dict[tuple[str, ...], jax.Array], batch: Any) -> jax.Array:
        every = {**by_keys, **others, **some}  # what is no array stays what it is
        return loss_fn(jax.tree.unflatten(treedef, [every[keys] for keys, _ in leaves]), batch)

    starts = {}
    for group in _groups(needing, by_keys, memory):
        for site, statistics in zip(group, _statistics(loss, group, by_keys, data), strict=True):
            starts[site] = start_of(site, by_keys[site.keys], key, **statistics)
    return Prepared(starts)


def _groups(sites: list[Site], leaves: dict[tuple[str, ...], Any], memory: int) -> list[list[Site]]:
    """The sites in order, cut where their gradients, in float32, would pass `memory`."""
    groups: list[list[Site]] = []
    room = 0
    for site in sites:
        size = 4 * leaves[site.keys].size * len(site.method.needs)
        if not groups or size > room:
            groups.append([])
            room = memory
        groups[-1].append(site)
        room -= size
    return groups


def _statistics(loss: Any, group: list[Site], leaves: dict[Any, Any], data: list[Any]) -> list[dict[str, jax.Array]]:
    """For each site the means over the batches of what its method needs, in float32 at least."""
    some = {site.keys: leaves[site.keys] for site in group}
    others = {keys: leaf for keys, leaf in leaves.items() if keys not in some and _compat.is_array(leaf)}

    @jax.jit
    def add(total: Any, others: Any, batch: Any) -> Any:
        gradients = jax.grad(lambda some: loss(some, others, batch))(some)
        found = []
        for site in group:
            gradient = gradients[site.keys]
            gradient = gradient.astype(accumulation_dtype(gradient.dtype)) / len(data)
            found.append({name: STATISTICS[name](gradient) for name in sorted(site.method.needs)})
        return found if total is None else jax.tree.map(jnp.add, total, found)

    total = None
    for batch in data:
        total = add(total, others, batch)
    assert total is not None
    for site, statistics in zip(group, total):
        for array in statistics.values():
            if not isinstance(array, Tracer) and not bool(jnp.all(jnp.isfinite(array))):
                raise ValueError(f"{site.path}: the gradient of loss_fn is not finite")
    return total
