"""RAC-LoRA: one factor is random and stays so for a link."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.hyperparameters import check_hyperparameters, one_of
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Factors, Method, Site, Start, View
from jlora.methods.chain import chained
from jlora.methods.lora import LoRA, trained_dtype

DRAWS = ("gaussian", "orthonormal")


@dataclass(frozen=True)
class RACLoRA(Method):
    """Randomised asymmetric adaptation: `w + s * a @ b` with one of `a [in, rank]`, `b [rank, out]` random and fixed.

    `s = alpha / rank`. The other factor starts at zero, so the start is the base's output. Trains
    `rank * (out if frozen == "in" else in)` values a matrix. Costs half of LoRA's optimizer memory. Meant for a
    chain: `jlora.restart` (or `Chain(RACLoRA(...))`) draws the random factor anew for each link, which makes the whole a
    gradient descent in random subspaces, with guarantees that LoRA's fixed subspace lacks. One gradient step from zero
    with `draw="orthonormal"` is exactly `w - rate * s² * H @ G` (`frozen="in"`), or `w - rate * s² * G @ H`, with `G` the
    weight's gradient and `H` the projector on the random subspace; with `rank` equal to that side it is a step of full
    gradient descent. The price is the rate: a factor of `rank / in` (or `rank / out`) in theory.

    Args:
        rank: columns of `a`; at most the smaller side of the matrix.
        alpha: numerator of the scale.
        frozen: the side of the random factor: "in" for `a`, "out" for `b`. (Sources disagree which letter is which.)
        draw: "gaussian", independent normal entries with deviation 1/sqrt(in) or 1/sqrt(out), so that the columns are
            about of length one (a choice of this library: alpha scales it); or "orthonormal", the same subspace with an
            orthonormal basis, for which gradient descent is the projected step.
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given.

    Raises:
        ValueError: for a rank, alpha, dropout or name out of range.

    Example:
        >>> jlora.Chain(jlora.RACLoRA(rank=8, alpha=16, frozen="in"), links=4)

    Reference:
        Malinovsky et al. 2024, arXiv:2410.08305.
    """

    rank: int = 8
    alpha: float = 8.0
    frozen: str = "in"
    draw: str = "gaussian"
    dropout: float = 0.0

    family: ClassVar[str] = "Chains of adapters"
    local: ClassVar[frozenset[str]] = frozenset({"in", "out"})

    def __post_init__(self) -> None:
        sides = one_of(("in", "out"), '"in" (a is random) or "out" (b is)')
        check_hyperparameters(self, ("rank",), {"frozen": sides, "draw": one_of(DRAWS)}, RACLoRA)

    @classmethod
    def recipes(cls) -> dict[str, Recipe]:
        """In a chain, for which it is meant."""
        return chained("raclora", cls)

    @property
    def scale(self) -> float:
        """`s`, the factor of `a @ b`."""
        return self.alpha / self.rank

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        return {"a": ("in", "rank"), "b": ("rank", "out")}

    @property
    def uses_key(self) -> bool:
        return self.dropout > 0

    def check(self, site: Site) -> None:
        """Refuses a rank above the matrix's sides."""
        LoRA(self.rank).check(site)

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """Draws the random factor; the other is zero."""
        dtype = trained_dtype(w)
        side = w.shape[0] if self.frozen == "in" else w.shape[1]
        if self.draw == "orthonormal":
            basis = jnp.linalg.qr(jax.random.normal(key, (side, self.rank), dtype))[0]
        else:
            basis = jax.random.normal(key, (side, self.rank), dtype) / math.sqrt(side)
        if self.frozen == "in":
            return Start({"b": jnp.zeros((self.rank, w.shape[1]), dtype)}, {"a": basis})
        return Start({"a": jnp.zeros((w.shape[0], self.rank), dtype)}, {"b": basis.T})

    def weight(self, view: View) -> jax.Array:
        """`w + s * a @ b`."""
        a, b = self._both(view)
        return view.w.astype(a.dtype) + self.scale * (a @ b)

    def factors(self, view: View) -> Factors:
        """`a` and `s * b`."""
        a, b = self._both(view)
        return Factors(a, self.scale * b, dropout=self.dropout)

    def _both(self, view: View) -> tuple[jax.Array, jax.Array]:
        both = {**view.params, **view.frozen}
        return both["a"], both["b"]

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s group of the trained factor."""
        return {"b": "b"} if self.frozen == "in" else {"a": "a"}


RACLoRA.CASES = (RACLoRA(rank=4, alpha=8), RACLoRA(rank=8, frozen="out", draw="orthonormal", dropout=0.25))
