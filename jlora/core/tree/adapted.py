"""`Adapted`: a base and its trainable adapters as one pytree, and what can be done with it."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora import _compat, mesh, paths
from jlora.core.protocol.method import Arrays, Method, Site, Start
from jlora.core.tree.spec import Spec, resolve
from jlora.core.walk import weight as weights
from jlora.core.walk.weight import Weight

if TYPE_CHECKING:
    from jlora.core.transforms.sites import Sites
    from jlora.core.tree.prepare import Prepared

#: Where `Adapted.frozen` keeps the arrays that several leaves share. No leaf's path starts so.
SHARED = "~shared"


@dataclass(frozen=True)
class Plan:
    """The adapted leaves; static and hashable, so that it may sit in a pytree without retracing."""

    sites: tuple[Site, ...]

    def shared_names(self) -> dict[Method, str]:
        """For each method with shared constants the name of their drawer, `frozen[SHARED][name]`."""
        names: dict[Method, str] = {}
        for method in (site.method for site in self.sites):
            if method.shared_fields and method not in names:
                # By name, not by class: a class of the user's own may have the name of another.
                same = sum(type(other).__name__ == type(method).__name__ for other in names)
                names[method] = type(method).__name__ + (f"_{same}" if same else "")
        return names


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Adapted:
    """Stands wherever the params tree stood; made by `adapterize`, understood by `lift`.

    Attributes:
        base: the params tree; never trained.
        params: what is trained: a nested dict along the base's own keys with the method's fields at the end, such as
            `params["layers"]["q_proj"]["kernel"]["a"]`. Stacked leaves have their batch axes in front.
        frozen: constants of the methods, laid out like `params`; those that several leaves share are under `SHARED`.
        context: read-only inputs of a call; `{"dropout": key}` switches dropout on.
        plan: path, method and axis roles of every adapted leaf; static.
    """

    base: Any
    params: dict[str, Any]
    frozen: dict[str, Any]
    context: dict[str, Any]
    plan: Plan = field(metadata={"static": True})

    def replace(self, **changes: Any) -> Adapted:
        """A copy with some fields replaced, as in `adapted.replace(params=new_params)`."""
        return dataclasses.replace(self, **changes)

    def weights(self, names: dict[Method, str] | None = None) -> list[Weight]:
        """The adapted leaves as the values that travel through a lifted function.

        Args:
            names: the drawers of shared constants, if the plan is a part of another; by default the plan's own.
        """
        leaves = dict(paths.flatten_with_keys(self.base)[0])
        names = self.plan.shared_names() if names is None else names
        drawers = self.frozen.get(SHARED, {})
        return [
            self._weight(site, leaves[site.keys], drawers.get(names.get(site.method), {})) for site in self.plan.sites
        ]

    def _weight(self, site: Site, leaf: Any, shared: Arrays) -> Weight:
        key = self.context.get("dropout")
        if key is not None:
            key = jax.random.fold_in(key, _number(site.path)) if site.method.uses_key else None
        params, frozen = paths.lookup(self.params, site.keys), paths.lookup(self.frozen, site.keys)
        leaf = jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf
        return weights.start(leaf, site, params, frozen, shared, key)

    def with_leaves(self, arrays: list[Any]) -> Any:
        """The base tree with its adapted leaves replaced, in the order of the plan."""
        leaves, treedef = paths.flatten_with_keys(self.base)
        new = dict(zip((site.keys for site in self.plan.sites), arrays, strict=True))
        return jax.tree.unflatten(treedef, [new.get(keys, leaf) for keys, leaf in leaves])

    def __repr__(self) -> str:
        return f"Adapted({len(self.plan.sites)} sites, {count(self.params):,} trained values on {count(self.base):,})"


def count(tree: Any) -> int:
    """Number of array elements in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree) if _compat.is_array(leaf))


def _number(path: str) -> int:
    """A fixed number for a path, from which its random keys come: other sites don't change it."""
    return zlib.crc32(path.encode())


