"""ALoRA: ranks are switched off one by one to find the worst, which go to other matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.gated import Gated
from jlora.core.protocol.hyperparameters import check_hyperparameters
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Site, Start
from jlora.methods.alora.rule import ALoRARule, Round
from jlora.methods.lora import LoRA
from jlora.optimize.allocate.budget import Phases


@dataclass(frozen=True)
class ALoRA(Gated):
    """Rank allocation by ablation: `w + s * (a * gate) @ b`, with `gate [r]` of 0 and 1, `s = alpha / rank`.

    Every matrix starts with `rank` ranks in use of `r`, its `max_rank`. Between some steps there is a round
    (`jlora.reallocate`): every rank is scored on one held-out batch by the loss with it alone and the loss without it, the
    `pruned` worst are taken away, and the matrices that lost none get as many. Where those have no room, or every matrix would
    lose one, fewer are taken away: the total stays. Ranks out of use are zero, and so are their moments. Trains
    `min(max_rank or 2 * rank, in, out) * (in + out)` values a matrix, of which `rank * (in + out)` are in use on average.

    Costs two forward passes a rank on the held-out batch in each round, and nothing in other steps. The training job has
    held-out data; other loops hand it over by `jlora.run_events(adapted, opt_state, tx, key, step, loss, batches)`.

    Args:
        rank: ranks in use of every matrix at the start.
        max_rank: most ranks of a matrix; room for them is kept from the start. Default: twice `rank`, or the
            matrix's smaller side where that is less. (The paper sets no bound.)
        alpha: numerator of the scale.
        steps: optimizer steps of the whole run; the training job fills in its own.
        start_steps: steps before the first round, which comes right after them.
        final_steps: steps after the last round.
        interval: steps from one round to the next.
        pruned: ranks that a round prunes; None for as many as there are adapted matrices in the model. (The paper defines the
            number as that of one block's modules, and then uses it for the whole model's.)
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given.

    Raises:
        ValueError: for a hyperparameter out of range, or phases that leave no step for a round.

    Example:
        >>> jlora.ALoRA(rank=8, alpha=16, steps=1200, start_steps=400, final_steps=100, interval=100)

    Reference:
        Liu et al. 2024, arXiv:2403.16187. The paper states neither the scale of a matrix whose rank has changed (here still
        `alpha / rank`) nor how new ranks start (here as LoRA's). In the paper the total falls where every matrix loses a rank.
    """

    rank: int = 8
    max_rank: int | None = None
    alpha: float = 8.0
    steps: int | None = None
    start_steps: int = 0
    final_steps: int = 0
    interval: int = 100
    pruned: int | None = None
    dropout: float = 0.0

    family: ClassVar[str] = "Rank allocation"

    recipe: ClassVar[Recipe] = Recipe(rank_means="mean rank")

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("rank", "max_rank", "pruned"))

    @classmethod
    def job(cls, rank: int, steps: int | None, **options: Any) -> ALoRA:
        """The paper's shares of its run: a third, then eight rounds of a twelfth each."""
        number = steps or 0
        start, interval = number // 3, max(1, number // 12)
        final = max(0, number - start - 7 * interval)
        return cls(rank, steps=steps, start_steps=start, final_steps=final, interval=interval, **options)

    @property
    def phases(self) -> Phases:
        """When there are rounds."""
        return Phases(self.steps, self.start_steps, self.final_steps, self.interval)

    @property
    def alike(self) -> frozenset[str]:
        """All matrices start with the same gate."""
        return frozenset({"gate"})

    @property
    def optimizer_rule(self) -> ALoRARule:
        """Keeps a record of the ranks, one for all sites that agree in everything but rank, alpha and dropout."""
        return ALoRARule(self.phases, self.pruned)

    @property
    def event(self) -> Round:
        """The rounds, in which the sites of one record share one total of ranks."""
        return Round(self.phases, self.pruned)

    def drawn(self, rank: int) -> LoRA:
        """What draws the factors of new ranks."""
        return LoRA(rank)

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """LoRA's factors where a rank is in use, all else zero."""
        room = min(self.max_rank or 2 * self.rank, *w.shape)
        in_use = jnp.arange(room) < self.rank
        a, b = (self.drawn(room).start(key, w, site).params[name] for name in "ab")
        fields = {"a": jnp.where(in_use[None, :], a, 0), "b": jnp.where(in_use[:, None], b, 0)}
        return Start(fields, {"gate": in_use.astype(a.dtype)})


ALoRA.CASES = (
    ALoRA(rank=4, max_rank=4, steps=2000),
    ALoRA(rank=2, max_rank=3, alpha=5, steps=500, interval=7, pruned=1, dropout=0.25),
)
