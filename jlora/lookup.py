"""Lookups (`gather`): which axes they index, what they do beyond the last row, and matrices taken out of a stack."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import GatherDimensionNumbers, GatherScatterMode

from jlora import weight as weights
from jlora.walk import bind
from jlora.weight import Piece, Weight

#: Ways to treat an index beyond the last row that are known here.
MODES = (GatherScatterMode.FILL_OR_DROP, GatherScatterMode.CLIP, GatherScatterMode.PROMISE_IN_BOUNDS)


def indexed_axes(eqn: Any) -> tuple[int, ...] | None:
    """The axes that a `gather` indexes, in the order of its indices; None where it takes more than whole slices of them."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    axes = tuple(numbers.start_index_map)
    whole = all(n == (1 if d in axes else size) for d, (n, size) in enumerate(zip(sizes, eqn.invars[0].aval.shape)))
    if numbers.operand_batching_dims or tuple(numbers.collapsed_slice_dims) != tuple(sorted(axes)) or not whole:
        return None
    return axes


def interleaved(eqn: Any, ndim: int, positions: Sequence[Any], kept: Sequence[Any]) -> list[Any]:
    """What the axes of a gather's result are: those of its indices and those of its operand, each in their order."""
    offset = eqn.params["dimension_numbers"].offset_dims
    places, rest = iter(positions), iter(kept)
    return [next(rest) if d in offset else next(places) for d in range(ndim)]


def rows(eqn: Any, table: jax.Array, indices: jax.Array) -> jax.Array:
    """`table[indices]` with the equation's treatment of indices out of bounds, save that what it fills is zero."""
    return along(eqn, table, indices, (0,))


def along(eqn: Any, array: jax.Array, indices: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """An array indexed along some axes as the equation does; the axes of the indices come first."""
    positions = indices.ndim - 1
    numbers = GatherDimensionNumbers(
        offset_dims=tuple(range(positions, positions + array.ndim - len(axes))),
        collapsed_slice_dims=tuple(sorted(axes)),
        start_index_map=axes,
    )
    sizes = [1 if axis in axes else size for axis, size in enumerate(array.shape)]
    # An integer that is filled in is the number of no matrix and of no entry.
    empty = 0 if jnp.issubdtype(array.dtype, jnp.inexact) else jnp.iinfo(array.dtype).max
    fill = empty if eqn.params["mode"] == GatherScatterMode.FILL_OR_DROP else None
    return jax.lax.gather(array, indices, numbers, sizes, mode=eqn.params["mode"], fill_value=fill)


def in_bounds(
    eqn: Any, indices: jax.Array, size: int, base: jax.Array, adapted: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """`adapted(base)` for a lookup along one axis, with what the lookup does with indices that are none of its rows.

    Filled entries are the function's own, and no gradient comes from them. Where an index is promised to be in bounds and is
    not, the program reads the nearest row and drops its gradient.
    """
    mode = eqn.params["mode"]
    if mode == GatherScatterMode.CLIP:
        return adapted(base)
    inside = (indices[..., 0] >= 0) & (indices[..., 0] < size)
    offset = eqn.params["dimension_numbers"].offset_dims
    inside = inside.reshape([1 if d in offset else n for d, n in enumerate(base.shape)])
    if mode == GatherScatterMode.FILL_OR_DROP:
        # A NaN that was filled in may not reach a product, whose gradient it would be in however it is masked later.
        return jnp.where(inside, adapted(jnp.where(inside, base, jnp.zeros_like(base))), base)
    found = adapted(base)
    return jnp.where(inside, found, jax.lax.stop_gradient(found))


def selected(eqn: Any, weight: Weight) -> list[Piece] | None:
    """The batch pieces of a stack that a lookup indexes.

    None where an axis is not one batch axis, or where what is filled in is no matrix that the method could have made.
    """
    axes = indexed_axes(eqn)
    if axes is None or eqn.params["mode"] not in MODES or not _fills_nan(eqn):
        return None
    pieces = [piece for axis in axes if (piece := weights.single_batch_piece(weight, axis)) is not None]
    return pieces if len(pieces) == len(axes) > 0 else None


def select(eqn: Any, weight: Weight, indices: jax.Array) -> Weight | None:
    """The matrices that indices take out of a stack, each with the method's arrays for it; None where it is no stack."""
    axes, pieces = indexed_axes(eqn), selected(eqn, weight)
    if axes is None or pieces is None:
        return None
    new = [Piece((*pieces[0].order, 2, n), size) for n, size in enumerate(indices.shape[:-1])]
    at = tuple(weight.batch.index(piece) for piece in pieces)
    kept = [group for axis, group in enumerate(weight.axes) if axis not in axes]
    changed = weight.on_fields(lambda x: along(eqn, x, indices, at))
    batch = (*new, *(piece for n, piece in enumerate(weight.batch) if n not in at))
    groups = interleaved(eqn, len(new) + len(kept), [(piece,) for piece in new], kept)
    moved = changed.moved(lambda x: bind(eqn, [x, indices])[0], axes=tuple(groups), batch=batch)
    if weight.key is None or new:  # several matrices drop on their own wherever they are used
        return moved
    key = weight.key
    for n in range(len(axes)):
        key = jax.random.fold_in(key, indices[n])
    return replace(moved, key=key)


def _fills_nan(eqn: Any) -> bool:
    """Whether an index beyond the stack gives NaN, as it does by default, whatever is added to it."""
    fill = eqn.params["fill_value"]
    return eqn.params["mode"] != GatherScatterMode.FILL_OR_DROP or fill is None or math.isnan(fill)
