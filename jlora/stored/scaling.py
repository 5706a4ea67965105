"""Arithmetic of scales, of the same bits under every compiler."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def to_most(scales: jax.Array, most: float = 1.0) -> jax.Array:
    """What takes magnitudes up to `scales` to magnitudes up to `most`: `(1 / scales) * most`, and 0 where that would overflow.

    bitsandbytes multiplies by a reciprocal, and divides nothing: only so are codes equal to its own. The least scale that it
    divides by is 1e-38, which is no normal number of float32, and for XLA 0.
    """
    least = most * float(jnp.finfo(jnp.float32).tiny)
    return jnp.where(scales > least, (1 / scales) * most, 0.0)


def unit(most: float) -> jax.Array:
    """`1 / most`, which a product takes in the order that is written.

    A compiler that knows the number may multiply scales by it first (that of JAX 0.10 and 0.11 does): then the largest
    code doesn't stand for the scale itself, and a decoded matrix has other scales.
    """
    return jax.lax.optimization_barrier(jnp.float32(1 / most))


def total(x: jax.Array) -> jax.Array:
    """The sum of a vector, added in pairs: in one order, in a stack of matrices too, and within few places of the true sum."""
    while x.size > 1:
        half = -(-x.size // 2)
        x = x[:half] + jnp.pad(x[half:], (0, 2 * half - x.size))
    return x[0]
