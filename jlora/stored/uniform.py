"""Uniform: even levels for a whole matrix."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.protocol.code import Arrays, Code
from jlora.core.protocol.hyperparameters import check_hyperparameters, number
from jlora.stored import packing
from jlora.stored.scaling import total


@dataclass(frozen=True)
class Uniform(Code):
    """Even levels over what lies within two standard deviations, for a whole matrix: LoftQ's "uniform".

    With `c = clip(w, mean - 2 std, mean + 2 std)`, `low = min c`, `step = (max c - min c + 1e-8) / (2^bits - 1)`, the standard
    deviation being that of a sample:

    ```text
    code = round((c - low) / step)        w ~ levels[code]        levels[n] = low + n step
    ```

    `codes` uint8 are `[in / 4, out]`, `[3, in / 8, out]` (three planes of bits) or `[in / 2, out]` for 2, 3 or 4 bits; `levels
    [2^bits]` float32. `bits` bits a weight, and `32 2^bits` for the matrix. The relative error on normal weights is 0.39, 0.19
    and 0.13, most of the last from clipping. A decoded matrix has less spread, and coded again it may have other levels.

    Args:
        bits: 2, 3 or 4.

    Raises:
        ValueError: for another number of bits, or a matrix whose inputs don't fill bytes: they must be a multiple of 4, 8 or 2.

    Reference:
        Li et al. 2023, LoftQ, arXiv:2310.08659, as in its code.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        check_hyperparameters(
            self, bounds={"bits": number(lambda v: type(v) is int and v in packing.GROUP, "2, 3 or 4")}
        )

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The levels are of the whole matrix, and every part has all of them."""
        return {"codes": packing.AXES[self.bits], "levels": ("",)}

    def check(self, rows: int, columns: int) -> None:
        """Refuses a matrix whose inputs don't fill bytes."""
        if rows % packing.GROUP[self.bits]:
            group = packing.GROUP[self.bits]
            raise ValueError(
                f"{self.bits} bits pack {group} rows together, which do not divide the {rows} rows of the {rows} x {columns} "
                "matrix; leave it out of the spec, or keep it as Int8"
            )

    def encode(self, w: jax.Array) -> Arrays:
        """`codes` and `levels`."""
        mean = total(w.reshape(-1)) / w.size
        spread = 2 * jnp.sqrt(total(jnp.square(w - mean).reshape(-1)) / (w.size - 1))
        clipped = jnp.clip(w, mean - spread, mean + spread)
        steps = 2**self.bits - 1
        low = jnp.min(clipped)
        # LoftQ adds 1e-8, so that a matrix of equal numbers divides by something.
        width = jnp.max(clipped) - low + 1e-8
        codes = jnp.round((clipped - low) / width * steps)
        shares = np.arange(steps + 1, dtype=np.float32) / np.float32(steps)
        # The barrier keeps product and sum from being fused, which would round otherwise.
        levels = jax.lax.optimization_barrier(shares * width) + low
        return {"codes": packing.pack(codes, self.bits), "levels": levels}

    def decode(self, fields: Arrays, rows: int, columns: int) -> jax.Array:
        """`levels[code]`."""
        return packing.choose(packing.unpack(fields["codes"], self.bits), fields["levels"])


Uniform.CASES = (Uniform(2), Uniform(3), Uniform(4))
