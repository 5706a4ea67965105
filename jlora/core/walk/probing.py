"""Follows a leaf from the params to its products, to find the roles of its axes (see `jlora.sites`).

A lift gives up on a weight that is masked, joined with others or permuted, and forms it. The roles of its axes can still be
found. So here a leaf is followed through every operation that keeps its axes apart; where several leaves are joined, each is
followed by itself. A function returns None where the leaf can't be followed further.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax

from jlora.core.protocol.readings import Reading
from jlora.core.walk import lookup
from jlora.core.walk import weight as weights
from jlora.core.walk.interpreter import Walk, bind, probes
from jlora.core.walk.weight import Axes, Piece, Weight

_UNARY = (
    "abs cbrt ceil cos erf exp exp2 expm1 floor imag integer_pow is_finite log log1p logistic neg not real round rsqrt sign "
    "sin sqrt square tan tanh reduce_precision convert_element_type rev clamp cumsum cumprod cummax stop_gradient"
)
_SEVERAL = "add add_any sub mul div rem max min pow atan2 select_n and or xor nextafter"


@probes(*_UNARY.split(), *_SEVERAL.split())
def elementwise(walk: Walk, eqn: Any, *values: Any) -> list[Any] | None:
    """Masks, scales, rounding: the axes stay, unless data is mixed in, which makes it an activation."""
    at, value = _probe(values)
    # One weight or another is a weight, even if data chooses.
    chosen = eqn.primitive.name == "select_n" and all(walk.origins.of(atom).leaves for atom in eqn.invars[1:])
    mixed = _mixed(walk, eqn, at) and not chosen
    if mixed and walk.origins.of_leaves_alone and eqn.primitive.name in ("mul", "div", "select_n"):
        # Nothing tells whether the other operand is a mask or an activation. A matrix is rarely multiplied with an activation
        # entry by entry, so it counts as masked.
        walk.origins.entered |= {value.name} if _is_matrix(value) else set()
    if eqn.outvars[0].aval.shape != value.array.shape or mixed:
        return None
    return [replace(value, array=_plain(eqn, values)[0])]


@probes("stack")
def stack(walk: Walk, eqn: Any, *values: Any) -> list[Any] | None:
    """Joins a leaf with others along a new axis."""
    at, value = _probe(values)
    if _mixed(walk, eqn, at):
        return None
    array, axis = _plain(eqn, values)[0], eqn.params["axis"]
    axes = (*value.axes[:axis], _foreign(axis, array.shape[axis]), *value.axes[axis:])
    return [replace(value, array=array, axes=axes)]


@probes("concatenate")
def concatenate(walk: Walk, eqn: Any, *values: Any) -> list[Any] | None:
    """Joins a leaf with others along an axis; joined with data it is an activation, such as a prefix of tokens."""
    at, value = _probe(values)
    return None if _mixed(walk, eqn, at) else _resized(value, _plain(eqn, values)[0], {eqn.params["dimension"]})


@probes("pad")
def pad(walk: Walk, eqn: Any, *values: Any) -> list[Any] | None:
    """Puts entries around those of a leaf."""
    at, value = _probe(values)
    padded = {axis for axis, amounts in enumerate(eqn.params["padding_config"]) if any(amounts)}
    return _resized(value, _plain(eqn, values)[0], padded) if at == 0 else None


@probes("slice", "dynamic_slice")
def slice_(walk: Walk, eqn: Any, *values: Any) -> list[Any] | None:
    """A part of a leaf, along any of its axes. One entry, at a place that data gives, is a lookup: see `gather`."""
    at, value = _probe(values)
    array = _plain(eqn, values)[0]
    cut = {axis for axis, size in enumerate(value.array.shape) if array.shape[axis] != size}
    parts = _resized(value, array, cut) if at == 0 else None
    if not parts or not any(walk.origins.of(atom).data for atom in eqn.invars[1:]):
        return parts
    axes = tuple(axis for axis in cut if array.shape[axis] == 1)
    reading = _table(value, lookup.Lookup(axes, ()))
    if axes != tuple(cut) or not reading.has_roles:
        return parts
    walk.note(reading)
    return [replace(parts[0], lookups=(*value.lookups, reading))]


@probes("split")
def split(walk: Walk, eqn: Any, value: Weight) -> list[Any] | None:
    """The parts into which a leaf is split along one axis, each followed by itself."""
    parts = [_resized(value, array, {eqn.params["axis"]}) for array in _plain(eqn, [value])]
    return None if any(part is None for part in parts) else [part[0] for part in parts if part]


@probes("broadcast_in_dim")
def broadcast_in_dim(walk: Walk, eqn: Any, value: Weight, *dynamic: Any) -> list[Any] | None:
    """New axes, along which the leaf may be repeated."""
    array = _plain(eqn, [value, *dynamic])[0]
    axes = [_foreign(axis, size) for axis, size in enumerate(array.shape)]
    for axis, group in zip(eqn.params["broadcast_dimensions"], value.axes, strict=True):
        axes[axis] = group if weights.shape_of((group,)) == (array.shape[axis],) else axes[axis]
    return [replace(value, array=array, axes=tuple(axes))]


@probes("gather")
def gather(walk: Walk, eqn: Any, *values: Any) -> list[Any] | None:
    """Rows of a table, matrices of a stack, or a permutation; the later use of the result tells which: see `product`."""
    at, value = _probe(values)
    found = lookup.lookup_of(eqn)
    if at != 0 or found is None:
        return None
    reading = _table(value, found)
    walk.note(reading)
    array = _plain(eqn, values)[0]
    positions = [_foreign(n, size) for n, size in enumerate(eqn.invars[1].aval.shape[:-1])]
    for axis, position in found.paired:
        positions[position] = value.axes[axis]
    indexed = [piece for axis in found.axes for piece in value.axes[axis]]
    if len(positions) == len(indexed) == 1 and not walk.origins.is_data(eqn.invars[1]):
        positions = [(Piece(indexed[0].order, positions[0][0].size),)]
    groups = lookup.interleaved(eqn, found, positions, value.axes)
    return [replace(value, array=array, axes=tuple(groups), lookups=(*value.lookups, reading))]


def _table(value: Weight, found: lookup.Lookup) -> Reading:
    """The reading of a lookup in a table; without roles where it indexes several axes, or leaves no other axis."""
    indexed = _leaf_axes(value, found.axes)
    paired = _leaf_axes(value, (axis for axis, _ in found.paired))
    others = _leaf_axes(value, set(range(value.array.ndim)) - {*found.axes, *(axis for axis, _ in found.paired)})
    if len(found.axes) > 1 or not indexed or not others:
        return Reading(value.name, "gather")
    return _reading(value, "gather", indexed, others, _hidden(value) | paired)


@probes("reduce_sum", "reduce_max", "reduce_min")
def reduce_(walk: Walk, eqn: Any, value: Weight) -> list[Any] | None:
    """Sums over matrices that were taken out of a stack, or repeated."""
    gone = eqn.params["axes"]
    if any(piece.axis >= 0 and piece.size > 1 for axis in gone for piece in value.axes[axis]):
        return None
    kept = tuple(group for axis, group in enumerate(value.axes) if axis not in gone)
    return [replace(value, array=_plain(eqn, [value])[0], axes=kept)]


@probes("dot_general")
def dot_general(walk: Walk, eqn: Any, *values: Any) -> list[Any]:
    """A matrix product or einsum: see `product`."""
    at, _ = _probe(values)
    contract, batch = (pair[at] for pair in eqn.params["dimension_numbers"])
    return product(walk, eqn, values, contract, batch)


@probes("ragged_dot_general")
def ragged_dot(walk: Walk, eqn: Any, *values: Any) -> list[Any] | None:
    """Rows of an activation in groups, each with the matrix of its expert."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    at, _ = _probe(values)
    if at != 1 or not numbers.rhs_group_dimensions:
        return None
    (_, contract), (_, batch) = numbers.dot_dimension_numbers
    return product(walk, eqn, values, contract, (*batch, *numbers.rhs_group_dimensions))


