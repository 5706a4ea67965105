"""Primitives that a weight passes through, one rule each.

A rule is `(walk, eqn, *values) -> outputs`, or None where it does not apply; then the effective weight is formed.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jlora.core.walk import weight as weights
from jlora.core.walk.interpreter import Walk, bind, passes, rule
from jlora.core.walk.weight import Piece, Weight


@passes("sharding_constraint", "copy", "copy_p", "name", "reshard", "pvary")
def same_axes(walk: Walk, eqn: Any, value: Weight) -> list[Any]:
    """The base's array alone takes the constraint or name."""
    return [value.moved(lambda x: bind(eqn, [x])[0])]


@passes("convert_element_type")
def cast(walk: Walk, eqn: Any, value: Weight) -> list[Any] | None:
    """The base's array alone takes a cast to a float of 16 bits or more, so that a small update is not rounded away.

    What rounds harder (8 bits and fewer, integers) changes an update for good, and is done to the weight itself.
    """
    dtype = eqn.outvars[0].aval.dtype
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.dtype(dtype).itemsize < 2:
        return None
    return [value.moved(lambda x: bind(eqn, [x])[0])]


@passes("mul", "div", "neg")
def scale(walk: Walk, eqn: Any, *values: Any) -> list[Any] | None:
    """A number times a weight: what the method adds is multiplied by it too."""
    at = next(n for n, value in enumerate(values) if isinstance(value, Weight))
    value = values[at]
    number = _number(eqn.primitive.name, at, values)
    if number is None or eqn.outvars[0].aval.shape != value.array.shape:
        return None
    factor = number if value.factor is None else value.factor * number
    moved = value.moved(lambda array: bind(eqn, [array if n == at else other for n, other in enumerate(values)])[0])
    if value.code is not None:
        return [replace(moved, factor=factor)]
    return [replace(moved, stored=value.array if value.stored is None else value.stored, factor=factor)]


def _number(primitive: str, at: int, values: tuple[Any, ...]) -> jax.Array | None:
    """What `mul`, `div` or `neg` multiplies the weight in place `at` by; None where that is not one number."""
    if primitive == "neg":
        return jnp.float32(-1)
    other = values[1 - at]
    if isinstance(other, Weight) or jnp.size(other) != 1 or (primitive == "div" and at == 1):
        return None
    # In 32 bits at least, since the method's part is multiplied in its own precision.
    other = jnp.asarray(other, jnp.promote_types(jnp.result_type(other), jnp.float32)).reshape(())
    return 1 / other if primitive == "div" else other


@passes("stop_gradient")
def stop_gradient(walk: Walk, eqn: Any, value: Weight) -> list[Any]:
    """Stops the gradient of the method's arrays too."""
    return [weights.stop(value)]


@rule("optimization_barrier")
def optimization_barrier(walk: Walk, eqn: Any, *values: Any) -> list[Any]:
    """The base arrays pass the barrier together with the other operands."""
    bases = [value.codes or value.array if isinstance(value, Weight) else value for value in values]
    passed = jax.lax.optimization_barrier(bases)
    return [_with_base(value, base) if isinstance(value, Weight) else base for value, base in zip(values, passed)]


def _with_base(value: Weight, base: Any) -> Weight:
    return replace(value, codes=base) if value.code is not None else replace(value, array=base)


@passes("transpose")
def transpose(walk: Walk, eqn: Any, value: Weight) -> list[Any]:
    """Permutes the axes' meanings with the axes."""
    axes = tuple(value.axes[axis] for axis in eqn.params["permutation"])
    return [value.moved(lambda x: bind(eqn, [x])[0], axes=axes)]


@passes("reshape")
def reshape(walk: Walk, eqn: Any, value: Weight, *dynamic: Any) -> list[Any] | None:
    """Merges and splits axes as long as each new one consists of whole pieces, in whatever order the old ones are read."""
    if dynamic:
        return None
    order = eqn.params["dimensions"] or range(value.array.ndim)
    moved = weights.regroup(value, order, tuple(eqn.params["new_sizes"]), lambda x: bind(eqn, [x])[0])
    return None if moved is None else [moved]


