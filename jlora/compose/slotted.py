"""The method of a bank's leaves: low-rank updates in slots, of which a call chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.products.slots import Slots, check_choice
from jlora.core.protocol.hyperparameters import check_hyperparameters, integer
from jlora.core.protocol.method import Arrays, Method, Site, Start, View, factor_labels
from jlora.methods.lora import kaiming, trained_dtype


@dataclass(frozen=True)
class Slotted(Method):
    """Low-rank updates in slots: `(w + a_s @ b_s) * gain_s` for the slot `s` that a call chooses, or a mix of all.

    With `on(slot=s)` for whole numbers `s`: one for all, `[rows]`, or `[rows, tokens]`. With `on(weights=m)` for numbers `m
    [..., slots]`: `w + sum over s of m_s * a_s @ b_s`. Slot 0 is zero, and stays so in training. Trains
    `slots * (rank * (in + out) + (out if gains else 0))` values a matrix.

    Args:
        slots: number of slots, the one that is zero included.
        rank: columns of every `a_s`; any number, since adapters of smaller ranks are filled up with zeros.
        gains: whether slots have a gain.

    Raises:
        ValueError: for a hyperparameter out of range.
    """

    slots: int = 2
    rank: int = 8
    gains: bool = False

    local: ClassVar[frozenset[str]] = frozenset({"in", "out"})
    context: ClassVar[frozenset[str]] = frozenset({"slot", "weights"})
    form = Slots

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("rank",), {"slots": integer(1, "a whole number of at least 1")})

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        factors = {"a": ("", "in", "rank"), "b": ("", "rank", "out")}
        return {**factors, "gain": ("", "out")} if self.gains else factors

    def check_context(self, context: Arrays) -> None:
        """Refuses slots that are no whole numbers below `slots`, and weights of another number of slots."""
        slot, weights = context.get("slot"), context.get("weights")
        if slot is not None and weights is not None:
            raise ValueError("a call chooses by slot= or by weights=, not by both; None takes one away")
        if slot is not None:
            check_choice("slot", slot, self.slots)
        if weights is None:
            return
        if weights.ndim not in (1, 2, 3) or weights.shape[-1] != self.slots:
            raise ValueError(
                f"weights= takes numbers [slots], [rows, slots] or [rows, tokens, slots] for {self.slots} slots; got shape "
                f"{weights.shape}"
            )
        if self.gains:
            raise ValueError(
                "adapters with a gain, such as DoRA, are no sums of changes, so weights= can't mix them; choose by slot="
            )

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """LoRA's in every slot but the first, which is zero; gains are ones."""
        dtype, (rows, columns) = trained_dtype(w), w.shape
        a = kaiming(key, (rows, (self.slots - 1) * self.rank), dtype).reshape(rows, self.slots - 1, self.rank)
        a = jnp.concatenate([jnp.zeros((1, rows, self.rank), dtype), jnp.moveaxis(a, 1, 0)])
        gain = {"gain": jnp.ones((self.slots, columns), dtype)} if self.gains else {}
        return Start({"a": a, "b": jnp.zeros((self.slots, self.rank, columns), dtype), **gain})

    def weight(self, view: View) -> jax.Array:
        """That of the one choice for all rows; there is none where rows choose for themselves."""
        return self.update(view).chosen("weight").weight(view.w)

    def update(self, view: View) -> Slots:
        """All slots, and what the call chooses."""
        slot, weights = view.context.get("slot"), view.context.get("weights")
        leading = 0 if slot is None else slot.ndim
        leading = leading if weights is None else weights.ndim - 1
        own = view.params
        return Slots(own["a"], own["b"], own.get("gain"), slot, weights, leading, view.site.path)

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups; a gain learns as B does and never decays."""
        gain = {"gain": "vector"} if self.gains else {}
        return factor_labels(site, {"a": "a", "b": "b"}) | gain


Slotted.CASES = (Slotted(slots=3, rank=2), Slotted(slots=3, rank=2, gains=True))
