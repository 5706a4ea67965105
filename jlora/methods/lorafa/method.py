"""LoRA-FA: LoRA whose first factor is frozen, with the gradient of the other set right for that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.hyperparameters import check_hyperparameters, check_rank, one_of
from jlora.core.protocol.method import Factors, Method, Site, Start, View, factor_labels
from jlora.core.protocol.peft import Peft
from jlora.methods.lora import SCALINGS, kaiming, lora_scale, trained_dtype
from jlora.methods.lorafa.rule import LoRAFARule


@dataclass(frozen=True)
class LoRAFA(Method):
    """LoRA with the first factor frozen: `w + s * a @ b` with a random constant `a [in, rank]`, and `b [rank, out]` trained.

    `s = alpha / rank`, or `alpha / sqrt(rank)` with `scaling="rslora"`. `b` starts at zero, so the start is the base's output.
    Trains `rank * out` values a matrix.

    The optimizer sees the gradient of `b` as `(a.T @ a + 1e-8)^-1 @ g / s²`: the one by which a small step changes the weight
    as closely as `a` allows to how the weight's own gradient would. `jlora.optimizer` and `jlora.with_rules` put that around
    the optimizer, by the `a` of the adapters that they are given.

    Worth trying where activations fill the memory: the backward pass keeps `x @ a` of an adapted product, but not `x`, unless
    something else needs it. Costs in a step one product `[rank, rank] @ [rank, out]` a matrix beyond LoRA's.

    Args:
        rank: columns of `a`; at most the smaller side of the matrix.
        alpha: numerator of the scale.
        scaling: "standard" or "rslora".
        precondition: whether the gradient is changed so; else `b` is trained by its own.
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given.

    Raises:
        ValueError: for a hyperparameter out of range.

    Reference:
        Zhang et al. 2023, arXiv:2308.03303; the gradient as in PEFT's `create_lorafa_optimizer`.
    """

    rank: int = 8
    alpha: float = 8.0
    scaling: str = "standard"
    precondition: bool = True
    dropout: float = 0.0

    family: ClassVar[str] = "LoRA and its variants"
    local: ClassVar[frozenset[str]] = frozenset({"in", "out"})

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("rank",), {"scaling": one_of(SCALINGS)})

    @property
    def scale(self) -> float:
        """`s`, the factor of `a @ b`."""
        return lora_scale(self.alpha, self.rank, self.scaling)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        return {"a": ("in", "rank"), "b": ("rank", "out")}

    @property
    def uses_key(self) -> bool:
        return self.dropout > 0

    @property
    def optimizer_rule(self) -> LoRAFARule | None:
        """The change of the gradient."""
        return LoRAFARule(self.scale) if self.precondition else None

    def check(self, site: Site) -> None:
        """Refuses a rank above the matrix's sides."""
        check_rank(self, site)

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """LoRA's: `a` uniform in ±1/sqrt(in), `b` zero."""
        dtype = trained_dtype(w)
        a = kaiming(key, (w.shape[0], self.rank), dtype)
        return Start({"b": jnp.zeros((self.rank, w.shape[1]), dtype)}, {"a": a})

    def weight(self, view: View) -> jax.Array:
        """`w + s * a @ b`."""
        b = view.params["b"]
        return view.w.astype(b.dtype) + self.scale * (view.frozen["a"] @ b)

    def factors(self, view: View) -> Factors:
        """`a` and `s * b`."""
        return Factors(view.frozen["a"], self.scale * view.params["b"], dropout=self.dropout)

    def peft(self, params: Any, frozen: Any, shared: Any) -> Peft:
        """PEFT's LoRA: which factors are trained is no part of its files."""
        root = self.scaling == "rslora"
        return Peft("lora", {"a": frozen["a"], "b": params["b"]}, {}, self.alpha, root, self.dropout)

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s group of `b`."""
        return factor_labels(site, {"b": "b"})


LoRAFA.CASES = (LoRAFA(rank=4, alpha=3), LoRAFA(rank=2, scaling="rslora", precondition=False, dropout=0.25))
