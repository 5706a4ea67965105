"""Where a method's arrays lie: `in` axes as the base's, `out` axes as the base's, ranks whole on every device."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from jlora import paths
from jlora.core.protocol.method import Site, Start
from jlora.core.protocol.stored import Stored


def named_sharding(leaf: Any) -> NamedSharding | None:
    """The sharding of a base leaf, where it lies on a mesh of more than one device."""
    sharding = getattr(leaf, "sharding", None)
    if isinstance(leaf, Tracer) or not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    return sharding


def is_shape(leaf: Any) -> bool:
    """Whether a leaf is only the shape of an array; or is kept in the form of a code whose fields are."""
    arrays = leaf.fields.values() if isinstance(leaf, Stored) else (leaf,)
    return any(isinstance(array, jax.ShapeDtypeStruct) for array in arrays)


def is_cut_unseen(leaf: Any) -> bool:
    """Whether a leaf is traced on a mesh of several devices whose axes are automatic, so that nothing tells how it is cut."""
    if not isinstance(leaf, Tracer):
        return False
    mesh = getattr(jax.typeof(leaf).sharding, "mesh", None)
    return mesh is not None and not mesh.empty and mesh.size > 1 and AxisType.Explicit not in mesh.axis_types


def field_specs(site: Site, spec: PartitionSpec) -> dict[str, PartitionSpec]:
    """The partition specs of a method's fields at a site whose leaf is cut by `spec`.

    A method that takes the leaf as a whole has fields cut as the leaf; see `Folded.specs` for all others.
    """
    if not site.method.matrix:
        whole = PartitionSpec(*spec, *([None] * (len(site.shape) - len(spec))))
        return dict.fromkeys(site.method.axes, whole)
    return site.specs(site.method.axes, spec)


def field_shardings(site: Site, leaf: Any) -> dict[str, NamedSharding] | None:
    """The shardings of a method's fields, or None where the base leaf is on no mesh.

    Raises:
        ValueError: where the leaf's axes can't be cut so, or the mesh in use (`jax.set_mesh`) lacks an axis that cuts them.
    """
    sharding = named_sharding(leaf)
    if sharding is None:
        return None
    check_cut(site.path, site.shape, sharding.spec, sharding.mesh.shape)
    _check_in_use(site.path, sharding)
    specs = field_specs(site, sharding.spec)
    return {name: NamedSharding(sharding.mesh, shortest(spec)) for name, spec in specs.items()}


def shortest(spec: PartitionSpec) -> PartitionSpec:
    """A partition spec without what says nothing at its end, as `jax.jit` gives those of its results.

    JAX counts specs that differ in it as different, and would compile a training step for its own results anew.
    """
    entries = list(spec)
    while entries and entries[-1] in (None, ()):
        entries.pop()
    return PartitionSpec(*entries)


def check_cut(path: str, shape: Sequence[int], spec: PartitionSpec, sizes: Any) -> None:
    """Refuses a partition spec by which a leaf can't be cut on a mesh with the given sizes of axes.

    Raises:
        ValueError: where the mesh lacks an axis, or an axis does not divide; with the leaf and the numbers.
    """
    for axis, entry in enumerate(spec):
        names = axis_names(entry)
        if missing := [name for name in names if name not in sizes]:
            raise ValueError(f"{path}: axis {axis} is cut by {missing[0]!r}, but the mesh has {mesh_text(sizes)}")
        if shape[axis] % math.prod(sizes[name] for name in names):
            cut = " x ".join(f"{name}={sizes[name]}" for name in names)
            raise ValueError(
                f"{path}: the mesh axis {cut} does not divide the {shape[axis]} of axis {axis} of {tuple(shape)}; cut "
                "another axis of this leaf, or leave it whole"
            )


def first_rules(names: Sequence[str], patterns: Iterable[str]) -> dict[str, str]:
    """For each path that some pattern matches as a whole the first such pattern.

    Raises:
        ValueError: for a pattern that matches no path, or none that those before it leave.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        matched = [name for name in names if re.fullmatch(pattern, name)]
        if not matched:
            raise ValueError(
                f"{pattern!r} matches the whole path of no weight; nearest: {paths.nearest(pattern, names)}"
            )
        if all(name in found for name in matched):
            raise ValueError(
                f"all that {pattern!r} matches is taken by a pattern before it, such as {found[matched[0]]!r}"
            )
        found = {**dict.fromkeys(matched, pattern), **found}
    return found


