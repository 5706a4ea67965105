"""Shardings of adapters from those of their base: `in` axes as the base's, `out` axes as the base's, ranks replicated."""

from __future__ import annotations

from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from jlora.method import Site, Start


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
    """The shardings of a method's fields, or None where the base leaf is on no mesh."""
    sharding = named_sharding(leaf)
    if sharding is None:
        return None
    return {name: NamedSharding(sharding.mesh, spec) for name, spec in field_specs(site, sharding.spec).items()}


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

    Every process must call it. Arrays that are whole already stay as they are.
    """

    def one(leaf: jax.Array) -> jax.Array:
        if leaf.is_fully_addressable or leaf.is_fully_replicated or not isinstance(leaf.sharding, NamedSharding):
            return leaf
        return jax.jit(lambda x: x, out_shardings=NamedSharding(leaf.sharding.mesh, PartitionSpec()))(leaf)

    return jax.tree.map(one, tree)