def adapterize(
    params: Any,
    spec: Spec,
    key: jax.Array | None = None,
    sites: Sites | None = None,
    prepared: Prepared | None = None,
) -> Adapted:
    """Splits params into a frozen base and small trainable adapters.

    Args:
        params: any pytree of arrays, numpy's too; it is not changed or copied. What is no array (numbers, texts) is left
            alone. An `Adapted` is such a tree as well: its base is adapted anew, under paths that begin with `base/`, and
            what it has trained so far stays as it is.
        spec: ordered mapping from pattern to method. A pattern is a regex that must match a leaf's whole `/`-joined path,
            or `ALL_LINEAR`. The first match wins; what nothing matches, or what matches None, is frozen.
        key: random key of the starting values (default: `jax.random.key(0)`); every leaf gets its own.
        sites: how the function reads its weights, from `jlora.sites`. Without it a leaf of two axes is `[in, out]`, and more
            axes are an error.
        prepared: what methods that start from data need, from `jlora.prepare`.

    Returns:
        An `Adapted` that starts at the base's output (for methods with an exact start).

    Raises:
        TypeError: for a spec of the wrong kind, a leaf that holds integers, or one that is only a shape.
        ValueError: for a path that two leaves have or that jlora keeps for itself, a pattern that matches nothing, a leaf that
            a method can't adapt, an axis role that can't be known, a method that starts from data without `prepared`.

    Example:
        >>> adapted = jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.LoRA(rank=8, alpha=16)})
    """
    key = jax.random.key(0) if key is None else _compat.typed_key(key)
    leaves, treedef = paths.flatten_with_keys(params)
    _check_keys(leaves)
    plan = Plan(tuple(resolve(leaves, spec, sites)))
    by_keys = dict(leaves)
    trained: dict[str, Any] = {}
    frozen = _shared(plan, key, by_keys)
    for site, start in starts_of(plan.sites, by_keys, key, prepared).items():
        start = mesh.place(start, site, by_keys[site.keys])
        paths.insert(trained, site.keys, start.params)
        if start.frozen:
            paths.insert(frozen, site.keys, start.frozen)
    base = jax.tree.unflatten(treedef, [leaf for _, leaf in leaves])
    return Adapted(base, trained, frozen, {}, plan)


def _shared(plan: Plan, key: jax.Array, leaves: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """The drawer of the arrays that several leaves share, or an empty one."""
    drawers = {}
    for method, name in plan.shared_names().items():
        sites = tuple(site for site in plan.sites if site.method == method)
        arrays = method.shared(jax.random.fold_in(key, _number(f"{SHARED}/{name}")), sites)
        drawers[name] = mesh.replicate(arrays, leaves[sites[0].keys])
    return {SHARED: drawers} if drawers else {}


def _check_keys(leaves: list[tuple[tuple[str, ...], Any]]) -> None:
    seen: set[str] = set()
    for keys, _ in leaves:
        if not keys:
            raise ValueError('params is one leaf, which has no path; wrap it in a dict, as in {"w": params}')
        if keys[0] == SHARED:
            raise ValueError(f"the params tree has the key {SHARED!r}, which jlora keeps for itself; rename it")
        if (path := "/".join(keys)) in seen:
            raise ValueError(f"two leaves of the params tree have the same path {path!r}")
        seen.add(path)
    for keys, _ in leaves:
        if any("/".join(keys[:n]) in seen for n in range(1, len(keys))):
            raise ValueError(f"the path {'/'.join(keys)!r} continues the path of another leaf")


def starts_of(
    sites: Sequence[Site], leaves: Mapping[tuple[str, ...], Any], key: jax.Array, prepared: Prepared | None = None
) -> dict[Site, Start]:
    """The starts of some leaves, with what those of one method draw together."""
    starts = {}
    for site in sites:
        start = None if prepared is None else prepared.start(site)
        starts[site] = start or start_of(site, leaves[site.keys], key)
    for method in dict.fromkeys(site.method for site in sites):
        same = tuple(site for site in sites if site.method == method)
        own = jax.random.fold_in(key, _number(f"{SHARED}/{same[0].path}"))
        starts |= dict(zip(same, method.together(own, [starts[site] for site in same], same), strict=True))
    return starts


def start_of(site: Site, leaf: jax.Array, key: jax.Array, **statistics: jax.Array) -> Start:
    """The method's start for every matrix of a leaf; batch axes in front.

    Raises:
        ValueError: for a method that starts from statistics which are not given.
    """
    if missing := sorted(site.method.needs - set(statistics)):
        raise ValueError(
            f"{site.path}: {site.method} starts from data ({', '.join(missing)}); pass "
            "prepared=jlora.prepare(params, spec, loss_fn, batches)"
        )
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{site.path} is a shape and no array, so that nothing can start from it; for the shapes of an Adapted call "
            "jax.eval_shape(lambda params: jlora.adapterize(params, spec, ...), params)"
        )
    leaf = jnp.asarray(leaf)  # numpy's arrays can't all that jax.numpy's can
    key = jax.random.fold_in(key, _number(site.path))

    def placed(sharding: Any) -> Any:
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        found = jax.eval_shape(partial(_start, site), shape, key, dict.fromkeys(statistics, shape))
        specs = mesh.field_specs(site, sharding.spec)
        drawers: list[Any] = [{name: specs[name] for name in drawer} for drawer in (found.params, found.frozen)]
        return Start(*drawers)

    return _compat.automatic(partial(_start, site), jax.typeof(leaf), placed)(leaf, key, statistics)