def check_rule(path: str, shape: Sequence[int], spec: PartitionSpec, sizes: Any) -> None:
    """`check_cut` for a spec that was written for a leaf by hand, and so has an entry for each of its axes.

    Raises:
        ValueError: as `check_cut`, and for another number of entries.
    """
    if len(spec) != len(shape):
        raise ValueError(f"{path}: {spec} has {len(spec)} entries, but the leaf {tuple(shape)} has {len(shape)} axes")
    check_cut(path, shape, spec, sizes)


def check_fields(path: str, leaf: Stored, specs: dict[str, Any], sizes: Any) -> None:
    """`check_cut` for the fields of a leaf that is kept in the form of a code: a cut must not fall into a block."""
    for name, array in leaf.fields.items():
        check_cut(f"{path}, field {name} of {leaf.code}", array.shape, specs[name], sizes)


def axis_names(entry: Any) -> tuple[str, ...]:
    """Mesh axes of one entry of a partition spec."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def mesh_text(sizes: Any) -> str:
    """The axes of a mesh in words."""
    return "only " + ", ".join(f"{name}={size}" for name, size in sizes.items())


def _check_in_use(path: str, sharding: NamedSharding) -> None:
    used = {name for entry in sharding.spec for name in axis_names(entry)}
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and (missing := sorted(used - set(mesh.axis_names))):
        raise ValueError(
            f"{path}: the base is cut by {missing[0]}={sharding.mesh.shape[missing[0]]}, but the mesh in use has "
            f"{mesh_text(mesh.shape)}; place the base on the mesh of jax.set_mesh first"
        )


def place(start: Start, site: Site, leaf: Any) -> Start:
    """A method's starting arrays, put where they belong beside their base leaf."""
    shardings = field_shardings(site, leaf)
    if shardings is None:
        return start
    params = {name: jax.device_put(x, shardings[name]) for name, x in start.params.items()}
    frozen = {name: jax.device_put(x, shardings[name]) for name, x in start.frozen.items()}
    return Start(params, frozen)


def shapes_beside(
    shapes: Mapping[tuple[str, ...], Any], sites: Iterable[Site], leaves: Mapping[tuple[str, ...], Any], other: Any
) -> dict[tuple[str, ...], Any]:
    """Shapes of a method's arrays, with the shardings that the arrays get beside their base.

    Args:
        shapes: by the drawer `params` or `frozen`, the keys of the leaf or of what leaves share, and the field's name.
        sites: the adapted leaves.
        leaves: the base, arrays or shapes.
        other: the sharding of what is beside no leaf on a mesh of several devices.
    """
    sites = tuple(sites)
    fields = {site.keys: field_shardings(site, leaves[site.keys]) or {} for site in sites}
    whole = replicated(leaves[site.keys] for site in sites) or other
    found = {}
    for keys, shape in shapes.items():
        at = fields.get(keys[1:-1])  # None for what leaves share, which lies whole on every device
        sharding = whole if at is None else at.get(keys[-1], other)
        found[keys] = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
    return found


def alone(leaves: Iterable[Any]) -> Any:
    """Where what is whole lies beside the first leaf of which that is known; None where it is of none."""
    sharding = next(filter(None, (getattr(leaf, "sharding", None) for leaf in leaves)), None)
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding if isinstance(sharding, SingleDeviceSharding) else None


def whole(tree: Any) -> Any:
    """Traced arrays that stay whole on every device of the mesh that their program is on, if its axes are automatic.

    For what leaves share, and for parts of it: cut as one leaf's product wants it, another's would have to be sent for.
    """

    def one(x: jax.Array) -> jax.Array:
        mesh = jax.typeof(x).sharding.mesh
        if mesh.size == 1 or set(mesh.axis_types) != {AxisType.Auto}:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(lambda x: one(x) if isinstance(x, Tracer) else x, tree)


def replicate(tree: Any, leaves: Iterable[Any]) -> Any:
    """Arrays put whole onto every device of the mesh that some base leaves lie on."""
    sharding = replicated(leaves)
    return tree if sharding is None else jax.device_put(tree, sharding)


def replicated(leaves: Iterable[Any]) -> NamedSharding | None:
    """Whole on every device of the mesh of the first leaf that lies on one; None where none does."""
    meshes = (sharding.mesh for sharding in map(named_sharding, leaves) if sharding is not None)
    mesh = next(meshes, None)
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def complete(tree: Any) -> Any:
    """The tree with every array whole in every process; for what is small, such as adapters.

    Every process must call it. Arrays that are whole already, and numpy's, stay as they are.
    """

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        if leaf.is_fully_addressable or leaf.is_fully_replicated or not isinstance(leaf.sharding, NamedSharding):
            return leaf
        return jax.jit(lambda x: x, out_shardings=NamedSharding(leaf.sharding.mesh, PartitionSpec()))(leaf)

    return jax.tree.map(one, tree)
