"""Lookups (`gather`): rows of a weight by its own update, matrices out of a stack, and what is beyond the last row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import GatherDimensionNumbers, GatherScatterMode

from jlora.core.walk import weight as weights
from jlora.core.walk.folding import arrange, big, regroup, side_of, single_matrix, sized
from jlora.core.walk.interpreter import Walk, bind, rule
from jlora.core.walk.weight import Piece, Weight

#: Ways to treat an index beyond the last row that are known here.
MODES = (GatherScatterMode.FILL_OR_DROP, GatherScatterMode.CLIP, GatherScatterMode.PROMISE_IN_BOUNDS)


@dataclass(frozen=True)
class Lookup:
    """What a `gather` takes out of its operand: one entry of some axes, all of the others.

    Attributes:
        axes: the axes that it indexes.
        columns: for each of them, where its index is along the last axis of the indices.
        paired: pairs (axis of the operand, axis of the indices) that run together, as `vmap` over both makes them.
    """

    axes: tuple[int, ...]
    columns: tuple[int, ...]
    paired: tuple[tuple[int, int], ...] = ()

    def indices(self, indices: jax.Array) -> jax.Array:
        """The indices of the indexed axes alone."""
        return indices if len(self.columns) == indices.shape[-1] else indices[..., list(self.columns)]


def lookup_of(eqn: Any) -> Lookup | None:
    """The `Lookup` that a `gather` is; None where it takes more than one entry and less than all of an axis.

    A slice at an index that `vmap` made many is a `gather` too. It has indices for axes that it takes whole, which are clamped
    to 0, and keeps the axes that it indexes, with size 1.
    """
    numbers, sizes, shape = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], eqn.invars[0].aval.shape
    mapped, collapsed = tuple(map(int, numbers.start_index_map)), numbers.collapsed_slice_dims
    axes = tuple(axis for axis in mapped if axis in collapsed or sizes[axis] < shape[axis]) or mapped[:1]
    paired = tuple(zip(map(int, numbers.operand_batching_dims), map(int, numbers.start_indices_batching_dims)))
    single = {*axes, *(axis for axis, _ in paired)}
    clamped = eqn.params["mode"] in (GatherScatterMode.CLIP, GatherScatterMode.PROMISE_IN_BOUNDS)
    if any(n != (1 if axis in single else shape[axis]) for axis, n in enumerate(sizes)) or not set(collapsed) <= single:
        return None
    return Lookup(axes, tuple(map(mapped.index, axes)), paired) if axes == mapped or clamped else None


def interleaved(eqn: Any, found: Lookup, positions: Sequence[Any], groups: Sequence[Any]) -> list[Any]:
    """What the axes of a gather's result are: those of its indices and those of its operand, each in their order.

    Args:
        eqn: the equation.
        found: what it looks up.
        positions: what the axes of the indices are.
        groups: what the axes of the operand are.
    """
    numbers = eqn.params["dimension_numbers"]
    offset, ndim = numbers.offset_dims, eqn.outvars[0].aval.ndim
    gone = {*numbers.collapsed_slice_dims, *(axis for axis, _ in found.paired)}
    kept = [() if axis in found.axes else group for axis, group in enumerate(groups) if axis not in gone]
    places, rest = iter(positions), iter(kept)
    return [next(rest) if d in offset else next(places) for d in range(ndim)]


def rows(eqn: Any, table: jax.Array, indices: jax.Array) -> jax.Array:
    """`table[indices]` with the equation's treatment of indices out of bounds, save that what it fills is zero."""
    return along(eqn, table, indices, (0,))


def along(
    eqn: Any, array: jax.Array, indices: jax.Array, axes: tuple[int, ...], paired: Sequence[tuple[int, int]] = ()
) -> jax.Array:
    """An array indexed along some axes as the equation does; the axes of the indices come first."""
    positions, gone = indices.ndim - 1, {*axes, *(axis for axis, _ in paired)}
    numbers = GatherDimensionNumbers(
        offset_dims=tuple(range(positions, positions + array.ndim - len(gone))),
        collapsed_slice_dims=tuple(sorted(axes)),
        start_index_map=axes,
        operand_batching_dims=tuple(axis for axis, _ in paired),
        start_indices_batching_dims=tuple(position for _, position in paired),
    )
    sizes = [1 if axis in gone else size for axis, size in enumerate(array.shape)]
    # A method's integers are positions: what is filled in must be none of them.
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
        # A NaN that was filled in must not reach a product: it would be in the gradient, however the result is masked.
        return jnp.where(inside, adapted(jnp.where(inside, base, jnp.zeros_like(base))), base)
    found = adapted(base)
    return jnp.where(inside, found, jax.lax.stop_gradient(found))


