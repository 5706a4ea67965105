"""What a method tells of its PEFT form: plain data, from which `jlora.interchange` writes PEFT's files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Peft:
    """One leaf's adapter in PEFT's terms, exact to the bit.

    Attributes:
        kind: "lora", "adalora", "vera", "shira", "rows" or "whole" (a trained leaf).
        arrays: by PEFT's role: "a" `[*batch, in, r]`, "b" `[*batch, r, out]`, "m" `[*batch, out]`, ...
        fields: for a role the names of the method's fields that its array holds; by default the one named as the role.
        alpha: numerator of the scale of `a @ b`.
        rslora: whether the scale is `alpha / sqrt(r)` and not `alpha / r`.
        dropout: probability of dropping an entry of the adapter's input while training.
        shared: constants that all leaves of the method have in common.
    """

    kind: str
    arrays: dict[str, Any]
    fields: dict[str, tuple[str, ...]] = field(default_factory=dict)
    alpha: float = 1.0
    rslora: bool = False
    dropout: float = 0.0
    shared: dict[str, Any] = field(default_factory=dict)
