"""What `Method.needs` may name, and `start` takes by keyword: statistics of gradients and inputs, and a residual."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jlora.core.products.contraction import accumulation_dtype
from jlora.core.protocol.method import Site

#: Statistics of the gradient, `[in, out]`: functions of that of one batch, of which the mean over batches is taken.
GRADIENTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gradient": lambda gradient: gradient,
    "absolute_gradient": jnp.abs,
}


@dataclass(frozen=True)
class Input:
    """A statistic of what a matrix is multiplied with: a mean over tokens, or over rows.

    Attributes:
        axes: how many axes it has, each of size `in`.
        measure: `measure(x, counts)` of one product's input `x [*leading, in]` in float32 and which of its tokens count,
            `[*leading]`: the sum, and the number of what was summed.
    """

    axes: int
    measure: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def _covariance(x: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _products(x * counts[..., None]), jnp.sum(counts)


def _mean(x: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(x * counts[..., None], axis=tuple(range(x.ndim - 1))), jnp.sum(counts)


def _normalised_covariance(x: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = x * counts[..., None]
    rows = x if x.ndim > 2 else x[None]
    most = jnp.max(jnp.abs(rows), axis=tuple(range(1, rows.ndim)), keepdims=True)
    return _products(rows / jnp.where(most > 0, most, 1)), jnp.asarray(rows.shape[0], x.dtype)


def _products(x: jax.Array) -> jax.Array:
    """`sum over rows of x xᵀ`, not rounded to the 16 bits in which some devices multiply: it may be inverted."""
    return jnp.einsum("...i,...j->ij", x, x, precision="highest")


#: Statistics of the inputs.
#: "covariance" `[in, in]`: the mean of `x xᵀ` over tokens. "mean" `[in]`: that of `x`.
#: "normalised_covariance" `[in, in]`: the mean over rows of the sum over a row's tokens of `x xᵀ`, each row divided by its
#: largest magnitude; an input without a leading axis for tokens, or with that alone, counts as one row.
INPUTS: dict[str, Input] = {
    "covariance": Input(2, _covariance),
    "mean": Input(1, _mean),
    "normalised_covariance": Input(2, _normalised_covariance),
}

#: What no data tell: `w_original - w` `[in, out]`, with `w` the base's matrix (see `jlora.residuals`).
RESIDUAL = "residual"


def needed(site: Site) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes in which a site's method gets what it needs: the leaf's own, or of inputs `[*batch, in, ...]`.

    Raises:
        ValueError: for a name that is none, or inputs of a leaf that is taken as no matrix.
    """
    dtype, found = accumulation_dtype(site.dtype), {}
    for name in sorted(site.method.needs):
        if name not in GRADIENTS and name not in INPUTS and name != RESIDUAL:
            known = ", ".join((*GRADIENTS, *INPUTS))
            raise ValueError(f"{site.path}: {site.method} needs {name!r}, which prepare can't take; it takes {known}")
        if name in INPUTS and not site.method.matrix:
            raise ValueError(f"{site.path}: {site.method} needs the {name} of the inputs, but adapts no matrix")
        square = (*site.batch_shape, *[site.in_size] * INPUTS[name].axes) if name in INPUTS else site.shape
        found[name] = jax.ShapeDtypeStruct(square, dtype)
    return found


def size(site: Site) -> int:
    """The bytes that all that a site's method needs takes."""
    return sum(math.prod(each.shape) * each.dtype.itemsize for each in needed(site).values())
