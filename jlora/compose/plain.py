"""Plain LoRA from other methods: of the ranks in use, exactly from any factors, or the nearest of a rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec

from jlora import _compat, paths
from jlora.core.products.low_rank import Factors
from jlora.core.protocol.method import Arrays, Method, Site, View
from jlora.core.protocol.plain import PlainLoRA
from jlora.core.protocol.wrapping import Around
from jlora.core.tree import placement
from jlora.core.tree.adapted import SHARED, Adapted, Plan
from jlora.core.walk import weight as weights
from jlora.core.walk.weight import Weight
from jlora.disk.serialize import is_own
from jlora.methods.lora import LoRA
from jlora.optimize.allocate import triplets


def compact(adapted: Adapted) -> Adapted:
    """The same adapters as plain `LoRA`: ranks whose gate is 0 are dropped, the gates go into `a`, the scale stays.

    For use after training, to store and serve less. Every leaf gets the rank it has left, at least 1; a stacked leaf gets the
    largest rank that any of its matrices has left, with zeros in the others. Inside another method, as in
    `DoRA(AdaLoRA(...))`, the inner one becomes LoRA. A `Chain` becomes LoRA of its finished links and the present one. Leaves
    of methods without gates or links stay as they are. So do leaves of your own classes that change the weight they inherit
    and not `plain`, or go around another method.

    Raises:
        TypeError: under `jit`, since the ranks decide the shapes.

    Example:
        >>> small = jlora.compact(adapted)
    """
    return _compacted(adapted, _says)


def unchained(adapted: Adapted) -> Adapted:
    """The adapters with every chain as plain `LoRA` of all links so far, the present one included; the same weight.

    Raises:
        TypeError: under `jit`, since the number of links decides the shapes.
    """
    return _compacted(adapted, lambda method: bool(method.kept_fields) and _says(method))


def exact(weight: Weight) -> Weight | None:
    """The leaf with LoRA of all ranks, of scale 1, where its method's weight is `w + a @ b`; None for any other.

    Inside another method of jlora's own, as in `DoRA(RACLoRA(...))`, the inner one becomes LoRA.
    """

    def gives(method: Method) -> bool:
        found = jax.eval_shape(lambda weight: _factors(method, weight), weight)
        return found is not None and found.scale is None

    method = _giving(weight.method, gives)
    found = None if method is None else _factors(method, weight)
    if method is None or found is None or not (is_own(type(method)) or _agrees(method, found, weight)):
        return None
    rank = found.a.shape[-1]
    return _with_lora(weight, method, LoRA(rank, float(rank), dropout=found.dropout), found.a, found.b)


def factors(weight: Weight) -> PlainLoRA | None:
    """The leaf's own factors and scale, where its method's weight is `w + scale * (a * gates) @ b`, and no more than that.

    A method that says what it is as plain LoRA gives what it says, any other its exact factors with scale 1; None for one
    that has none, takes the leaf as it is, or changes what is beside it.
    """
    method = weight.method
    if not method.matrix or weight.beside:
        return None
    if type(method) is LoRA and not method.from_weight:
        a, b = weight.params["a"], weight.params["b"]
        return PlainLoRA(a, jnp.ones(a.shape[:-2] + a.shape[-1:], a.dtype), b, method.scale, method.dropout)
    if _says(method):
        return _plain(weight, method)
    found = exact(weight)
    return None if found is None or type(found.method) is not LoRA else factors(found)


def nearest(weight: Weight, site: Site, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The LoRA of scale 1 with the smallest `|delta - a @ b|`, `delta` being what the method adds to the weight.

    Args:
        weight: the leaf.
        site: the leaf with the roles of its axes, which the weight's own site lacks where its method takes a leaf as it is.
        rank: of the factors; never above the matrix's smaller side.

    Returns:
        `a [*batch, in, rank]`, `b [*batch, rank, out]`, and `|delta - a b| / |delta|` of each matrix.

    Raises:
        ValueError: for a change that is not finite.
    """
    if not site.method.mergeable or weight.beside:
        raise ValueError(f"{site.path}: {site.method} does more than change the weight, so no LoRA is nearest to it")
    if site.method.matrix:
        delta = np.asarray(weights.over_batch(change(site.method), weight))
    else:
        whole = site.method.weight(View(weights.base(weight), weight.params, weight.frozen, site, weight.shared))
        delta = np.asarray(site.fold(whole) - site.fold(weights.base(weight)).astype(whole.dtype))
    if not np.all(np.isfinite(delta)):
        raise ValueError(f"{site.path}: its adapter holds values that are not finite")
    return _truncated(delta, min(rank, *delta.shape[-2:]))


def _says(method: Method) -> bool:
    """Whether a method says what it is as plain LoRA.

    An inherited `plain` counts only where no class between has another `weight`, which it would not be true of.
    """
    order = type(method).__mro__
    plain, weight = (next(n for n, cls in enumerate(order) if name in vars(cls)) for name in ("plain", "weight"))
    return order[plain] is not Method and plain <= weight


def _giving(method: Method, gives: Callable[[Method], bool]) -> Method | None:
    """The outermost method for which `gives` holds, or None.

    Inside another method it is looked for only where that is jlora's own: of those it is known that they use nothing of the
    inner method but its weight.
    """
    if gives(method):
        return method
    return _giving(method.inner, gives) if isinstance(method, Around) and is_own(type(method)) else None


