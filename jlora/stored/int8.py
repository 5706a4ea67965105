"""Int8: whole numbers from -127 to 127, with a scale for each output."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jlora.core.protocol.code import Arrays, Code
from jlora.stored.scaling import to_most, unit


@dataclass(frozen=True)
class Int8(Code):
    """8-bit integers with a scale for each output: the weights of LLM.int8().

    `w ~ code / 127 * scale`, where an output's scale is its largest magnitude. `codes [in, out]` int8, `scales [out]` float32:
    `8 + 32 / in` bits a weight. Codes and scales are bit for bit those of bitsandbytes' `int8_vectorwise_quant` on torch's
    weight. The relative error on normal weights is 0.008. Any size can be kept so.

    Reference:
        Dettmers et al. 2022, arXiv:2208.07339, without its decomposition of outliers, which is one of activations.
    """

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Scales are of outputs."""
        return {"codes": ("in", "out"), "scales": ("out",)}

    def encode(self, w: jax.Array) -> Arrays:
        """`round(w * (1 / scale * 127))`."""
        scales = jnp.max(jnp.abs(w), axis=0)
        return {"codes": jnp.round(w * to_most(scales, 127.0)[None]).astype(jnp.int8), "scales": scales}

    def decode(self, fields: Arrays, rows: int, columns: int) -> jax.Array:
        """`code / 127 * scale`."""
        # In this order 127 gives the scale itself, so that a decoded matrix has the same scales again.
        return fields["codes"].astype(jnp.float32) * unit(127) * fields["scales"][None]


Int8.CASES = (Int8(),)
