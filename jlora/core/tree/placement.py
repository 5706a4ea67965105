"""Where a method's arrays lie: `in` axes as the base's, `out` axes as the base's, ranks whole on every device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jlora.core.protocol.method import Site, Start
from jlora.core.protocol.stored import Stored


def named_sharding(leaf: Any) -> NamedSharding | None:
    """The sharding of a base leaf, where it lies on a mesh of more than one device."""
    sharding = getattr(leaf, "sharding", None)
    if isinstance(leaf, Tracer) or not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    return sharding


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
