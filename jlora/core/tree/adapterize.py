"""`adapterize`: params and a spec to a base with adapters."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import jax

from jlora import _compat, paths
from jlora.core.protocol.fields import Fields
from jlora.core.protocol.method import Site, Start
from jlora.core.protocol.readings import Sites
from jlora.core.protocol.stored import Stored
from jlora.core.tree import beside, placement
from jlora.core.tree.adapted import SHARED, Adapted, Plan
from jlora.core.tree.spec import Spec, resolve
from jlora.core.tree.starts import Prepared, blank_at, starts_of

Leaves = Mapping[tuple[str, ...], Any]


def adapterize(
    params: Any,
    spec: Spec,
    key: jax.Array | None = None,
    sites: Sites | None = None,
    prepared: Prepared | None = None,
) -> Adapted:
    """Splits params into a frozen base and small trainable adapters.

    Where a leaf that is adapted is a `jax.ShapeDtypeStruct`, nothing is computed, and the adapters are such shapes too, with
    the shardings that the arrays would get beside those of the base. (Methods that start from data need no `prepared` then.)

    Under `jax.jit` the trace of a base on a mesh with automatic axes does not show how it is cut: the adapters lie as its
    `out_shardings` say, which the shapes have.

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
        TypeError: for a spec of the wrong kind, or a leaf that holds integers.
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
    beside.check(plan.sites, by_keys)
    make = _shapes if any(placement.is_shape(by_keys[site.keys]) for site in plan.sites) else _arrays
    trained, frozen = make(plan, key, by_keys, prepared)
    base = jax.tree.unflatten(treedef, [leaf for _, leaf in leaves])
    return Adapted(base, trained, frozen, {}, plan)


def _arrays(
    plan: Plan, key: jax.Array, leaves: Leaves, prepared: Prepared | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is trained and what is constant, as arrays beside the base."""
    _warn_of_cuts(plan, leaves)
    trained, frozen = _shared(plan, key, leaves)
    for site, start in starts_of(plan.sites, leaves, key, prepared).items():
        start = placement.place(start, site, leaves[site.keys])
        paths.insert(trained, site.keys, start.params)
        if start.frozen:
            paths.insert(frozen, site.keys, start.frozen)
    return trained, frozen


def _shapes(
    plan: Plan, key: jax.Array, leaves: Leaves, prepared: Prepared | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`_arrays` in shapes, each with the sharding that the array would get."""
    sites = {site.keys for site in plan.sites}
    adapted = {keys: leaf for keys, leaf in leaves.items() if keys in sites or isinstance(leaf, Stored)}
    # No shardings go in: starts don't depend on them, and a mesh of devices that are not there can't be traced on.
    bare = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), adapted)

    def make(given: Any) -> Any:
        return _arrays(plan, key, given, blank_at(plan.sites, given) if prepared is None else prepared)

    trained, frozen = jax.eval_shape(make, bare)
    flat, treedef = paths.flatten_with_keys({"params": trained, "frozen": frozen})
    placed = placement.shapes_beside(dict(flat), plan.sites, leaves, placement.alone(adapted.values()))
    tree = jax.tree.unflatten(treedef, [placed[keys] for keys, _ in flat])
    return tree["params"], tree["frozen"]


def _warn_of_cuts(plan: Plan, leaves: Leaves) -> None:
    """Says of a base that is traced on a mesh that nothing here shows how it is cut."""
    for site in plan.sites:
        if not site.method.axes:
            continue  # nothing lies beside it
        leaf = leaves[site.keys]
        arrays = leaf.fields.values() if isinstance(leaf, Stored) else (leaf,)
        if any(map(placement.is_cut_unseen, arrays)):
            warnings.warn(
                f"{site.path} lies on a mesh, but under jax.jit nothing shows how it is cut, so that XLA chooses where the "
                "adapters lie: give jax.jit(..., out_shardings=...), such as the shardings of adapterize on shapes "
                "(jax.ShapeDtypeStruct), or call adapterize outside of jax.jit",
                stacklevel=4,
            )
            return


def _shared(plan: Plan, key: jax.Array, leaves: Leaves) -> tuple[dict[str, Any], dict[str, Any]]:
    """The trained arrays that several leaves share, and the constants, by drawer; each in an empty tree where there are none.

    Raises:
        ValueError: for a method that gives other arrays than it names.
    """
    trained: dict[str, Any] = {}
    frozen: dict[str, Any] = {}
    for method, name in plan.shared_names().items():
        sites = tuple(site for site in plan.sites if site.method == method)
        if isinstance(method, Fields):
            found = method.start_in_common(_whole_group(method, sites, leaves))
        else:
            found = method.shared(jax.random.fold_in(key, paths.number(f"{SHARED}/{name}")), sites)
        found = found if isinstance(found, Start) else Start({}, found)
        if sorted([*found.params, *found.frozen]) != sorted(method.shared_fields):
            raise ValueError(
                f"{method} shares {sorted(found.params)} trained and {sorted(found.frozen)} frozen, but its shared_fields name "
                f"{sorted(method.shared_fields)}: name each array once"
            )
        found = placement.replicate(found, [leaves[site.keys] for site in sites])
        for tree, arrays in ((trained, found.params), (frozen, found.frozen)):
            if arrays:
                paths.insert(tree, (SHARED, name), arrays)
    return trained, frozen


def _whole_group(method: Fields, sites: tuple[Site, ...], leaves: Leaves) -> Stored:
    """A leaf of the group whose common arrays a method trains.

    Raises:
        ValueError: for other leaves of the group.
    """
    mine = {site.keys for site in sites}
    for keys, leaf in leaves.items():
        if isinstance(leaf, Stored) and leaf.group == method.group and keys not in mine:
            raise ValueError(
                f"{sites[0].path} has {', '.join(method.common)} in common with {'/'.join(keys)}, which {method} must train "
                "too; give both the same entry, or name in learn what is a leaf's own"
            )
    return leaves[sites[0].keys]


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