@probes("conv_general_dilated")
def convolution(walk: Walk, eqn: Any, *values: Any) -> list[Any] | None:
    """A convolution: all of the kernel's axes but its output features are contracted."""
    at, value = _probe(values)
    out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
    if at != 1 or eqn.params["batch_group_count"] != 1:
        return None
    taps = tuple(axis for axis in range(value.array.ndim) if axis != out_axis)
    return product(walk, eqn, values, taps, (), grouped=eqn.params["feature_group_count"] > 1)


def product(walk: Walk, eqn: Any, values: Any, contract: Any, batch: Any, grouped: bool = False) -> list[Any]:
    """Notes how a leaf is contracted; what comes out is an activation.

    What was looked up is a weight if an activation contracts one of its axes and another one is left: experts by `w[index]`,
    layers by `take(stack, layer)`, permuted columns. Else it is rows of a table, as was noted at the lookup.

    Args:
        walk: takes the note.
        eqn: the product.
        values: its operands, one of them the leaf.
        contract: the leaf's contracted axes, as axes of the operand.
        batch: likewise its batch axes.
        grouped: whether it is a convolution in feature groups.
    """
    at, value = _probe(values)
    contracted, batched = (_leaf_axes(value, axes) for axes in (contract, batch))
    free = _leaf_axes(value, set(range(value.array.ndim)) - {*contract, *batch})
    hidden = _hidden(value)
    if value.lookups:
        by_position = any(piece.axis < 0 for axis in contract for piece in value.axes[axis])
        if by_position or not (contracted and free and walk.origins.is_data(eqn.invars[1 - at])):
            return _plain(eqn, values)
        for reading in value.lookups:
            walk.forget(reading)
    elif not free:  # the out axis has size 1 and was squeezed away
        free, hidden = {axis for axis in hidden if value.leaf_shape[axis] == 1}, set()
    walk.note(_reading(value, eqn.primitive.name, contracted, free, batched | hidden, grouped))
    return _plain(eqn, values)


