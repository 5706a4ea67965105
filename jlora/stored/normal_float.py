"""NormalFloat: levels that are quantiles of a normal distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jlora.stored.blockwise import Blockwise
from jlora.stored.double import Double


@dataclass(frozen=True)
class NF4(Double):
    """4 bits with the levels of a normal distribution, in blocks: QLoRA's base.

    `w ~ level[code] * scale`, where a block's scale is its largest magnitude. `codes [in / 2, out]` uint8 holds the even input
    in the high half of a byte; `scales [in / block, out]`. The bytes are those of bitsandbytes, whose blocks lie in torch's
    weight `[out, in]`, transposed, and decoded values equal its own to the bit.

    `4 + 32 / block` bits a weight, 4.5 by default; with `double` `4 + 8 / block + 32 / (256 block)`, 4.127 by default. The
    relative error on normal weights is 0.092 in Frobenius norm.

    Args:
        block: inputs of one output that share a scale; a power of two from 32 to 4096 that divides the inputs.
        double: keep the scales in 8 bits. Then the matrix can't be cut, and coding a decoded matrix again gives slightly
            other scales.

    Raises:
        ValueError: for a block that is none of these, or that does not divide the inputs of a matrix.

    Reference:
        Dettmers et al. 2023, arXiv:2305.14314; levels and arithmetic as in bitsandbytes 0.50.
    """

    bits: ClassVar[int] = 4
    levels: ClassVar[tuple[float, ...]] = (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    )  # fmt: skip


@dataclass(frozen=True)
class NF3(Blockwise):
    """3 bits with the levels of a normal distribution, in blocks.

    `w ~ level[code] * scale` as `NF4`. `codes [3, in / 8, out]` uint8 are three planes of bits, since no whole number of codes
    fills a byte: `3 + 32 / block` bits a weight, 3.5 by default. The relative error on normal weights is 0.20.

    Args:
        block: inputs of one output that share a scale; a power of two from 32 to 4096 that divides the inputs.

    Raises:
        ValueError: for a block that is none of these, or that does not divide the inputs of a matrix.

    Reference:
        Li et al. 2023, LoftQ, arXiv:2310.08659; levels as in its code.
    """

    bits: ClassVar[int] = 3
    levels: ClassVar[tuple[float, ...]] = (
        -1.0, -0.4786292016506195, -0.217141792178154, 0.0, 0.16093020141124725, 0.33791524171829224, 0.5626170039176941, 1.0,
    )  # fmt: skip


@dataclass(frozen=True)
class NF2(Blockwise):
    """2 bits with the levels of a normal distribution, in blocks.

    `w ~ level[code] * scale` as `NF4`, with one negative level, 0, and two positive ones. `codes [in / 4, out]` uint8 hold four
    inputs a byte: `2 + 32 / block` bits a weight, 2.5 by default. The relative error on normal weights is 0.56.

    Args:
        block: inputs of one output that share a scale; a power of two from 32 to 4096 that divides the inputs.

    Raises:
        ValueError: for a block that is none of these, or that does not divide the inputs of a matrix.

    Reference:
        Li et al. 2023, LoftQ, arXiv:2310.08659; levels as in its code.
    """

    bits: ClassVar[int] = 2
    levels: ClassVar[tuple[float, ...]] = (-1.0, 0.0, 0.33791524171829224, 1.0)


NF4.CASES = (NF4(32), NF4(32, double=True))
NF3.CASES = (NF3(32),)
NF2.CASES = (NF2(32),)
