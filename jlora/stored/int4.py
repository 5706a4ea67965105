"""Int4: whole numbers from -7 to 7."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora.stored import packing
from jlora.stored.blockwise import Blockwise
from jlora.stored.scaling import unit


@dataclass(frozen=True)
class Int4(Blockwise):
    """Symmetric 4-bit integers in blocks.

    `w ~ (code - 8) / 7 * scale`, where a block's scale is its largest magnitude and codes run from 1 to 15. `codes
    [in / 2, out]` uint8 hold the even input in the high half of a byte, `scales [in / block, out]` are float32: `4 + 32 /
    block` bits a weight, 4.5 by default. The relative error on normal weights is 0.107, and 0.092 with `NF4`; but this is
    decoded by arithmetic, four times as quickly on a CPU.

    Args:
        block: inputs of one output that share a scale; a power of two from 32 to 4096 that divides the inputs.

    Raises:
        ValueError: for a block that is none of these, or that does not divide the inputs of a matrix.

    Reference:
        The usual absmax quantization, as in Dettmers et al. 2022, arXiv:2208.07339, with 4 bits and blocks.
    """

    bits: ClassVar[int] = 4
    # A product with a seventh, and not a division, so that these are the bits that `values` forms. 7 gives 1 exactly.
    levels: ClassVar[tuple[float, ...]] = tuple(float(np.float32(n) * np.float32(1 / 7)) for n in range(-8, 8))

    def values(self, packed: jax.Array) -> jax.Array:
        """`(code - 8) / 7`."""
        return (packing.unpack(packed, self.bits) - 8).astype(jnp.float32) * unit(7)


Int4.CASES = (Int4(32),)