def _reading(
    value: Weight, primitive: str, ins: set[int], outs: set[int], stacked: set[int], grouped: bool = False
) -> Reading:
    """A reading with the roles of the leaf's axes; without them where parts of one axis have different roles."""
    if ins & outs or (ins | outs) & stacked:
        return Reading(value.name, primitive, grouped=grouped)
    return Reading(value.name, primitive, *(tuple(sorted(axes)) for axes in (ins, outs, stacked)), grouped=grouped)


def _probe(values: Any) -> tuple[int, Weight]:
    """The one leaf among an equation's operands, and its place."""
    return next((n, value) for n, value in enumerate(values) if isinstance(value, Weight))


def _mixed(walk: Walk, eqn: Any, at: int) -> bool:
    """Whether data is in another operand than the one in place `at`."""
    return any(walk.origins.is_data(atom) for n, atom in enumerate(eqn.invars) if n != at)


def _plain(eqn: Any, values: Any) -> list[jax.Array]:
    return bind(eqn, [value.array if isinstance(value, Weight) else value for value in values])


def _leaf_axes(value: Weight, axes: Any) -> set[int]:
    return {piece.axis for axis in axes for piece in value.axes[axis] if piece.axis >= 0}


def _hidden(value: Weight) -> set[int]:
    """The leaf's axes that the array no longer has, since one entry along them was taken."""
    return set(range(len(value.leaf_shape))) - _leaf_axes(value, range(value.array.ndim))


def _is_matrix(value: Weight) -> bool:
    """Whether at least two of the array's axes come from the leaf, and none from elsewhere; sizes of 1 don't count."""
    own = [piece.axis >= 0 for group in value.axes for piece in group if piece.size > 1]
    return len(own) > 1 and all(own)


def _foreign(number: int, size: int) -> tuple[Piece, ...]:
    """An axis that does not come from the leaf; `number` tells it from other such axes."""
    return (Piece((-1, number), size),)


def _resized(value: Weight, array: jax.Array, changed: set[int]) -> list[Any] | None:
    """The leaf as `array`, with other sizes along `changed` axes; None where one of these joins several axes of the leaf."""
    axes: list[Any] = list(value.axes)
    for axis in changed:
        group = [piece for piece in axes[axis] if piece.size > 1] or list(axes[axis])
        if len(group) != 1:
            return None
        axes[axis] = (Piece(group[0].order, array.shape[axis]),)
    found: Axes = tuple(axes)
    return [replace(value, array=array, axes=found)]
