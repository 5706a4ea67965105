"""Collectives inside `shard_map` that bring parts of a weight from device to device: the method's arrays go beside it.

A rule is `(walk, eqn, *values) -> outputs`, or None where it does not apply; then the effective weight is formed.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from jlora.core.walk import weight as weights
from jlora.core.walk.interpreter import Walk, bind, passes
from jlora.core.walk.weight import Blank, Piece, Weight


@passes("all_gather")
def all_gather(walk: Walk, eqn: Any, value: Weight) -> list[Any] | None:
    """Gathers the shards of an axis, where they are cut by the same mesh axes: what has that axis is gathered likewise.

    The base's array has no gradient, so none of its size is scattered; the gradients of the method's arrays are.
    """
    at, names = eqn.params["all_gather_dimension"], _names(eqn)
    if not eqn.params["tiled"] or eqn.params["axis_index_groups"] is not None or value.factor is not None:
        return None
    piece = _cut_piece(value, at, names)
    if piece is None:
        return None
    gather = partial(jax.lax.all_gather, axis_name=names, tiled=True)
    if not value.whole:
        value = weights.along(value, piece, lambda field, axis: gather(field, axis=axis))
    grown = Piece(piece.order, piece.size * eqn.params["axis_size"])
    left = {**dict(value.cuts), piece.order: dict(value.cuts)[piece.order][: -len(names)]}
    value = weights.resized(replace(value, cuts=tuple(left.items())), {piece: grown})
    if isinstance(value.array, Blank):
        return [replace(value, array=Blank(weights.shape_of(value.axes), value.array.dtype))]
    return [value.moved(lambda array: bind(eqn, [array])[0])]


@passes("ppermute")
def ppermute(walk: Walk, eqn: Any, value: Weight) -> list[Any] | None:
    """Passes the shards round, where every device gets one; what every device has whole stays."""
    names = _names(eqn)
    count = math.prod(jax.lax.axis_size(name) for name in names)
    everyone = list(range(count))
    if any(sorted(side) != everyone for side in zip(*eqn.params["perm"])) or value.factor is not None:
        return None
    send = partial(jax.lax.ppermute, axis_name=names, perm=eqn.params["perm"])
    cut = {order for order, by in value.cuts if set(by) & set(names)}
    for piece in {piece for group in value.axes for piece in group if piece.order in cut}:
        cut.discard(piece.order)
        value = weights.along(value, piece, lambda field, axis: send(field))
    if cut or isinstance(value.array, Blank):
        return None if cut else [value]
    return [value.moved(lambda array: bind(eqn, [array])[0])]


def _names(eqn: Any) -> tuple[Any, ...]:
    names = eqn.params["axis_name"]
    return names if isinstance(names, tuple) else (names,)


def _cut_piece(value: Weight, at: int, names: tuple[Any, ...]) -> Piece | None:
    """The outermost piece of an axis, where the innermost of the mesh axes that cut it are these."""
    for piece in value.axes[at]:
        if dict(value.cuts).get(piece.order, ())[-len(names) :] == names:
            return piece
        if piece.size > 1:
            return None
    return None


def gathered_first(jaxpr: Any, var: Any, cut: dict[int, tuple[Any, ...]]) -> bool:
    """Whether a variable of a program is gathered along all its cut axes before anything but a cast is done with it."""
    if not cut:
        return True
    users = [eqn for eqn in jaxpr.eqns if var in [atom for atom in eqn.invars if not hasattr(atom, "val")]]
    return bool(users) and var not in jaxpr.outvars and all(_undoes(jaxpr, eqn, cut) for eqn in users)


def _undoes(jaxpr: Any, eqn: Any, cut: dict[int, tuple[Any, ...]]) -> bool:
    """Whether an equation gathers along one of the cut axes, or casts, and the rest is gathered after it."""
    if eqn.primitive.name == "convert_element_type":
        return gathered_first(jaxpr, eqn.outvars[0], cut)
    if eqn.primitive.name != "all_gather" or not eqn.params["tiled"] or eqn.params["axis_index_groups"] is not None:
        return False
    at = eqn.params["all_gather_dimension"]
    left = {axis: names for axis, names in cut.items() if axis != at}
    return cut.get(at) == _names(eqn) and gathered_first(jaxpr, eqn.outvars[0], left)
