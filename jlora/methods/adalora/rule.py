"""AdaLoRA's rule: ranks are taken away along a cubic budget, by one comparison over all modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.optimize.allocate import budget, triplets
from jlora.optimize.allocate.scored import ScoredAllocation
from jlora.optimize.allocate.transform import Edit, Step
from jlora.optimize.allocate.triplets import NOTHING, Triplet


@dataclass(frozen=True)
class AdaLoRARule(ScoredAllocation):
    """Keeps the ranks with the best scores, as many as the budget of the step; sets `e` to zero at all others.

    Gradients still reach the ranks that were taken away, and until the last allocation they may come back. From then on the
    choice is final: their `e` is zero at every later step. Their moments are never cleared, since the penalty goes on moving
    their `a` and `b`, and through them those of the ranks that are left.

    Attributes:
        target: ranks a module, on average, in the end.
    """

    target: int

    name: ClassVar[str] = "AdaLoRA"

    def choose(self, step: Step, score: Callable[[], list[jax.Array]]) -> list[Edit]:
        """A new choice at every interval and at the last allocation, and that one for good after it."""
        phases, t = self.phases, step.number
        now = (t > phases.start_steps) & (t <= phases.last) & ((t % phases.interval == 0) | (t == phases.last))
        count = self._budget(step.active, t)
        active = jax.lax.cond(now, lambda: _best(score(), count), lambda: step.active)
        settled = t >= phases.last
        return [_edit(mask, factor, now | settled) for mask, factor in zip(active, step.factors)]

    def constrained(self, active: list[jax.Array]) -> list[jax.Array]:
        """All ranks, since any may come back, as in the reference code."""
        return [jnp.ones_like(mask) for mask in active]

    def _budget(self, active: list[jax.Array], step: jax.Array) -> jax.Array:
        first = sum(mask.size for mask in active)
        modules = sum(mask.size // mask.shape[-1] for mask in active)
        schedule = budget.cubic_budget(self.phases, first, min(first, self.target * modules))
        return budget.after(first, budget.falls(schedule, self.phases.start_steps, self.phases.last), step)


def _edit(active: jax.Array, factor: Triplet, masks: jax.Array) -> Edit:
    where, value = Triplet(None, masks & ~active, None), Triplet(None, jnp.zeros_like(factor.e), None)
    return Edit(active, where, value, NOTHING)


def _best(found: list[jax.Array], count: jax.Array) -> list[jax.Array]:
    exists = triplets.table([jnp.ones(score.shape, bool) for score in found], False)
    return triplets.split(budget.largest(triplets.table(found, 0), count, exists), found)
