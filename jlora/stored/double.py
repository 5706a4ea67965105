"""Double quantization: scales of blocks that are kept in 8 bits themselves (QLoRA, arXiv:2305.14314)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.protocol.code import Arrays
from jlora.stored.blockwise import Blockwise
from jlora.stored.scaling import to_most, total

#: Scales that share a scale.
NESTED = 256


def _dynamic_map() -> np.ndarray:
    """The 256 numbers of bitsandbytes' dynamic type of 8 bits, ascending (Dettmers 2015, arXiv:1511.04561).

    For each exponent from -6 to 0, the middles between `2^n + 1` numbers that run evenly from 0.1 to 1, with n growing from
    0 to 6, of both signs; 0 and 1. In float32, and each multiplication and addition rounded once, as torch has them: other
    arithmetic gives up to 42 numbers that differ in the last place.
    """
    numbers = [0.0, 1.0]
    for n in range(7):
        count, first, last = 2**n, np.float32(0.1), np.float32(1)
        step = np.float64((last - first) / np.float32(count))
        up, down = first + step * np.arange(count + 1), last - step * np.arange(count, -1, -1)
        ends = np.where(np.arange(count + 1) < (count + 1) // 2, up, down).astype(np.float32)
        middles = np.float32(10.0 ** (n - 6)) * ((ends[:-1] + ends[1:]) / np.float32(2))
        numbers += [*middles, *-middles]
    return np.sort(np.array(numbers, np.float32))


DYNAMIC_MAP = _dynamic_map()


@dataclass(frozen=True)
class Double(Blockwise):
    """A code of blocks whose scales may be kept in 8 bits.

    With `double` the fields are, `n = in / block * out`:

    ```text
    scales        [in / block, out] uint8     the nearest of the dynamic map's to (scale - offset) / nested
    nested_scales [ceil(n / 256)]   float32   the largest |scale - offset| of 256
    offset        []                float32   the mean of the scales
    ```

    and a scale is `map[code] * nested + offset`. The 256 are consecutive among the scales of output 0, then of output 1, and
    so on, as in torch's weight `[out, in]`: a part of the matrix has other ones, so that it can't be cut.
    """

    double: bool = False

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """With `double`, nested scales and offset are of no axis."""
        return {**super().axes, **({"nested_scales": ("",), "offset": ()} if self.double else {})}

    @property
    def local(self) -> frozenset[str]:
        """Nowhere with `double`: what shares a nested scale depends on the whole matrix."""
        return frozenset() if self.double else super().local

    def encode(self, w: jax.Array) -> Arrays:
        """The fields of `Blockwise`, or those above."""
        fields = super().encode(w)
        return {**fields, **(compress(fields["scales"]) if self.double else {})}

    def decode(self, fields: Arrays, rows: int, columns: int) -> jax.Array:
        """`level * scale`."""
        return super().decode({**fields, "scales": expand(fields)} if self.double else fields, rows, columns)


def compress(scales: jax.Array) -> Arrays:
    """The second level of scales `[in / block, out]`, in the arithmetic of bitsandbytes."""
    offset = total(scales.T.reshape(-1)) / scales.size
    return {**compress_around(scales, offset), "offset": offset}


def compress_around(scales: jax.Array, offset: jax.Array) -> Arrays:
    """`scales` and `nested_scales` of the second level, by an offset."""
    flat = (scales - offset).T.reshape(-1)
    groups = jnp.pad(flat, (0, -flat.size % NESTED)).reshape(-1, NESTED)
    nested = jnp.max(jnp.abs(groups), axis=1)
    middles = (DYNAMIC_MAP[:-1] + DYNAMIC_MAP[1:]) / np.float32(2)
    scaled = groups * to_most(nested)[:, None]
    codes = jnp.searchsorted(jnp.asarray(middles), scaled, side="left").astype(jnp.uint8)
    return {"scales": codes.reshape(-1)[: flat.size].reshape(scales.shape[::-1]).T, "nested_scales": nested}


def expand(fields: Arrays) -> jax.Array:
    """The scales `[in / block, out]` in float32 of a second level."""
    codes = fields["scales"]
    nested = jnp.repeat(fields["nested_scales"], NESTED)[: codes.size].reshape(codes.shape[::-1]).T
    # The barrier keeps product and sum apart: fused they would round otherwise than here and in bitsandbytes, as the compiler
    # of JAX 0.10 has it all the same.
    products = jax.lax.optimization_barrier(jnp.asarray(DYNAMIC_MAP)[codes] * nested)
    return products + fields["offset"]
