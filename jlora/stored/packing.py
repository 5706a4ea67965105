"""Codes of 2, 3 and 4 bits in bytes, and the numbers that they stand for."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp

#: Consecutive inputs whose codes share bytes, by bits: 3 bits fill bytes in eights.
GROUP = {2: 4, 3: 8, 4: 2}
#: The roles of a packed array's axes, by bits.
AXES = {2: ("in", "out"), 3: ("", "in", "out"), 4: ("in", "out")}


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Codes `[in, out]` below `2^bits` as uint8, without a bit to spare.

    2 and 4 bits: `[in bits / 8, out]`, the first input of a byte in its highest bits. 3 bits, of which no whole number fills
    a byte: `[3, in / 8, out]`, plane `p` holding the bits of worth `2^(2 - p)` of eight inputs a byte, likewise.
    """
    codes = codes.astype(jnp.uint8)
    if bits == 3:
        return jnp.stack([_joined((codes >> (2 - plane)) & 1, 1) for plane in range(3)])
    return _joined(codes, bits)


def _joined(codes: jax.Array, bits: int) -> jax.Array:
    parts = codes.reshape(-1, 8 // bits, codes.shape[1])
    return functools.reduce(operator.or_, (parts[:, n] << (8 - bits * (n + 1)) for n in range(8 // bits)))


def unpack(packed: jax.Array, bits: int) -> jax.Array:
    """The codes `[in, out]` that `pack` took, as int32.

    Inside a jitted function they are formed where they are used, and never lie in memory. As int32 and not as uint8, since
    the tests of bits on them, which choose among floats, then have the width of the floats.
    """
    if bits == 3:
        return functools.reduce(operator.or_, (_split(packed[plane], 1) << (2 - plane) for plane in range(3)))
    return _split(packed, bits)


def _split(packed: jax.Array, bits: int) -> jax.Array:
    shifts = jnp.arange(8 - bits, -1, -bits, dtype=jnp.int32)
    codes = (packed[:, None].astype(jnp.int32) >> shifts[None, :, None]) & (2**bits - 1)
    return codes.reshape(-1, packed.shape[1])


def choose(codes: jax.Array, levels: Sequence[float] | jax.Array) -> jax.Array:
    """`levels[codes]` in float32, by a choice of two for each bit: a table costs the same on CPUs, and far more on TPUs."""
    remaining = [jnp.asarray(levels[n], jnp.float32) for n in range(len(levels))]
    bit = 1
    while len(remaining) > 1:
        pairs = zip(remaining[::2], remaining[1::2])
        remaining = [jnp.where((codes & bit) != 0, upper, lower) for lower, upper in pairs]
        bit *= 2
    return remaining[0]
