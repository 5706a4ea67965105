"""What a method is as plain LoRA, for those that give ranks out or take them away."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PlainLoRA:
    """The effective weight as plain LoRA: `w + scale * (a * gates) @ b`.

    Attributes:
        a: `[in, r]`.
        gates: `[r]`, 0 for a rank out of use.
        b: `[r, out]`.
        scale: LoRA's `alpha / rank`; static.
        dropout: probability with which an entry of the adapter path's input is dropped; static.
    """

    a: jax.Array
    gates: jax.Array
    b: jax.Array
    scale: float = field(default=1.0, metadata={"static": True})
    dropout: float = field(default=0.0, metadata={"static": True})
