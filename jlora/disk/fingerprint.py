"""A fingerprint of a base: equal exactly when every value is equal, whatever the sharding."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import paths
from jlora.core.protocol.stored import Stored

_UINTS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
_NARROW = (jnp.int4, jnp.uint4)  # less than a byte each
_BLOCK = 2**21  # elements
_SEEDS = (np.uint32(0x9E3779B9), np.uint32(0x7F4A7C15))  # any two numbers


def fingerprint(params: Any) -> str:
    """A short hexadecimal name for the values, shapes, dtypes and paths of a tree of arrays.

    Each leaf is read once, as bits, into two sums modulo 2**32 of hashes of (bits, position). Such sums are exact and don't
    depend on the order of addition, so the device, the mesh and the layout make no difference. A change of one element is
    always seen; any other goes unseen by a chance of about 2**-64.

    A Python number counts as the array that JAX makes of it, which it becomes in a jitted step. A string, and an integer too
    large for JAX, count by their `repr`. A leaf that is kept in the form of a code counts by its code and fields.

    Raises:
        TypeError: for any other leaf, and an array of anything but numbers.
    """
    digest = hashlib.sha256()
    leaves, _ = paths.flatten_with_keys(params)
    for keys, leaf in sorted(leaves, key=lambda item: item[0]):
        path = "/".join(keys)
        if isinstance(leaf, Stored):
            digest.update(repr((path, repr(leaf.code), leaf.shape, str(leaf.dtype), leaf.roles)).encode())
            for name, array in sorted((leaf.fields | leaf.common).items()):
                digest.update(_described(f"{path}/{name}", array))
        else:
            digest.update(_described(path, leaf))
    return digest.hexdigest()[:32]


def _described(path: str, leaf: Any) -> bytes:
    """What of a leaf goes into the digest."""
    array = _array(leaf, path)
    if array is None:
        return repr((path, leaf)).encode()
    sums = np.sum([np.asarray(_sums(*block)) for block in _blocks(array)], axis=0, dtype=np.uint32)
    dtype = leaf.dtype if hasattr(leaf, "dtype") else array.dtype
    return repr((path, tuple(array.shape), str(dtype), sums.tolist())).encode()


def _array(leaf: Any, path: str) -> jax.Array | None:
    """A leaf as an array of JAX; None for a leaf that counts by its `repr`.

    Raises:
        TypeError: see `fingerprint`.
    """
    if isinstance(leaf, str | bytes):
        return None
    if hasattr(leaf, "dtype") or type(leaf) in (bool, int, float, complex):
        try:
            return jnp.asarray(leaf)
        except OverflowError:
            return None
        except TypeError:  # objects, texts, dates, and shapes without values
            pass
    kind = type(leaf).__name__
    what = f"a {kind} of {leaf.dtype}, no array of numbers" if hasattr(leaf, "dtype") else f"no array but {kind}"
    raise TypeError(f"{path} is {what}, which no fingerprint can tell from another; keep it out of the params tree")


def _blocks(leaf: jax.Array) -> Iterator[tuple[jax.Array, np.uint32]]:
    """A leaf in blocks of rows, each with the position of its first element.

    XLA's CPU backend stores all hashes before it adds them up: without blocks that would take twice the memory of the largest
    leaf. A leaf that is spread over devices is not cut, since a block might lie on one device alone.
    """
    simple = jnp.issubdtype(leaf.dtype, jnp.number) and leaf.dtype.itemsize <= 4
    if leaf.size <= _BLOCK or not simple or len(leaf.sharding.device_set) > 1:
        yield leaf, np.uint32(0)
        return
    rows = max(1, _BLOCK // math.prod(leaf.shape[1:]))
    for start in range(0, leaf.shape[0], rows):
        yield leaf[start : start + rows], np.uint32(start * math.prod(leaf.shape[1:]) % 2**32)


@jax.jit
def _sums(leaf: jax.Array, first: jax.Array) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.iscomplexobj(leaf):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if leaf.dtype == jnp.bool_ or leaf.dtype in _NARROW:
        leaf = leaf.astype(jnp.int8)
    if str(leaf.dtype) == "float4_e2m1fn":  # half a byte each
        leaf = leaf.astype(jnp.float32)
    wide = leaf.dtype.itemsize > 4
    bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32 if wide else _UINTS[leaf.dtype.itemsize]).astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    position = position + first
    # Hashed, and not multiplied by a factor for the position: the sign is the top bit, 2**31 times an odd factor is 2**31
    # modulo 2**32, and so two changed signs would cancel.
    sums = [jnp.sum(_mix(_mix(bits ^ seed) + _mix(position + seed)), dtype=jnp.uint32) for seed in _SEEDS]
    return jnp.stack(sums)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit integers in which every bit depends on all bits (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
