"""Scales: the largest magnitude of what shares one."""

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
