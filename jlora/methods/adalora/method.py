"""AdaLoRA: a rank budget that falls while training, spent where it matters most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.gated import Gated
from jlora.core.protocol.hyperparameters import check_hyperparameters
from jlora.core.protocol.job import Recipe, allocating, half_as_many_again
from jlora.core.protocol.method import Site, Start
from jlora.core.protocol.peft import Peft
from jlora.methods.adalora.rule import AdaLoRARule
from jlora.methods.lora import trained_dtype
from jlora.optimize.allocate.budget import Phases


@dataclass(frozen=True)
class AdaLoRA(Gated):
    """Rank allocation by pruning: `w + s * (a * e) @ b`, with `a [in, rank]`, `e [rank]`, `b [rank, out]`, `s = alpha / rank`.

    Every matrix starts with `rank` ranks. The optimizer of `jlora.optimizer` scores them by smoothed sensitivity times
    uncertainty, over all matrices that share these hyperparameters, and sets `e` to zero at the worst, so that the number
    left follows `b_t = b_T + (b_0 - b_T) (1 - p)³`, `p` from 0 to 1 between `start_steps` and `steps - final_steps`. In the
    end exactly `target` ranks a matrix are left on average, more where they matter, none where they don't. The scale never
    changes. A penalty keeps `a` and `b` close to orthonormal; its gradient is added to yours. Trains `rank * (in + out + 1)`
    values a matrix.

    Costs memory for two averages of every trained value, and in every step `rank² * (in + out)` multiply-adds a matrix for the
    penalty.

    Worth trying where the total size of the adapters is tight: the ranks go where they matter.

    Args:
        rank: ranks of every matrix at the start; half as much again as `target` in the paper.
        target: ranks a matrix at the end, on average.
        alpha: numerator of the scale.
        steps: optimizer steps of the whole run; the training job fills in its own.
        start_steps: steps before the first rank is taken away.
        final_steps: steps after the last one, with the ranks that are left.
        interval: steps from one choice of ranks to the next.
        beta1: memory of the smoothed sensitivity.
        beta2: memory of the smoothed uncertainty.
        orthogonality: weight of the penalty.
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given.

    Raises:
        ValueError: for a hyperparameter out of range, or phases that leave no step for allocation.

    Example:
        >>> jlora.AdaLoRA(rank=12, target=8, alpha=16, steps=1000, start_steps=100, final_steps=300, interval=10)

    Reference:
        Zhang et al. 2023, arXiv:2303.10512. Defaults, the order of the operations and the mean (not the sum) in the penalty
        are PEFT's.
    """

    rank: int = 12
    target: int = 8
    alpha: float = 8.0
    steps: int | None = None
    start_steps: int = 0
    final_steps: int = 0
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5
    dropout: float = 0.0

    family: ClassVar[str] = "Rank allocation"
    gate: ClassVar[str] = "e"
    # The middle of what the paper's scripts have, 5e-4 to 1.2e-3; no run here chose it.
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-3, rank_means="mean rank at the end")

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("rank", "target"))
        if self.target > self.rank:
            raise ValueError(f"AdaLoRA's target ({self.target}) is above the rank that it starts with ({self.rank})")

    @classmethod
    def job(cls, rank: int, steps: int | None, **options: Any) -> AdaLoRA:
        """`rank` is what is left on average."""
        return cls(rank=half_as_many_again(rank), target=rank, **allocating(steps), **options)

    def peft(self, params: Any, frozen: Any, shared: Any) -> Peft:
        """PEFT's AdaLoRA."""
        return Peft("adalora", {name: params[name] for name in ("a", "e", "b")}, alpha=self.alpha, dropout=self.dropout)

    @property
    def phases(self) -> Phases:
        """When ranks are allocated."""
        return Phases(self.steps, self.start_steps, self.final_steps, self.interval)

    @property
    def optimizer_rule(self) -> AdaLoRARule:
        """The pruning, by one budget for all sites that agree in everything but rank, alpha and dropout."""
        return AdaLoRARule(self.phases, self.beta1, self.beta2, self.orthogonality, self.target)

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """`a` and `b` normal with deviation 0.02, `e` zero."""
        return Start(drawn(key, w, self.rank))

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups; `e` learns and decays as `a` does, as in the reference code."""
        groups = super().labels(site)
        return {**groups, "e": groups["a"]}


def drawn(key: jax.Array, w: jax.Array, rank: int) -> dict[str, jax.Array]:
    """The reference code's start: `a [in, rank]` and `b [rank, out]` normal with deviation 0.02, `e [rank]` zero."""
    key_a, key_b = jax.random.split(key)
    dtype = trained_dtype(w)
    a = 0.02 * jax.random.normal(key_a, (w.shape[0], rank), dtype)
    return {"a": a, "e": jnp.zeros(rank, dtype), "b": 0.02 * jax.random.normal(key_b, (rank, w.shape[1]), dtype)}


AdaLoRA.CASES = (
    AdaLoRA(rank=4, target=2, steps=2000, start_steps=1000, orthogonality=0.01),
    AdaLoRA(rank=3, target=3, alpha=5, steps=500, interval=7, orthogonality=0.0, dropout=0.25),
)
