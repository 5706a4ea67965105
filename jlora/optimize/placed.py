"""Where an optimizer's state lies on a mesh: beside the trained arrays, or cut over one axis more (ZeRO)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jlora import mesh, paths
from jlora.core.tree import placement
from jlora.core.tree.adapted import Adapted

Places = dict[tuple[str, ...], tuple[tuple[int, ...], NamedSharding]]


def placed(tx: optax.GradientTransformation, adapted: Adapted, zero: str | None = None) -> optax.GradientTransformation:
    """An optimizer whose state, and whose updates, stay where they are from step to step.

    Moments lie beside their trained array, or by `jlora.mesh.moments` with `zero`; everything else of the state lies whole on
    every device. Without it a compiler is free to move what a step returns, and scalars start on one device, so that a step
    is compiled for its second call anew. Where no base leaf is on a mesh, or the trained arrays are on one with explicit
    axes, whose types say it all, this is `tx` itself; a program whose trained arrays are on another mesh is left alone.

    Raises:
        ValueError: with `zero`, where it can't be (see `jlora.mesh.moments`).
    """
    trained = _places(adapted.params, None)
    moments = trained if zero is None else _places(adapted.params, mesh.moments(adapted, zero))
    # What is on a mesh because `jax.set_mesh` was in force, and not beside its base, is not placed yet.
    beside = any(placement.named_sharding(leaf) is not None for leaf in jax.tree.leaves(adapted.base))
    if not trained or not beside or any(AxisType.Explicit in place.mesh.axis_types for _, place in trained.values()):
        return tx
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        state = inner.init(params)
        return _put(state, moments) if _lie_there(params, trained) else state

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        there = _lie_there(updates if params is None else params, trained)
        # The gradients too: else the cut of moments may spread to the activations that they come from.
        updates = _put(updates, trained) if there else updates
        updates, state = inner.update(updates, state, params, **extra)
        return (_put(updates, trained), _put(state, moments)) if there else (updates, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _places(params: Any, shardings: Any) -> Places:
    """Shape and sharding of each trained array that lies on a mesh, by its keys; shardings in place of its own if given."""
    leaves, _ = paths.flatten_with_keys(params)
    own = [getattr(leaf, "sharding", None) for _, leaf in leaves] if shardings is None else jax.tree.leaves(shardings)
    return {
        keys: (leaf.shape, place)
        for (keys, leaf), place in zip(leaves, own, strict=True)
        if not isinstance(leaf, Tracer) and isinstance(place, NamedSharding) and place.mesh.size > 1
    }


def _lie_there(params: Any, places: Places) -> bool:
    """Whether trained arrays, or traced ones, are on the mesh of the places, and not inside of a `shard_map` over it."""
    known = next(iter(places.values()))[1].mesh.abstract_mesh
    found = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(params)]
    return any(each.shape == known.shape and each.axis_types == known.axis_types for each in found if not each.empty)


def _put(tree: Any, places: Places) -> Any:
    """A tree with each array where the trained one lies that its keys end with, and all others on every device.

    What has another shape than its trained array, such as Adafactor's sums over rows, is one of the others.
    """
    everywhere = NamedSharding(next(iter(places.values()))[1].mesh, PartitionSpec())
    leaves, treedef = paths.flatten_with_keys(tree)

    def one(keys: tuple[str, ...], leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return leaf
        ends = (keys[n:] for n in range(len(keys)))
        shape, own = next((places[end] for end in ends if end in places), (None, everywhere))
        place = own if leaf.shape == shape else everywhere
        return (
            jax.lax.with_sharding_constraint(leaf, place) if isinstance(leaf, Tracer) else jax.device_put(leaf, place)
        )

    return jax.tree.unflatten(treedef, [one(keys, leaf) for keys, leaf in leaves])
