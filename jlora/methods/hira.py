"""HiRA: a low-rank factor of every entry of the weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from jlora.core.protocol.hyperparameters import check_hyperparameters, check_rank, one_of
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Method, Site, Start, View
from jlora.core.protocol.peft import PeftKind, PeftSetting, PeftTensor
from jlora.methods.lora import kaiming, trained_dtype


@dataclass(frozen=True)
class HiRA(Method):
    """Hadamard high-rank adaptation: `w * (1 + a @ b)` entry by entry, with `a [in, rank]`, `b [rank, out]`.

    The update `w * (a @ b)` has a rank of up to `rank * rank(w)`, with LoRA's values. There is no scale: the weight itself is
    it. `b` starts at zero, so the start is the base's output. Trains `rank * (in + out)` values a matrix.

    Worth trying where LoRA's rank is too low. Entries of the base that are zero stay zero. Costs forming the
    update in every pass.

    Args:
        rank: columns of `a`; at most the smaller side of the matrix.
        init: how `a` is drawn: "kaiming", uniform in ±1/sqrt(in); "gaussian", normal with deviation 1/rank.

    Raises:
        ValueError: for a rank or a name out of range.

    Example:
        >>> jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.HiRA(rank=8)})

    Reference:
        Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", ICLR; starting
        values as in PEFT.
    """

    rank: int = 32
    init: str = "kaiming"

    family: ClassVar[str] = "Structured updates"
    local: ClassVar[frozenset[str]] = frozenset({"in", "out"})
    recipe: ClassVar[Recipe] = Recipe(rank=32)

    # PEFT 0.21 has a rank_pattern in HiRA's configuration that it does not use.
    peft_kind: ClassVar[PeftKind] = PeftKind(
        "HIRA",
        tensors=(PeftTensor("hira_A", "a", "transposed"), PeftTensor("hira_B", "b", "transposed")),
        settings=(PeftSetting("r", "rank", 32),),
        unused=("rank_pattern",),
        training=("hira_dropout",),
        fan_in_fan_out=True,
    )

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("rank",), {"init": one_of(("kaiming", "gaussian"))})

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        return {"a": ("in", "rank"), "b": ("rank", "out")}

    def check(self, site: Site) -> None:
        """Refuses a rank above the matrix's sides."""
        check_rank(self, site)

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """`a` by `init`, `b` zero."""
        shape, dtype = (w.shape[0], self.rank), trained_dtype(w)
        gaussian = self.init == "gaussian"
        a = jax.random.normal(key, shape, dtype) / self.rank if gaussian else kaiming(key, shape, dtype)
        return Start({"a": a, "b": jnp.zeros((self.rank, w.shape[1]), dtype)})

    @classmethod
    def joined(cls, methods: Sequence[Self]) -> tuple[Self, list[float]]:
        """With the largest rank; there is no scale."""
        return cls(max(each.rank for each in methods)), [1.0] * len(methods)

    def weight(self, view: View) -> jax.Array:
        """`w * (1 + a @ b)`, as `w + w * (a @ b)`: so a small update is not rounded beside the 1."""
        a, b = view.params["a"], view.params["b"]
        w = view.w.astype(b.dtype)
        return w + w * (a @ b)

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups."""
        return {"a": "a", "b": "b"}


HiRA.CASES = (HiRA(rank=2), HiRA(rank=3, init="gaussian"))