def selected(eqn: Any, weight: Weight) -> list[Piece] | None:
    """The batch pieces of a stack that a lookup indexes.

    None where an axis is not one batch axis, or where an index beyond the stack gives a number, as a `fill_value` does: the
    method's part would be added to it.
    """
    found = lookup_of(eqn)
    if found is None or eqn.params["mode"] not in MODES or not _fills_nan(eqn):
        return None
    if any(weights.single_batch_piece(weight, axis) is None for axis, _ in found.paired):
        return None
    pieces = [piece for axis in found.axes if (piece := weights.single_batch_piece(weight, axis)) is not None]
    return pieces if len(pieces) == len(found.axes) > 0 else None


def select(eqn: Any, weight: Weight, indices: jax.Array) -> Weight | None:
    """The matrices that indices take out of a stack, each with the method's arrays for it; None where it is no stack."""
    found, pieces = lookup_of(eqn), selected(eqn, weight)
    if found is None or pieces is None:
        return None
    chosen = found.indices(indices)
    pairs = {position: weights.single_batch_piece(weight, axis) for axis, position in found.paired}
    new = [pairs.get(n) or Piece((*pieces[0].order, 2, n), size) for n, size in enumerate(indices.shape[:-1])]
    at = tuple(weight.batch.index(piece) for piece in pieces)
    paired = [(weight.batch.index(piece), position) for position, piece in pairs.items() if piece is not None]
    changed = weight.on_fields(lambda x: along(eqn, x, chosen, at, paired))
    batch = (*new, *(piece for piece in weight.batch if piece not in pieces and piece not in new))
    groups = interleaved(eqn, found, [(piece,) for piece in new], weight.axes)
    moved = changed.moved(lambda x: bind(eqn, [x, indices])[0], axes=tuple(groups), batch=batch)
    if weight.key is None or new:  # several matrices drop on their own wherever they are used
        return moved
    key = weight.key
    for n in range(len(at)):
        key = jax.random.fold_in(key, chosen[n])
    return replace(moved, key=key)


def _fills_nan(eqn: Any) -> bool:
    """Whether an index beyond the stack gives NaN, as it does by default: that stays NaN, whatever is added to it."""
    fill = eqn.params["fill_value"]
    return eqn.params["mode"] != GatherScatterMode.FILL_OR_DROP or fill is None or math.isnan(fill)


@rule("gather")
def gather(walk: Walk, eqn: Any, weight: Any, indices: Any) -> list[Any] | None:
    """Matrices out of a stack, which go on as a stack, or the rows of an embedding."""
    if not isinstance(weight, Weight) or isinstance(indices, Weight):
        return None
    matrices = select(eqn, weight, indices)
    if matrices is not None:
        return [matrices]
    found = lookup_of(eqn)
    if found is None or len(found.axes) != 1 or found.paired or eqn.params["mode"] not in MODES:
        return None
    side = side_of(weight, found.axes, ())
    if side is None or not weight.owns("lookup") or big(weight.batch):
        return None
    if weight.code is not None:
        raise ValueError(
            f"{weight.name}: rows of it are looked up, for which {weight.code} would decode the whole matrix; leave "
            "embeddings out of jlora.quantize, as jlora.ALL_LINEAR does"
        )
    walk.seen.add(weight.name)
    return [_looked_up(eqn, weight, indices, side, found)]


def _looked_up(eqn: Any, weight: Weight, indices: jax.Array, side: str, found: Lookup) -> jax.Array:
    """Rows or columns of a weight by its update, in the axis order that the function wants. Dropout does not act on them.

    Where the update has rows beyond the weight's last, ids beyond it read those.
    """
    base = bind(eqn, [weight.array, indices])[0]
    indices = found.indices(indices)
    w, update = single_matrix(weight)
    positions = [("x", n) for n in range(indices.ndim - 1)]
    remaining = weight.with_role("out" if side == "in" else "in")
    order = interleaved(eqn, found, [(label,) for label in positions], weight.axes)

    def folded(base: jax.Array) -> jax.Array:
        have = [group if group[:1] and group[0] in positions else sized(group) for group in order]
        want = [*((label,) for label in positions), sized(remaining)]
        return regroup(base, have, want, dict(zip(positions, indices.shape)))

    def unfolded(y: jax.Array) -> jax.Array:
        y = y.reshape(*y.shape[:-1], *(piece.size for piece in remaining))
        return arrange(y, [*positions, *remaining], order, base.shape)

    def adapted(base: jax.Array) -> jax.Array:
        return unfolded(update.lookup(folded(base), w, lambda table: rows(eqn, table, indices), side))

    size, extra = weight.array.shape[found.axes[0]], update.beyond()
    inside = in_bounds(eqn, indices, size, base, adapted)
    if extra is None:
        return inside
    number = indices[..., 0] - size
    is_extra = (number >= 0) & (number < extra.shape[0])
    drawn = unfolded(extra.astype(base.dtype)[jnp.clip(number, 0, extra.shape[0] - 1)])
    mask = jnp.broadcast_to(is_extra[..., None], (*is_extra.shape, extra.shape[1]))
    return jnp.where(unfolded(mask), drawn, inside)
