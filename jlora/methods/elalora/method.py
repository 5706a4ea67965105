"""ElaLoRA: ranks move between matrices while training, their total stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.gated import Gated
from jlora.core.protocol.hyperparameters import check_hyperparameters
from jlora.core.protocol.job import Recipe, allocating
from jlora.core.protocol.method import Site, Start
from jlora.methods.adalora.method import drawn
from jlora.methods.elalora.rule import ElaLoRARule
from jlora.optimize.allocate.budget import Phases


@dataclass(frozen=True)
class ElaLoRA(Gated):
    """Rank allocation by pruning and growing: `w + s * (a * e) @ b`, `a [in, r]`, `e [r]`, `b [r, out]`, `s = alpha / rank`.

    Every matrix starts with `rank` ranks in use of `r`, its `max_rank`. The optimizer of `jlora.optimizer` scores them as
    AdaLoRA does. In each round the `per_module` weakest of every matrix, but never its last, make a pool. The `moved`
    weakest of the pool are pruned, and for each of the `moved` strongest its matrix gets a new rank, so that the total stays
    exactly what it was. A new rank points at right angles to those there are and starts at `e = 1e-13`, so growing changes
    nothing yet. Pruned and new ranks have no optimizer moments. Trains `min(max_rank or 2 * rank, in, out) * (in + out + 1)`
    values a matrix, of which `rank * (in + out + 1)` are in use on average.

    Costs what AdaLoRA does for all `r` ranks, and in a round a Gram-Schmidt of all factors.

    Worth trying where AdaLoRA is: it needs no large start, and a rank can go where none was.

    Args:
        rank: ranks in use of every matrix at the start; the average stays.
        max_rank: most ranks of a matrix; room for them is kept from the start. Default: twice `rank`, or all that the matrix
            has.
        alpha: numerator of the scale.
        steps: optimizer steps of the whole run; the training job fills in its own.
        start_steps: steps before the first round.
        final_steps: steps after the last round.
        interval: steps from one round to the next.
        moved: most ranks that a round moves.
        per_module: most ranks that a round takes from one matrix, or gives to it.
        anneal: whether the number of moved ranks falls to 0 as `1 - p³`, `p` from 0 to 1 over the rounds.
        beta1: memory of the smoothed sensitivity.
        beta2: memory of the smoothed uncertainty.
        orthogonality: weight of the penalty on `a` and `b` that are not orthonormal.
        seed: of the new ranks' directions.
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given.

    Raises:
        ValueError: for a hyperparameter out of range, or phases that leave no step for allocation.

    Example:
        >>> jlora.ElaLoRA(rank=8, alpha=16, steps=1000, start_steps=100, final_steps=100, interval=50)

    Reference:
        Chang et al. 2025, arXiv:2504.00254. Unlike its code: new directions are orthogonal also where the old ones are not
        orthonormal, equal scores never prune more than was asked, and the moments of other ranks stay.
    """

    rank: int = 10
    max_rank: int | None = None
    alpha: float = 16.0
    steps: int | None = None
    start_steps: int = 1
    final_steps: int = 1
    interval: int = 10
    moved: int = 4
    per_module: int = 2
    anneal: bool = True
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.1
    seed: int = 0
    dropout: float = 0.0

    family: ClassVar[str] = "Rank allocation"
    gate: ClassVar[str] = "e"
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-3)  # as AdaLoRA's, for the same reason

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("rank", "moved", "per_module", "max_rank"))

    @classmethod
    def job(cls, rank: int, steps: int | None, **options: Any) -> ElaLoRA:
        """Phases as AdaLoRA's."""
        return cls(rank=rank, **allocating(steps), **options)

    @property
    def phases(self) -> Phases:
        """When ranks are moved."""
        return Phases(self.steps, self.start_steps, self.final_steps, self.interval)

    @property
    def optimizer_rule(self) -> ElaLoRARule:
        """The rounds, with one total of ranks for all sites that agree in everything but ranks, alpha and dropout."""
        averages = (self.beta1, self.beta2, self.orthogonality)
        return ElaLoRARule(self.phases, *averages, self.moved, self.per_module, self.anneal, self.seed)

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """`a` and `b` normal with deviation 0.02 where a rank is in use, all else zero."""
        room = min(self.max_rank or 2 * self.rank, *w.shape)
        in_use = jnp.arange(room) < self.rank
        params = drawn(key, w, room)
        a, b = (jnp.where(mask, params[name], 0) for name, mask in (("a", in_use[None, :]), ("b", in_use[:, None])))
        return Start({"a": a, "e": params["e"], "b": b})

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups; `e` learns and decays as `a` does, as in the reference code."""
        groups = super().labels(site)
        return {**groups, "e": groups["a"]}


# No room to grow: ranks out of use stay zero between rounds, so the contract's target, which uses all ranks, could not be
# learned. Growth is tested in tests/allocate.
ElaLoRA.CASES = (
    ElaLoRA(rank=4, max_rank=4, steps=2000, interval=50),
    ElaLoRA(rank=3, max_rank=3, alpha=5, steps=500, orthogonality=0.0, dropout=0.25),
)
