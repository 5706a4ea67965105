"""Shardings of adapters from those of their base: `in` axes as the base's, `out` axes as the base's, ranks replicated.

And shardings of a base, by the paths of its leaves.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jlora import paths
from jlora.core.protocol.stored import Stored
from jlora.core.tree import placement
from jlora.core.tree.adapted import Adapted

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]


def logical_axes(adapted: Adapted, names: Any = None) -> Adapted:
    """The partition specs of an `Adapted` in the names that its base's axes carry (Flax logical axis names).

    A factor's `in` and `out` axes have the names of the base's, its rank has none.

    Args:
        adapted: arrays, or shapes from `jax.eval_shape`.
        names: a `PartitionSpec` for every leaf of the base, as `flax.linen.get_partition_spec` and
            `nnx.get_partition_spec` give; None where the base's own leaves carry them (Flax `Partitioned` boxes, NNX
            variables with sharding metadata).

    Returns:
        An `Adapted` that holds a `PartitionSpec` in place of each array, for `flax.linen.logical_to_mesh_sharding`.

    Raises:
        ValueError: for a leaf without names in `names`.

    Example:
        >>> import flax
        >>> mesh, rules = jax.make_mesh((1,), ("model",)), [("embed", "model")]
        >>> names = jlora.mesh.logical_axes(adapted)
        >>> shardings = flax.linen.logical_to_mesh_sharding(names, mesh, rules)
    """
    if names is None:
        from flax import nnx  # takes half a second, which no other function here needs

        names = (nnx if isinstance(adapted.base, nnx.State) else linen).get_partition_spec(adapted.base)
    found = dict(_flatten_specs(names))
    leaves, treedef = paths.flatten_with_keys(adapted.base)
    if missing := ["/".join(keys) for keys, _ in leaves if keys not in found]:
        raise ValueError(f"names has nothing for {missing[0]}; wanted a PartitionSpec for every leaf of the base")
    fields = {site.keys: placement.field_specs(site, found[site.keys]) for site in adapted.plan.sites}
    whole = PartitionSpec()

    def specs(tree: Any) -> Any:
        flat, treedef = paths.flatten_with_keys(tree)
        return jax.tree.unflatten(treedef, [fields.get(keys[:-1], {}).get(keys[-1], whole) for keys, _ in flat])

    base = jax.tree.unflatten(treedef, [_of_fields(leaf, found[keys]) for keys, leaf in leaves])
    context = jax.tree.map(lambda _: whole, adapted.context)
    return adapted.replace(base=base, params=specs(adapted.params), frozen=specs(adapted.frozen), context=context)


def _of_fields(leaf: Any, spec: PartitionSpec) -> Any:
    """What cuts a leaf; of one that is kept in the form of a code for each field."""
    if not isinstance(leaf, Stored):
        return spec
    specs: dict[str, Any] = leaf.specs(leaf.code.axes, spec)
    whole: dict[str, Any] = dict.fromkeys(leaf.common, PartitionSpec())
    return replace(leaf, fields={name: specs[name] for name in leaf.fields}, common=whole)


def _flatten_specs(names: Any) -> list[tuple[tuple[str, ...], PartitionSpec]]:
    flat, _ = paths.flatten_with_keys(names, lambda leaf: isinstance(leaf, PartitionSpec) or leaf is None)
    # Linen gives a leaf that is kept as a code, and has no names, in its place with nothing for each field.
    return [(keys, PartitionSpec() if spec is None or isinstance(spec, Stored) else spec) for keys, spec in flat]


def shardings(adapted: Adapted, mesh: Mesh, rules: Rules = (), names: Any = None) -> Adapted:
    """Where every array of an `Adapted` lies on a mesh, from the logical names of its base's axes.

    Args:
        adapted: arrays, or shapes from `jax.eval_shape`.
        mesh: the mesh.
        rules: pairs of a logical name and the mesh axis (or axes, or None) that cuts it, as Flax has them; none where the
            names are the mesh's own.
        names: as for `logical_axes`.

    Returns:
        An `Adapted` of `NamedSharding`s, for `jax.device_put(adapted, ...)` or `jax.jit(..., out_shardings=...)`.

    Raises:
        ValueError: for a rule with an axis that the mesh lacks, and an axis that does not divide, naming the leaf.

    Example:
        >>> mesh, rules = jax.make_mesh((1,), ("model",)), [("embed", "model")]
        >>> adapted = jax.device_put(adapted, jlora.mesh.shardings(adapted, mesh, rules))
    """
    for logical, entry in rules:
        if missing := [name for name in placement.axis_names(entry) if name not in mesh.shape]:
            raise ValueError(f"the rule {logical!r} -> {missing[0]!r}: the mesh has {placement.mesh_text(mesh.shape)}")
    specs = logical_axes(adapted, names)
    if rules:  # else the names are the mesh's own, as NNX has them
        specs = linen.spmd.logical_to_mesh(specs, tuple(rules))
    found = dict(paths.flatten_with_keys(specs, _is_spec)[0])
    for keys, leaf in paths.flatten_with_keys(adapted)[0]:
        path, spec = "/".join(keys), found[keys]
        if isinstance(leaf, Stored):
            placement.check_fields(path, leaf, spec.fields, mesh.shape)
        else:
            placement.check_cut(path, jnp.shape(leaf), spec, mesh.shape)
    return jax.tree.map(lambda spec: NamedSharding(mesh, placement.shortest(spec)), specs, is_leaf=_is_spec)


def by_path(params: Any, mesh: Mesh, rules: Mapping[str, PartitionSpec]) -> Any:
    """Where every leaf of a base lies on a mesh, by rules for the paths of its leaves.

    Args:
        params: arrays, or shapes from `jax.eval_shape`.
        mesh: the mesh.
        rules: ordered mapping from a regex, which must match a leaf's whole `/`-joined path, to a `PartitionSpec` with an
            entry for each axis of the leaf. The first match wins; what nothing matches is whole on every device.

    Returns:
        The tree with a `NamedSharding` in place of each array, for `jax.device_put(params, ...)`, for
        `jax.jit(..., out_shardings=...)`, or for the shapes that a checkpoint is restored to.

    Raises:
        ValueError: for a pattern that matches nothing, or nothing that is left; a spec with another number of entries than the
            leaf has axes; an axis that the mesh lacks, and one that does not divide, naming leaf and numbers.

    Example:
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> placed = jax.device_put(params, jlora.mesh.by_path(params, mesh, {".*/kernel": jax.P(None, "model")}))
    """
    leaves, treedef = paths.flatten_with_keys(params)
    ruled = placement.first_rules(["/".join(keys) for keys, _ in leaves], rules)
    found = []
    for keys, leaf in leaves:
        path = "/".join(keys)
        if path in ruled:
            placement.check_rule(path, jnp.shape(leaf), rules[ruled[path]], mesh.shape)
        specs = _of_fields(leaf, rules[ruled[path]] if path in ruled else PartitionSpec())
        if isinstance(leaf, Stored):
            placement.check_fields(path, leaf, specs.fields, mesh.shape)
        found.append(jax.tree.map(lambda spec: NamedSharding(mesh, placement.shortest(spec)), specs, is_leaf=_is_spec))
    return jax.tree.unflatten(treedef, found)


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)


def cuts(adapted: Adapted, axes: Collection[str]) -> dict[str, int]:
    """Into how many pieces the named mesh axes cut the input of each adapted leaf's product, for `jlora.lift`.

    Args:
        adapted: its base as arrays or shapes that lie on a mesh.
        axes: mesh axes that cut the features of activations (tensor parallelism). Axes along which weights are gathered for
            their products (FSDP) do not belong here.

    Returns:
        The number by path, for leaves that are cut so and into more than one piece; none on a mesh with explicit axes, where
        the function itself says how sums are made.

    Example:
        >>> apply = jlora.lift(model.apply, cuts=jlora.mesh.cuts(adapted, {"tensor"}))
    """
    leaves = dict(paths.flatten_with_keys(adapted.base)[0])
    found = {}
    for site in adapted.plan.sites:
        sharding = placement.named_sharding(leaves[site.keys])
        if sharding is None or not site.method.matrix or AxisType.Explicit in sharding.mesh.axis_types:
            continue
        spec = (*sharding.spec, *([None] * (len(site.shape) - len(sharding.spec))))
        names = placement.axis_names(site.outermost(site.in_axes, spec))
        if names and set(names) <= set(axes):
            found[site.path] = math.prod(sharding.mesh.shape[name] for name in names)
    return {path: pieces for path, pieces in found.items() if pieces > 1}


def moments(adapted: Adapted, axis: str) -> Any:
    """Where an optimizer's moments lie that are cut over one mesh axis more than their trained arrays (ZeRO).

    Each is cut along the longest of its axes that the mesh axis divides, beside what cuts that already. What it divides along
    none, or cuts anyway, stays as the trained array lies.

    Args:
        adapted: its trained arrays lie on a mesh with automatic axes.
        axis: an axis of that mesh, over which the arrays are copied (data parallelism).

    Returns:
        A tree of `NamedSharding`s, laid out like `adapted.params`; `axis` is in the spec of what it cuts.

    Raises:
        ValueError: for trained arrays on no such mesh; for an axis that the mesh lacks, or that cuts none of them, with their
            shapes.

    Example:
        >>> mesh = jax.make_mesh((jax.device_count(),), ("data",), (jax.sharding.AxisType.Auto,))
        >>> adapted = jax.device_put(adapted, jlora.mesh.shardings(adapted, mesh))
        >>> lies = jlora.mesh.moments(adapted, "data")
        >>> whole = sum("data" not in place.spec for place in jax.tree.leaves(lies))  # of how many arrays it cuts none
    """
    leaves, treedef = jax.tree.flatten(adapted.params)
    automatic = [each for leaf in leaves if (each := _automatic(leaf)) is not None]
    if not leaves or len(automatic) < len(leaves):
        raise ValueError(
            f"moments are cut by {axis!r} where the trained arrays lie on a mesh of several devices with automatic axes; these "
            "do not: place the base on one before adapterize"
        )
    if missing := next((each.mesh for each in automatic if axis not in each.mesh.shape), None):
        raise ValueError(f"moments can't be cut by {axis!r}: the mesh has {placement.mesh_text(missing.shape)}")
    found = [_cut_more(leaf.shape, each, axis) for leaf, each in zip(leaves, automatic, strict=True)]
    if found == automatic:
        raise ValueError(
            f"the mesh axis {axis}={automatic[0].mesh.shape[axis]} cuts no moment: it divides no axis of the trained arrays "
            f"{sorted({leaf.shape for leaf in leaves})}, or cuts them already"
        )
    return jax.tree.unflatten(treedef, found)


def _automatic(leaf: Any) -> NamedSharding | None:
    """The sharding of an array that lies on a mesh of several devices with automatic axes."""
    found = placement.named_sharding(leaf)
    return None if found is None or AxisType.Explicit in found.mesh.axis_types else found


def _cut_more(shape: tuple[int, ...], sharding: NamedSharding, axis: str) -> NamedSharding:
    """A sharding with one mesh axis more; as it is where that can't be."""
    sizes = sharding.mesh.shape
    names = [placement.axis_names(entry) for entry in (*sharding.spec, *([None] * (len(shape) - len(sharding.spec))))]
    if any(axis in each for each in names):
        return sharding
    parts = [size // math.prod(sizes[name] for name in each) for size, each in zip(shape, names, strict=True)]
    fitting = [n for n, part in enumerate(parts) if part % sizes[axis] == 0]
    if not fitting:
        return sharding
    longest = max(fitting, key=lambda n: parts[n])
    names[longest] = (*names[longest], axis)
    entries = (each[0] if len(each) == 1 else each for each in names)
    return NamedSharding(sharding.mesh, placement.shortest(PartitionSpec(*((each or None) for each in entries))))
