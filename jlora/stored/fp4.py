"""FP4: numbers of a sign, two bits of exponent and one of mantissa."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from jlora.stored.double import Double


@dataclass(frozen=True)
class FP4(Double):
    """4-bit floating point in blocks, as in bitsandbytes.

    `w ~ level[code] * scale` with the levels 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1 of both signs, in the order of bitsandbytes'
    codes; shapes, bits a weight and what `double` means as for `NF4`. There are two zeros: as there, a number between 0 and
    the least level's half has the code of the negative one.

    For bases that come so; `NF4` errs less on normal weights (0.092 against 0.122).

    Args:
        block: inputs of one output that share a scale; a power of two from 32 to 4096 that divides the inputs.
        double: keep the scales in 8 bits.

    Raises:
        ValueError: for a block that is none of these, or that does not divide the inputs of a matrix.

    Reference:
        Dettmers et al. 2023, arXiv:2305.14314; levels and arithmetic as in bitsandbytes 0.50.
    """

    bits: ClassVar[int] = 4
    levels: ClassVar[tuple[float, ...]] = tuple(
        sign * float(np.float32(twelfths) / np.float32(12))
        for sign in (1, -1)
        for twelfths in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    )


FP4.CASES = (FP4(32),)