@passes("squeeze")
def squeeze(walk: Walk, eqn: Any, value: Weight) -> list[Any]:
    """Drops axes of size 1; a sliced stack axis of size 1 stays with the method's arrays."""
    kept = tuple(group for axis, group in enumerate(value.axes) if axis not in eqn.params["dimensions"])
    return [value.moved(lambda x: bind(eqn, [x])[0], axes=kept)]


@passes("broadcast_in_dim")
def broadcast_in_dim(walk: Walk, eqn: Any, value: Weight, *dynamic: Any) -> list[Any] | None:
    """Inserts axes of size 1; a true repetition needs the weight itself."""
    shape = tuple(eqn.params["shape"])
    if dynamic or math.prod(shape) != value.array.size:
        return None
    axes: list[tuple[Piece, ...]] = [()] * len(shape)
    for group, axis in zip(value.axes, eqn.params["broadcast_dimensions"], strict=True):
        axes[axis] = group
    return [value.moved(lambda x: bind(eqn, [x])[0], axes=tuple(axes))]


@passes("slice")
def slice_(walk: Walk, eqn: Any, value: Weight) -> list[Any] | None:
    """Slices a stack: the method's arrays are sliced with it."""
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    taken: Weight | None = value
    for axis, (first, limit, stride) in enumerate(zip(starts, limits, strides, strict=True)):
        taken = None if taken is None else _take(taken, axis, first, limit, stride)
    return None if taken is None else [taken]


@passes("split")
def split(walk: Walk, eqn: Any, value: Weight) -> list[Any] | None:
    """Cuts a stack into several."""
    ends = list(itertools.accumulate(eqn.params["sizes"]))
    parts = [_take(value, eqn.params["axis"], end - n, end) for n, end in zip(eqn.params["sizes"], ends, strict=True)]
    return None if any(part is None for part in parts) else parts


@passes("unstack")
def unstack(walk: Walk, eqn: Any, value: Weight) -> list[Any] | None:
    """Takes a stack apart, as a loop `for w in stack` does from JAX 0.12 on."""
    axis = eqn.params["axis"]
    parts = []
    for index in range(value.array.shape[axis]):
        part = _take(value, axis, index, index + 1)
        if part is None:
            return None
        axes = (*part.axes[:axis], *part.axes[axis + 1 :])
        parts.append(part.moved(partial(jax.lax.squeeze, dimensions=[axis]), axes=axes))
    return parts


def _take(value: Weight, axis: int, first: int, limit: int, stride: int = 1) -> Weight | None:
    """A part of a stack; None where the axis is no batch axis and the part is not the whole."""
    size = -(-(limit - first) // stride)
    if size == value.array.shape[axis] and size > 1:
        return value
    cut = partial(jax.lax.slice_in_dim, start_index=first, limit_index=limit, stride=stride)
    part = weights.narrow(value, axis, size, partial(cut, axis=axis), lambda x, at: cut(x, axis=at))
    if part is None:
        return value if size == value.array.shape[axis] else None
    return _with_key(part, first)


@passes("dynamic_slice")
def dynamic_slice(walk: Walk, eqn: Any, value: Any, *starts: Any) -> list[Any] | None:
    """Slices a stack at a traced index."""
    if not isinstance(value, Weight):
        return None
    for axis, size in enumerate(eqn.params["slice_sizes"]):
        if size == value.array.shape[axis]:
            continue
        cut = partial(_dynamic_cut, start=starts[axis], size=size)
        moved = weights.narrow(value, axis, size, partial(cut, axis=axis), lambda x, at, cut=cut: cut(x, axis=at))
        if moved is None:
            return None
        value = _with_key(moved, starts[axis])
    return [value]


def _dynamic_cut(x: jax.Array, axis: int, start: Any, size: int) -> jax.Array:
    """A slice along one axis, clamped as the primitive does it.

    The function has counted negative starts from the end already, so one that is still negative becomes 0.
    """
    starts = [start if at == axis else 0 for at in range(x.ndim)]
    sizes = [size if at == axis else n for at, n in enumerate(x.shape)]
    return jax.lax.dynamic_slice(x, starts, sizes, allow_negative_indices=False)


def _with_key(value: Weight, index: Any) -> Weight:
    """Another dropout key for another slice."""
    return value if value.key is None else replace(value, key=jax.random.fold_in(value.key, index))
