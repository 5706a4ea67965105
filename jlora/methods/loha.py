"""LoHa: the entrywise product of two low-rank updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.hyperparameters import NOT_ZERO, check_hyperparameters, check_rank
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Method, Site, Start, View
from jlora.core.protocol.peft import PeftKind, PeftSetting, PeftTensor
from jlora.methods.lora import kaiming, trained_dtype


@dataclass(frozen=True)
class LoHa(Method):
    """Low-rank Hadamard product: `w + (alpha / rank) * (a1 @ b1) * (a2 @ b2)`, the last product entry by entry.

    Two pairs `a1`, `a2 [in, rank]` and `b1`, `b2 [rank, out]`. The update's rank may reach `rank**2`, with the values of a
    LoRA of rank `2 * rank`. `a2` starts at zero, so the start is the base's output; the others are uniform within
    `1/sqrt(in)` (`a1`) and `1/sqrt(rank)` (`b1`, `b2`), as in PEFT. Trains `2 * rank * (in + out)` values a matrix.

    Worth trying where an update of low rank is too poor and more values can't be afforded. Costs forming the
    update in every pass.

    Args:
        rank: of each of the two products; at most the smaller side of the matrix.
        alpha: numerator of the scale.

    Raises:
        ValueError: for a rank or an alpha out of range.

    Example:
        >>> jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.LoHa(rank=8)})

    Reference:
        Hyeon-Woo et al. 2021 (FedPara), arXiv:2108.06098; for fine-tuning: LyCORIS, Yeh et al. 2023, arXiv:2309.14859; starting
        values as in PEFT.
    """

    rank: int = 8
    alpha: float = 8.0

    family: ClassVar[str] = "Structured updates"
    local: ClassVar[frozenset[str]] = frozenset({"in", "out"})
    recipe: ClassVar[Recipe] = Recipe(rank=8)

    # PEFT drops output rows, or whole modules, in training where the last two are on.
    peft_kind: ClassVar[PeftKind] = PeftKind(
        "LOHA",
        tensors=(
            PeftTensor("hada_w1_a", "b1", "transposed"),
            PeftTensor("hada_w1_b", "a1", "transposed"),
            PeftTensor("hada_w2_a", "b2", "transposed"),
            PeftTensor("hada_w2_b", "a2", "transposed"),
        ),
        settings=(
            PeftSetting("r", "rank", 8, pattern="rank_pattern"),
            PeftSetting("alpha", "alpha", 8.0, pattern="alpha_pattern"),
        ),
        unused=("use_effective_conv2d",),
        training=("rank_dropout", "module_dropout"),
    )

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("rank",), {"alpha": NOT_ZERO})

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        a, b = ("in", "rank"), ("rank", "out")
        return {"a1": a, "b1": b, "a2": a, "b2": b}

    def check(self, site: Site) -> None:
        """Refuses a rank above the matrix's sides."""
        check_rank(self, site)

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """Three factors uniform within the bounds of torch's linear layer, `a2` zero."""
        keys, dtype = jax.random.split(key, 3), trained_dtype(w)
        a, b = (w.shape[0], self.rank), (self.rank, w.shape[1])
        return Start(
            {
                "a1": kaiming(keys[0], a, dtype),
                "b1": kaiming(keys[1], b, dtype),
                "a2": jnp.zeros(a, dtype),
                "b2": kaiming(keys[2], b, dtype),
            }
        )

    def weight(self, view: View) -> jax.Array:
        """`w + (alpha / rank) * (a1 @ b1) * (a2 @ b2)`."""
        p = view.params
        update = (p["a1"] @ p["b1"]) * (p["a2"] @ p["b2"])
        return view.w.astype(update.dtype) + self.alpha / self.rank * update

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups, by what starts at zero: `a2` is this method's B."""
        return {"a1": "a", "b1": "a", "a2": "b", "b2": "a"}


LoHa.CASES = (LoHa(rank=2, alpha=6.0),)
