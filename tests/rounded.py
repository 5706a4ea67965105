"""A code for tests: 8-bit numbers in blocks of rows."""

from dataclasses import dataclass

import jax.numpy as jnp

from jlora.core.protocol.code import Code


@dataclass(frozen=True)
class Rounded(Code):
    """`codes [in, out]` int8, `scales [in / block, out]`; with `whole` one scale `[]` for a matrix that stays in one piece."""

    block: int = 4
    whole: bool = False

    @property
    def axes(self):
        return {"scales": () if self.whole else ("in", "out"), "codes": ("in", "out")}

    @property
    def local(self):
        return frozenset() if self.whole else frozenset({"in", "out"})

    def check(self, rows, columns):
        if rows % self.block:
            raise ValueError(f"block {self.block} does not divide its {rows} rows")

    def encode(self, w):
        scales = jnp.abs(w.reshape(-1, self.block, w.shape[1])).max(1) / 127
        scales = scales.max() if self.whole else scales
        return {"codes": jnp.round(w / self._spread(scales, w.shape)).astype(jnp.int8), "scales": scales}

    def decode(self, fields, rows, columns):
        return fields["codes"].astype(jnp.float32) * self._spread(fields["scales"], (rows, columns))

    def _spread(self, scales, shape):
        if self.whole:  # by the place in the whole matrix, which a part of it does not know
            return scales * (1 + jnp.arange(shape[0])[:, None] / shape[0])
        return jnp.repeat(scales, self.block, axis=0, total_repeat_length=shape[0])
