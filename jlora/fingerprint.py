"""A fingerprint of a base: equal exactly when every value is equal, whatever the sharding."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import paths

_UINTS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def fingerprint(params: Any) -> str:
    """A short hexadecimal name for the values, shapes, dtypes and paths of a tree of arrays.

    Each leaf is read once, as bits, into two sums of integers modulo 2**32: of the bits, and of the bits times a mix of
    their position. Such sums are exact and don't depend on the order of addition, so the device, the mesh and the layout
    make no difference.

    Raises:
        TypeError: for a leaf that is no array.
    """
    digest = hashlib.sha256()
    leaves, _ = paths.flatten_with_keys(params)
    for keys, leaf in sorted(leaves, key=lambda item: item[0]):
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"{'/'.join(keys)} is no array but {type(leaf).__name__}")
        sums = np.asarray(_sums(jnp.asarray(leaf)))
        digest.update(repr(("/".join(keys), tuple(leaf.shape), str(leaf.dtype), sums.tolist())).encode())
    return digest.hexdigest()[:32]


@jax.jit
def _sums(leaf: jax.Array) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    wide = leaf.dtype.itemsize > 4
    bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32 if wide else _UINTS[leaf.dtype.itemsize]).astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        position = position * jnp.uint32(0x9E3779B1) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    # A bijective mix of the position: a plain position would not tell exchanged neighbours of equal sum.
    position = (position ^ (position >> 15)) * jnp.uint32(0x85EBCA6B) | jnp.uint32(1)
    return jnp.stack([jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * position, dtype=jnp.uint32)])
