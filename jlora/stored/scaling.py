"""Scales: the largest magnitude of what shares one."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def to_most(scales: jax.Array, most: float = 1.0) -> jax.Array:
    """What takes magnitudes up to `scales` to magnitudes up to `most`: `most / scales`, and 0 where that would overflow.

    bitsandbytes multiplies by this number, and divides by nothing: codes are equal to its own only so. It takes 1e-38 for
    the least scale, which float32 has no normal number for, and XLA none at all.
    """
    least = most * float(jnp.finfo(jnp.float32).tiny)
    return jnp.where(scales > least, most / scales, 0.0)
