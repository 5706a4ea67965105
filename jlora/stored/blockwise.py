"""What codes of few bits with a scale for each block have in common."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.protocol.code import Arrays, Code
from jlora.core.protocol.hyperparameters import check_hyperparameters, instead, number
from jlora.stored import packing
from jlora.stored.scaling import to_most

#: Those that bitsandbytes takes.
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Blockwise(Code):
    """Each block of consecutive inputs of one output is divided by its largest magnitude, then taken to the nearest level.

    Args:
        block: inputs that share a scale: a power of two from 32 to 4096 that divides the matrix's inputs.

    Class attributes:
        bits: of a code.
        levels: the `2^bits` numbers that codes stand for, in float32.

    Raises:
        ValueError: for a block that is none of these, or that does not divide the inputs of a matrix.
    """

    block: int = 64

    bits: ClassVar[int]
    levels: ClassVar[tuple[float, ...]]

    def __post_init__(self) -> None:
        check_hyperparameters(
            self, bounds={"block": number(lambda v: type(v) is int and v in BLOCKS, f"one of {BLOCKS}")}
        )

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Codes and scales run along the matrix."""
        return {"codes": packing.AXES[self.bits], "scales": ("in", "out")}

    def check(self, rows: int, columns: int) -> None:
        """Refuses a matrix whose inputs the block does not divide."""
        if rows % self.block:
            raise ValueError(
                f"block {self.block} must divide the {rows} rows of the {rows} x {columns} matrix; "
                f"{instead(self.block, [b for b in BLOCKS if rows % b == 0], f'none of {BLOCKS} does')}"
            )

    def encode(self, w: jax.Array) -> Arrays:
        """`codes` uint8 as `packing.pack` lays them, `scales [in / block, out]` float32."""
        blocks = w.reshape(-1, self.block, w.shape[1])
        scales = jnp.max(jnp.abs(blocks), axis=1)
        codes = _nearest(blocks * to_most(scales)[:, None], np.asarray(self.levels, np.float32))
        return {"codes": packing.pack(codes.reshape(w.shape), self.bits), "scales": scales}

    def decode(self, fields: Arrays, rows: int, columns: int) -> jax.Array:
        """`level * scale`."""
        blocks = self.values(fields["codes"]).reshape(rows // self.block, self.block, columns)
        return (blocks * fields["scales"][:, None]).reshape(rows, columns)

    def values(self, packed: jax.Array) -> jax.Array:
        """The levels `[in, out]` of packed codes."""
        # Constants would be spread to the matrix's size before a loop over layers, and kept there, all of them.
        packed, levels = jax.lax.optimization_barrier((packed, jnp.asarray(self.levels, jnp.float32)))
        return packing.choose(packing.unpack(packed, self.bits), levels)


def _nearest(x: jax.Array, levels: np.ndarray) -> jax.Array:
    """The codes of the nearest levels, of two equally near ones the lower."""
    order = np.argsort(levels, kind="stable")
    middles = (levels[order][:-1] + levels[order][1:]) / np.float32(2)
    above = [(x > middle).astype(jnp.uint8) for middle in middles]
    rank = functools.reduce(operator.add, above)
    return rank if (order == np.arange(len(levels))).all() else jnp.asarray(order, jnp.uint8)[rank]
