"""Convolutions with a weight, computed by its own update where that has such a use."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jlora.core.products.contraction import Options, matmul
from jlora.core.products.update import Linear
from jlora.core.walk import taps
from jlora.core.walk import weight as weights
from jlora.core.walk.folding import big, is_float, regroup, side_of, single_matrix, sized
from jlora.core.walk.interpreter import Walk, bind, rule
from jlora.core.walk.weight import Axes, Piece, Weight


@rule("conv_general_dilated")
def convolution(walk: Walk, eqn: Any, x: Any, weight: Any) -> list[Any] | None:
    """A convolution that contracts all in-axes of a weight, in feature groups too."""
    numbers = eqn.params["dimension_numbers"]
    if not isinstance(weight, Weight) or eqn.params["batch_group_count"] != 1:
        return None
    x = walk.materialise(x, eqn)
    out_axis = numbers.rhs_spec[0]
    taps = tuple(axis for axis in range(x.ndim) if axis != out_axis)
    if side_of(weight, taps, ()) != "in" or not is_float(x) or big(weight.batch):
        return None
    if weight.acts_alone and eqn.params["feature_group_count"] == 1:
        walk.seen.add(weight.name)
        return [_by_patches(walk, eqn, x, weight)]
    if not weight.owns("convolve"):
        return None
    walk.seen.add(weight.name)
    return [_convolve(walk, eqn, x, weight)]


def _by_patches(walk: Walk, eqn: Any, x: jax.Array, weight: Weight) -> jax.Array:
    """A convolution as the product of its patches with the matrix, for what has to see its input so."""
    w, update = single_matrix(weight)
    options = Options(eqn.outvars[0].aval.dtype, eqn.params["precision"])
    args = (patches(eqn, x, weight), w, walk.next_key(weight.key, x), options)
    if taps.listens(walk, weight):
        y, said = update.spoken(*args)
        taps.hear(walk, weight, said, stacked=False)
    else:
        y = update.dense(*args)
    return jnp.moveaxis(y, -1, eqn.params["dimension_numbers"].out_spec[1])


def _convolve(walk: Walk, eqn: Any, x: jax.Array, weight: Weight) -> jax.Array:
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    out_axis, feature = numbers.rhs_spec[0], numbers.out_spec[1]
    precision = eqn.params["precision"]
    w, update = single_matrix(weight)

    def base(x: jax.Array, dtype: Any) -> jax.Array:
        return bind(eqn, [x, weights.base(weight)], preferred_element_type=jnp.dtype(dtype))[0]

    def product(x: jax.Array, m: jax.Array, dtype: Any) -> jax.Array:
        return bind(eqn, [x, _kernel(weight, m, out_axis, groups)], preferred_element_type=jnp.dtype(dtype))[0]

    def mix(y: jax.Array, m: jax.Array, dtype: Any) -> jax.Array:
        y = jnp.moveaxis(y, feature, -1)
        if groups == 1:
            return jnp.moveaxis(matmul(y, m, dtype, precision), -1, feature)
        y = y.reshape(*y.shape[:-1], groups, m.shape[0])
        m = m.reshape(m.shape[0], groups, m.shape[1] // groups)  # whose rank may be 0
        mixed = jnp.einsum("...gr,rgo->...go", y, m, precision=precision, preferred_element_type=dtype)
        return jnp.moveaxis(mixed.reshape(*mixed.shape[:-2], -1), -1, feature)

    def rescale(y: jax.Array, scale: jax.Array) -> jax.Array:
        return y * jnp.expand_dims(scale, [axis for axis in range(y.ndim) if axis != feature])

    def rescale_rows(y: jax.Array, scale: jax.Array) -> jax.Array:
        batch = numbers.out_spec[0]
        scale = jnp.tile(scale, y.shape[feature] // max(scale.shape[1], 1))
        scale = scale if batch < feature else scale.T
        return y * jnp.expand_dims(scale, [axis for axis in range(y.ndim) if axis not in (batch, feature)])

    rows = x.shape[numbers.lhs_spec[0]]
    linear = Linear(base, product, mix, rescale, eqn.outvars[0].aval.dtype, rows, rescale_rows)
    return update.convolve(x, w, walk.next_key(weight.key, x), linear)


def _kernel(weight: Weight, m: jax.Array, out_axis: int, groups: int) -> jax.Array:
    """`m [in, k]` as a convolution kernel with `groups * k` output features."""
    width = Piece((-1,), m.shape[1])
    have: Axes = (tuple(weight.with_role("in")), (width,))
    want = tuple((width,) if axis == out_axis else group for axis, group in enumerate(weight.axes))
    kernel = weights.rearrange(m, have, want)
    return jnp.concatenate([kernel] * groups, axis=out_axis) if groups > 1 else kernel


def patches(eqn: Any, x: jax.Array, weight: Weight) -> jax.Array:
    """What a convolution multiplies its weight with, `[*positions, in]` with `in` folded as in the weight's matrix.

    Raises:
        ValueError: for feature groups, where no one matrix multiplies the input.
    """
    numbers = eqn.params["dimension_numbers"]
    if eqn.params["feature_group_count"] != 1 or eqn.params["batch_group_count"] != 1:
        raise ValueError("its groups of features multiply different inputs")
    _, features, *spatial = numbers.rhs_spec
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision")
    window = [weight.array.shape[axis] for axis in spatial]
    cut = jax.lax.conv_general_dilated_patches(
        x, window, **{name: eqn.params[name] for name in names}, dimension_numbers=numbers
    )
    cut = jnp.moveaxis(cut, numbers.out_spec[1], -1)
    free = [("x", axis) for axis in range(cut.ndim - 1)]
    have = [
        *((label,) for label in free),
        tuple(sized([p for axis in (features, *spatial) for p in weight.axes[axis]])),
    ]
    want = [*((label,) for label in free), tuple(sized(weight.with_role("in")))]
    return regroup(cut, have, want, {("x", axis): cut.shape[axis] for axis in range(cut.ndim)})
