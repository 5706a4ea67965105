"""An axis cut into chunks, for a loop that has one of them in memory at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cut(x: jax.Array, chunk: int) -> jax.Array:
    """`[rows, length, …]` as `[chunks, rows, chunk, …]`, filled with zeros where the chunk does not divide the length."""
    count = -(-x.shape[1] // chunk)
    x = jnp.pad(x, [(0, 0), (0, count * chunk - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(x.reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0)


def joined(chunks: jax.Array, length: int) -> jax.Array:
    """What `cut` cut, put together again, without what it was filled with."""
    x = jnp.moveaxis(chunks, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
