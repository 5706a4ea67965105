"""MultiLoRA: several LoRAs side by side, each with trained scales that start at zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.hyperparameters import check_hyperparameters, check_rank
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Factors, Method, Site, Start, View, factor_labels
from jlora.methods.lora import kaiming, trained_dtype


@dataclass(frozen=True)
class MultiLoRA(Method):
    """Parallel LoRAs with trained scales: `w + alpha / rank * sum of (a_i @ b_i) * s_i` over `branches` of them.

    `a [branches, in, rank]` and `b [branches, rank, out]` are both drawn as LoRA's `a`, and `s [branches, out]`, one scale
    for each output, starts at zero. So the start is the base's output, and unlike in LoRA `s` alone has a gradient in the
    first step. Trains `branches * (rank * (in + out) + out)` values a matrix.

    LoRA's updates lie mostly in a few singular directions; with several branches that start at full size they are spread
    more evenly, which the paper finds better for training on many tasks at once. Worth trying there. Costs in a step what
    LoRA of rank `branches * rank` does. `s` is in the group "vector": it never decays, and LoRA+'s ratio raises its rate.

    The paper says that the scales are learned and start at zero; that there is one for each output is how a public
    implementation has it, from which the number of branches is too.

    Args:
        rank: rank of every branch; at most the smaller side of the matrix.
        branches: number of LoRAs.
        alpha: numerator of the fixed part of the scale.
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given.

    Raises:
        ValueError: for a hyperparameter out of range.

    Reference:
        Wang et al. 2023, arXiv:2311.11501.
    """

    rank: int = 8
    branches: int = 3
    alpha: float = 8.0
    dropout: float = 0.0

    family: ClassVar[str] = "LoRA and its variants"
    local: ClassVar[frozenset[str]] = frozenset({"in", "out"})

    recipe: ClassVar[Recipe] = Recipe(rank_means="rank of every branch")

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("rank", "branches"))

    @property
    def scale(self) -> float:
        """The fixed part of the scale, `alpha / rank`."""
        return self.alpha / self.rank

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        return {"a": ("", "in", "rank"), "b": ("", "rank", "out"), "s": ("", "out")}

    @property
    def uses_key(self) -> bool:
        return self.dropout > 0

    def check(self, site: Site) -> None:
        """Refuses a rank above the matrix's sides."""
        check_rank(self, site)

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """Both factors of every branch uniform in ±1/sqrt(rows), all scales zero."""
        dtype, (rows, columns) = trained_dtype(w), w.shape
        key_a, key_b = (jax.random.split(each, self.branches) for each in jax.random.split(key))
        a = jnp.stack([kaiming(each, (rows, self.rank), dtype) for each in key_a])
        b = jnp.stack([kaiming(each, (self.rank, columns), dtype) for each in key_b])
        return Start({"a": a, "b": b, "s": jnp.zeros((self.branches, columns), dtype)})

    def weight(self, view: View) -> jax.Array:
        """`w + alpha / rank * sum of (a_i @ b_i) * s_i`."""
        a, b, s = (view.params[name] for name in "abs")
        return view.w.astype(a.dtype) + self.scale * jnp.einsum("nir,nro,no->io", a, b, s)

    def factors(self, view: View) -> Factors:
        """One LoRA of rank `branches * rank`: all `a` beside each other, and below each other all `b` with their scales."""
        a, b, s = (view.params[name] for name in "abs")
        wide, tall = (view.w.shape[0], -1), (-1, view.w.shape[1])
        b = (b * (self.scale * s)[:, None]).reshape(tall)
        return Factors(jnp.moveaxis(a, 0, 1).reshape(wide), b, dropout=self.dropout)

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups of the factors; the scales are vectors, though all branches have theirs in one array."""
        return {**factor_labels(site, {"a": "a", "b": "b"}), "s": "vector"}


MultiLoRA.CASES = (MultiLoRA(rank=2, alpha=3), MultiLoRA(rank=3, branches=2, dropout=0.25))
