"""AdaMix: several copies of LoRA's factors, one drawn for each training step, their mean at inference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.products.low_rank import Factors
from jlora.core.products.one_of import OneOf
from jlora.core.protocol.hyperparameters import check_hyperparameters, check_rank, integer
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Method, Site, Start, View, factor_labels
from jlora.core.protocol.plain import PlainLoRA
from jlora.methods.lora import kaiming, trained_dtype


@dataclass(frozen=True)
class AdaMix(Method):
    """Mixture of adaptations: `w + alpha / rank * mean(a) @ mean(b)` over `experts` copies `a [experts, in, rank]`.

    Where the call gives a key, `adapted.replace(context={"dropout": key})`, one copy is drawn for each matrix and call:
    `w + alpha / rank * a_i @ b_j`. So train with a key, and infer without. `b` is `[1, rank, out]`, one that all copies of `a`
    share, or `[experts, rank, out]` where `shared_b` is False. All copies of `a` start alike, as LoRA's, and `b` zero. Trains
    `experts * rank * in + (1 if shared_b else experts) * rank * out` values a matrix.

    The copies are kept near each other by a second loss on two draws: `jlora.losses.agreement`. The mean of their factors then
    does what the mean of their outputs would, at the price of one LoRA; `jlora.compact` makes that LoRA.

    Worth trying where LoRA's result depends much on the seed. Costs in a step what LoRA does, and with the second loss a
    second forward and backward pass.

    Args:
        rank: columns of every copy of `a`; at most the smaller side of the matrix.
        experts: number of copies.
        shared_b: whether all have one `b`, as in the released runs.
        alpha: numerator of the scale.

    Raises:
        ValueError: for a hyperparameter out of range.

    Example:
        >>> adapted = jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.AdaMix(rank=4)})
        >>> drawn = adapted.replace(context={"dropout": jax.random.key(1)})

    Reference:
        Wang et al. 2022, arXiv:2205.12410; its LoRA form.
    """

    rank: int = 8
    experts: int = 4
    shared_b: bool = True
    alpha: float = 8.0

    family: ClassVar[str] = "LoRA and its variants"
    local: ClassVar[frozenset[str]] = frozenset({"in", "out"})
    form = OneOf
    recipe: ClassVar[Recipe] = Recipe(rank_means="rank of every copy")

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("rank",), {"experts": integer(2, "a whole number of at least 2")})

    @property
    def scale(self) -> float:
        """The factor of the product, `alpha / rank`."""
        return self.alpha / self.rank

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        return {"a": ("", "in", "rank"), "b": ("", "rank", "out")}

    @property
    def uses_key(self) -> bool:
        return True

    def check(self, site: Site) -> None:
        """Refuses a rank above the matrix's sides."""
        check_rank(self, site)

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """Copies of LoRA's `a`, uniform in ±1/sqrt(in), and `b` zero."""
        dtype = trained_dtype(w)
        a = kaiming(key, (w.shape[0], self.rank), dtype)
        b = jnp.zeros((1 if self.shared_b else self.experts, self.rank, w.shape[1]), dtype)
        return Start({"a": jnp.tile(a, (self.experts, 1, 1)), "b": b})

    def weight(self, view: View) -> jax.Array:
        """`w + alpha / rank * mean(a) @ mean(b)`."""
        return self._mean(view).weight(view.w)

    def update(self, view: View) -> OneOf:
        """All copies, and their mean."""
        return OneOf(self._mean(view), view.params["a"], self.scale * view.params["b"])

    def plain(self, view: View) -> PlainLoRA:
        """LoRA by the mean factors."""
        a, b = view.params["a"].mean(0), view.params["b"].mean(0)
        return PlainLoRA(a, jnp.ones(self.rank, a.dtype), b, self.scale)

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups."""
        return factor_labels(site, {"a": "a", "b": "b"})

    def _mean(self, view: View) -> Factors:
        return Factors(view.params["a"].mean(0), self.scale * view.params["b"].mean(0))


AdaMix.CASES = (AdaMix(rank=2, experts=3), AdaMix(rank=2, experts=2, shared_b=False, alpha=5))
