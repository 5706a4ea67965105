"""The Fastfood map: a random linear map of few values to many, in `n log n` operations and without a matrix."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Sides of the matrices that the transform is a product of: of the last digits, which are neighbours in memory, and of the
# first, of which the caller may want some alone. The digits between go by sums and differences of whole stretches.
_LOW, _TOP, _BETWEEN = 32, 16, 4


def fwht(x: jax.Array, size: int | None = None) -> jax.Array:
    """The Walsh-Hadamard transform of the last axis, without normalization: `fwht(fwht(x)) == n * x`.

    The matrix is Sylvester's, `h[i, j] = (-1)**(number of ones that i and j have in common)`, which is a Kronecker product
    of smaller ones.

    Args:
        x: `[..., n]`, n a power of two.
        size: how many of the first entries of the result are wanted; by default all n.
    """
    batch, n = x.shape[:-1], x.shape[-1]
    size = n if size is None else size
    low = min(_LOW, n)
    top = min(_TOP, n // low)
    kept = -(-size * top // n)
    h = jnp.asarray(hadamard(top)[:kept], x.dtype)
    y = jnp.matmul(h, x.reshape(*batch, top, n // top), precision="highest")
    y = jnp.matmul(y.reshape(*batch, -1, low), jnp.asarray(hadamard(low), x.dtype), precision="highest")
    done = low
    while done < n // top:
        radix = min(_BETWEEN, n // (top * done))
        y = y.reshape(*batch, -1, radix, done)
        done *= radix
        y = jnp.stack(_butterflies([y[..., k, :] for k in range(radix)]), axis=-2)
    return y.reshape(*batch, -1)[..., :size]


def _butterflies(parts: list[jax.Array]) -> list[jax.Array]:
    """The transform of a list, of arrays that are added and subtracted as they are; its length a power of two."""
    bit = 1
    while bit < len(parts):
        parts = [parts[k - bit] - each if k & bit else each + parts[k + bit] for k, each in enumerate(parts)]
        bit *= 2
    return parts


def hadamard(n: int) -> np.ndarray:
    """Sylvester's matrix `[n, n]`, n a power of two."""
    found = np.ones((1, 1), np.int8)
    while len(found) < n:
        found = np.kron(np.array([[1, 1], [1, -1]], np.int8), found)
    return found


def padded(size: int) -> int:
    """The power of two that `size` values are padded to."""
    return 1 << max(size - 1, 0).bit_length()


def fastfood(v: jax.Array, signs: jax.Array, order: jax.Array, gaussian: jax.Array, size: int) -> jax.Array:
    """`[size]`: the first entries of `h @ (gaussian * (h @ (signs * v))[order])`, divided so that the norm is kept on average.

    `h` is Sylvester's matrix of side `n`, and the divisor `sqrt(sum(gaussian**2) * size)`.

    Args:
        v: `[d]`, d at most n; padded with zeros.
        signs: `[n]`, of -1 and 1.
        order: `[n]`, a permutation.
        gaussian: `[n]`, normal.
        size: entries of the result, at most n.
    """
    # All behind the first `m` entries is zero, so that the first transform is one of length `m`, again and again.
    m = padded(len(v))
    # Behind a barrier, since XLA would compute its sums anew for every entry that is taken.
    spread = jax.lax.optimization_barrier(fwht(signs[:m] * jnp.pad(v, (0, m - len(v)))))
    mixed = fwht(gaussian * _taken(spread, order), size)
    return mixed / jnp.sqrt(jnp.sum(gaussian**2) * size)


@jax.custom_jvp
def _taken(v: jax.Array, order: jax.Array) -> jax.Array:
    """`[v, v, ...][order]` of `v [m]`, m a power of two, with a permutation of as many entries as that has."""
    return v.at[order & (len(v) - 1)].get(mode="promise_in_bounds")


@_taken.defjvp
def _taken_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """By the permutation itself: its transpose adds nothing up in the order in which a device comes to it."""
    v, order = primals
    repeated = jnp.tile(tangents[0], len(order) // len(v))
    return _taken(v, order), repeated.at[order].get(unique_indices=True, mode="promise_in_bounds")


def constants(seed: jax.Array, n: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The signs, the order and the normal numbers `[n]` that belong to a seed (a 32-bit number), n a power of two.

    They are thrice as many as the weight's entries, so they are made again in every pass, by a mix of bits that is written
    here: a saved adapter is its seed, and `jax.random` promises no release the same numbers.
    """
    bits = _bits(seed, n, 1)
    signs = 1 - 2 * (bits & 1).astype(dtype)
    uniform = ((bits >> 9).astype(dtype) + 0.5) / 2**23  # of other bits, and never 0 or 1
    return signs, _order(seed, n), jax.scipy.special.ndtri(uniform)


def _order(seed: jax.Array, n: int) -> jax.Array:
    """A permutation of n numbers, each of whose rounds is one: a multiple by an odd number, and high bits into low ones."""
    bits, keys = n.bit_length() - 1, _bits(seed, 8, 2)
    x = jnp.arange(n, dtype=jnp.uint32)
    for number in range(4):
        x = (x * (keys[2 * number] | 1) + keys[2 * number + 1]) & jnp.uint32(n - 1)
        x = x ^ (x >> jnp.uint32(max(1, (bits + 1) // 2)))
    return x.astype(jnp.int32)


def _bits(seed: jax.Array, n: int, stream: int) -> jax.Array:
    """`[n]` numbers of 32 bits."""
    first = _mixed(seed ^ jnp.uint32(0x9E3779B9 * stream & 0xFFFFFFFF))
    return _mixed(_mixed(jnp.arange(n, dtype=jnp.uint32) + first) + first)


def _mixed(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit numbers in which every bit depends on every other (Wellons' `lowbias32`)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return x ^ (x >> jnp.uint32(16))
