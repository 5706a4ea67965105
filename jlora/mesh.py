"""Shardings of adapters from those of their base: `in` axes as the base's, `out` axes as the base's, ranks replicated."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jlora import paths
from jlora.core.protocol.method import Site, Start

if TYPE_CHECKING:
    from jlora.core.tree.adapted import Adapted

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]


def named_sharding(leaf: Any) -> NamedSharding | None:
    """The sharding of a base leaf, where it lies on a mesh of more than one device."""
    sharding = getattr(leaf, "sharding", None)
    if isinstance(leaf, Tracer) or not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    return sharding


def field_specs(site: Site, spec: PartitionSpec) -> dict[str, PartitionSpec]:
    """The partition specs of a method's fields at a site whose leaf is cut by `spec`.

    A field's batch axes are cut as the leaf's; its `in` and `out` axes as the outermost of the leaf's axes that are folded
    into them, since a cut of an inner one is no cut of the folded axis; everything else is replicated. A method that takes
    the leaf as a whole has fields cut as the leaf.
    """
    axes = (*spec, *([None] * (len(site.shape) - len(spec))))
    if not site.method.matrix:
        return {name: PartitionSpec(*axes) for name in site.method.axes}
    cut = {"in": _outermost(site, site.in_axes, axes), "out": _outermost(site, site.out_axes, axes)}
    batch = [axes[axis] for axis in site.batch_axes]
    return {name: PartitionSpec(*batch, *(cut.get(role) for role in roles)) for name, roles in site.method.axes.items()}


def _outermost(site: Site, folded: tuple[int, ...], axes: tuple[Any, ...]) -> Any:
    wide = [axis for axis in folded if site.shape[axis] > 1]
    return axes[wide[0]] if wide else None


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
    return {name: NamedSharding(sharding.mesh, spec) for name, spec in field_specs(site, sharding.spec).items()}


def check_cut(path: str, shape: Sequence[int], spec: PartitionSpec, sizes: Any) -> None:
    """Whether a leaf can be cut by a partition spec on a mesh with the given sizes of axes.

    Raises:
        ValueError: where the mesh lacks an axis, or an axis does not divide; with the leaf and the numbers.
    """
    for axis, entry in enumerate(spec):
        names = _names(entry)
        if missing := [name for name in names if name not in sizes]:
            raise ValueError(f"{path}: axis {axis} is cut by {missing[0]!r}, but the mesh has {_mesh_text(sizes)}")
        if shape[axis] % math.prod(sizes[name] for name in names):
            cut = " x ".join(f"{name}={sizes[name]}" for name in names)
            raise ValueError(
                f"{path}: the mesh axis {cut} does not divide the {shape[axis]} of axis {axis} of {tuple(shape)}; cut "
                "another axis of this leaf, or leave it whole"
            )


def _names(entry: Any) -> tuple[str, ...]:
    """Mesh axes of one entry of a partition spec."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _mesh_text(sizes: Any) -> str:
    return "only " + ", ".join(f"{name}={size}" for name, size in sizes.items())


def _check_in_use(path: str, sharding: NamedSharding) -> None:
    used = {name for entry in sharding.spec for name in _names(entry)}
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and (missing := sorted(used - set(mesh.axis_names))):
        raise ValueError(
            f"{path}: the base is cut by {missing[0]}={sharding.mesh.shape[missing[0]]}, but the mesh in use has "
            f"{_mesh_text(mesh.shape)}; place the base on the mesh of jax.set_mesh first"
        )


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
        names = (nnx if isinstance(adapted.base, nnx.State) else linen).get_partition_spec(adapted.base)
    found = dict(_flatten_specs(names))
    leaves, treedef = paths.flatten_with_keys(adapted.base)
    if missing := ["/".join(keys) for keys, _ in leaves if keys not in found]:
        raise ValueError(f"names has nothing for {missing[0]}; wanted a PartitionSpec for every leaf of the base")
    fields = {site.keys: field_specs(site, found[site.keys]) for site in adapted.plan.sites}
    whole = PartitionSpec()

    def specs(tree: Any) -> Any:
        flat, treedef = paths.flatten_with_keys(tree)
        return jax.tree.unflatten(treedef, [fields.get(keys[:-1], {}).get(keys[-1], whole) for keys, _ in flat])

    base = jax.tree.unflatten(treedef, [found[keys] for keys, _ in leaves])
    context = jax.tree.map(lambda _: whole, adapted.context)
    return adapted.replace(base=base, params=specs(adapted.params), frozen=specs(adapted.frozen), context=context)


def _flatten_specs(names: Any) -> list[tuple[tuple[str, ...], PartitionSpec]]:
    flat, _ = paths.flatten_with_keys(names, lambda leaf: isinstance(leaf, PartitionSpec) or leaf is None)
    return [(keys, PartitionSpec() if spec is None else spec) for keys, spec in flat]


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
        if missing := [name for name in _names(entry) if name not in mesh.shape]:
            raise ValueError(f"the rule {logical!r} -> {missing[0]!r}: the mesh has {_mesh_text(mesh.shape)}")
    specs = logical_axes(adapted, names)
    if rules:  # else the names are the mesh's own, as NNX has them
        specs = linen.spmd.logical_to_mesh(specs, tuple(rules))
    found = dict(_flatten_specs(specs))
    for keys, leaf in paths.flatten_with_keys(adapted)[0]:
        check_cut("/".join(keys), jnp.shape(leaf), found[keys], mesh.shape)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


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
        sharding = named_sharding(leaves[site.keys])
        if sharding is None or not site.method.matrix or AxisType.Explicit in sharding.mesh.axis_types:
            continue
        spec = (*sharding.spec, *([None] * (len(site.shape) - len(sharding.spec))))
        names = _names(_outermost(site, site.in_axes, spec))
        if names and set(names) <= set(axes):
            found[site.path] = math.prod(sharding.mesh.shape[name] for name in names)
    return {path: pieces for path, pieces in found.items() if pieces > 1}


def place(start: Start, site: Site, leaf: Any) -> Start:
    """A method's starting arrays, put where they belong beside their base leaf."""
    shardings = field_shardings(site, leaf)
    if shardings is None:
        return start
    params = {name: jax.device_put(x, shardings[name]) for name, x in start.params.items()}
    frozen = {name: jax.device_put(x, shardings[name]) for name, x in start.frozen.items()}
    return Start(params, frozen)


def replicate(tree: Any, leaf: Any) -> Any:
    """Arrays put whole onto every device of the mesh that a base leaf lies on."""
    sharding = named_sharding(leaf)
    if sharding is None:
        return tree
    return jax.device_put(tree, NamedSharding(sharding.mesh, PartitionSpec()))


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