def _compacted(adapted: Adapted, wanted: Callable[[Method], bool]) -> Adapted:
    methods = [_giving(site.method, wanted) for site in adapted.plan.sites]
    if all(method is None for method in methods):
        return adapted
    params, sites = adapted.params, []
    frozen: dict[str, Any] = {}
    for site, method, weight in zip(adapted.plan.sites, methods, adapted.weights(), strict=True):
        if method is not None:
            weight = _of_used_ranks(weight, method)
            params = triplets.put(params, site.keys, weight.params)
        sites.append(weight.site)
        if weight.frozen:
            paths.insert(frozen, site.keys, weight.frozen)
    plan = Plan(tuple(sites))
    params = {name: tree for name, tree in params.items() if name != SHARED} | _drawers(
        adapted.params, adapted.plan, plan
    )
    return adapted.replace(params=params, frozen=frozen | _drawers(adapted.frozen, adapted.plan, plan), plan=plan)


def _drawers(tree: dict[str, Any], old: Plan, new: Plan) -> dict[str, Any]:
    """What leaves share, of the methods that remain and under their names in the new plan."""
    before, drawers = old.shared_names(), tree.get(SHARED, {})
    kept = {name: drawers[before[m]] for m, name in new.shared_names().items() if before[m] in drawers}
    return {SHARED: kept} if kept else {}


def _of_used_ranks(weight: Weight, method: Method) -> Weight:
    """The leaf with LoRA of the ranks whose gate is open, those first."""
    found = _plain(weight, method)
    if isinstance(found.gates, Tracer):
        raise TypeError("jlora.compact makes arrays whose shapes depend on values: call it outside of jit")
    used = np.asarray(jax.device_get(placement.complete(found.gates))) != 0
    rank = max(1, int(used.sum(-1).max()))
    order = np.argsort(~used, axis=-1, kind="stable")[..., :rank]
    a = triplets.taken(found.a * found.gates[..., None, :], order[..., None, :], -1)
    b = triplets.taken(found.b, order[..., :, None], -2)
    return _with_lora(weight, method, LoRA(rank, found.scale * rank, dropout=found.dropout), a, b)


def _plain(weight: Weight, method: Method) -> PlainLoRA:
    """What a method says it is, with the batch axes in front; factors are cut as LoRA's would be."""

    def cut(sharding: Any) -> Any:
        assert weight.site is not None
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weight)
        specs = placement.field_specs(replace(weight.site, method=LoRA()), sharding.spec)
        gates = PartitionSpec(*specs["a"][:-2], None)
        return replace(jax.eval_shape(found, shapes), a=specs["a"], gates=gates, b=specs["b"])

    found = partial(weights.over_batch, method.plain)
    return _compat.automatic(found, weight.aval, cut)(weight)


def _with_lora(weight: Weight, old: Method, lora: LoRA, a: jax.Array, b: jax.Array) -> Weight:
    """The leaf with LoRA in place of a method, which may be inside others; their arrays stay."""
    assert weight.site is not None

    def others(fields: Arrays) -> Arrays:
        return {name: value for name, value in fields.items() if name not in old.axes}

    def inside(method: Any) -> Method:
        return lora if method is old else replace(method, inner=inside(method.inner))

    site = replace(weight.site, method=inside(weight.method))
    return replace(weight, params={**others(weight.params), "a": a, "b": b}, frozen=others(weight.frozen), site=site)


def _factors(method: Method, weight: Weight) -> Factors | None:
    if not method.matrix:
        return None
    if method.form is Factors:
        return weights.over_batch(method.factors, weight)
    if not _says(method):
        return None
    found = _plain(weight, method)
    return Factors(found.a * found.gates[..., None, :], found.scale * found.b, dropout=found.dropout)


def _agrees(method: Method, found: Factors, weight: Weight) -> bool:
    """Whether a method's factors give its weight, as the contract demands; a class that fails it may have another weight."""
    told, wanted = found.a @ found.b, weights.over_batch(change(method), weight)
    # The second term is the rounding error of the weights, of which `wanted` is a difference.
    size = jnp.max(jnp.abs(wanted)) * 1e-4 + jnp.max(jnp.abs(weights.base(weight))) * 8 * jnp.finfo(wanted.dtype).eps
    return bool(jnp.max(jnp.abs(told - wanted)) <= size)


def change(method: Method) -> Callable[[View], jax.Array]:
    """A function of a matrix's view that gives what the method adds to it."""

    def delta(view: View) -> jax.Array:
        weight = method.weight(view)
        return weight - view.w.astype(weight.dtype)

    return delta


def _truncated(delta: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`nearest`, by a singular value decomposition (Eckart and Young): each factor has half of the singular values."""
    a = np.zeros((*delta.shape[:-1], rank), delta.dtype)
    b = np.zeros((*delta.shape[:-2], rank, delta.shape[-1]), delta.dtype)
    residual = np.zeros(delta.shape[:-2], np.float64)
    for index in np.ndindex(*delta.shape[:-2]):
        u, s, v = np.linalg.svd(delta[index].astype(np.float64), full_matrices=False)
        root = np.sqrt(s[:rank])
        a[index], b[index] = u[:, :rank] * root, root[:, None] * v[:rank]
        total = np.sqrt(np.sum(s**2))
        residual[index] = np.sqrt(np.sum(s[rank:] ** 2)) / total if total else 0.0
    return a, b, residual