def _start(site: Site, leaf: jax.Array, key: jax.Array, statistics: Arrays) -> Start:
    if not site.method.matrix:
        return site.method.start(key, leaf, site, **statistics)

    def one(key: jax.Array, w: jax.Array, statistics: Arrays) -> Start:
        return site.method.start(key, w, site, **statistics)

    keys = jax.random.split(key, site.batch_shape) if site.batch_axes else key
    for _ in site.batch_axes:
        one = jax.vmap(one)
    return one(keys, site.fold(leaf), {name: site.fold(array) for name, array in statistics.items()})


def merge(adapted: Adapted) -> Any:
    """Ordinary params for the unmodified function: every adapted leaf replaced by its effective weight.

    Differentiable with respect to `adapted.params`; dtype and sharding of each leaf are kept, and leaves that are not
    adapted are the base's own arrays. Where the base is an `Adapted` again, that is merged too.

    Example:
        >>> model.apply({"params": jlora.merge(adapted)}, tokens)
    """
    merged = [_placed_like(effective_leaf(weight), weight.array) for weight in adapted.weights()]
    params = adapted.with_leaves(merged)
    is_adapted = lambda node: isinstance(node, Adapted)  # noqa: E731
    return jax.tree.map(lambda node: merge(node) if is_adapted(node) else node, params, is_leaf=is_adapted)


def effective_leaf(weight: Weight) -> jax.Array:
    """The effective weight of a leaf, in its form and dtype, on meshes with explicit axes too."""
    return _compat.automatic(weights.effective, jax.typeof(weight.array))(weight)


def _placed_like(array: Any, leaf: Any) -> Any:
    concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
    if not concrete or isinstance(array, Tracer) or array.sharding == leaf.sharding:
        return array
    return jax.device_put(array, leaf.sharding)


def summary(adapted: Adapted) -> str:
    """A table of the adapted leaves: path, shape, roles, method and number of trained values."""
    rows = [("leaf", "shape", "in x out", "method", "trained")]
    for site in adapted.plan.sites:
        trained = count(paths.lookup(adapted.params, site.keys))
        rows.append((site.path, "x".join(map(str, site.shape)), _matrix_text(site), str(site.method), f"{trained:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    total, base = count(adapted.params), count(adapted.base)
    lines.append(f"trained {total:,} of {base:,} values in the base ({100 * total / max(base, 1):.2f} %)")
    return "\n".join(lines)


def _matrix_text(site: Site) -> str:
    if not site.method.matrix:
        return "-"
    stacked = "".join(f"{size} of " for size in site.batch_shape)
    return f"{stacked}{site.in_size} x {site.out_size}"
