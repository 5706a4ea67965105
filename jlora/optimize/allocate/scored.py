"""Rules that score ranks by moving averages of their sensitivity, and keep the factors orthonormal: AdaLoRA's and ElaLoRA's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora.optimize.allocate import orthogonality, scores, triplets
from jlora.optimize.allocate.transform import Allocation, Edit, Sites, Step
from jlora.optimize.allocate.triplets import Triplet


class Averages(NamedTuple):
    """The moving averages, laid out as the params.

    Attributes:
        sensitivity: of `|value * gradient|`.
        uncertainty: of its deviation from that.
    """

    sensitivity: Any
    uncertainty: Any


@dataclass(frozen=True)
class ScoredAllocation(Allocation):
    """Base of the rules that choose by `scores.of_ranks`; a subclass overrides `choose`.

    Attributes:
        beta1, beta2: memory of the averages of sensitivity and of uncertainty.
        orthogonality: weight of the penalty on factors that are not orthonormal.
    """

    beta1: float
    beta2: float
    orthogonality: float

    def choose(self, step: Step, score: Callable[[], list[jax.Array]]) -> list[Edit]:
        """The edits after a step. Entries whose moments an edit clears lose their averages too.

        Args:
            step: what there is to decide from.
            score: gives the scores of all ranks, `[*batch, r]` for each site; called only where a choice is made.
        """
        raise NotImplementedError

    def constrained(self, active: list[jax.Array]) -> list[jax.Array]:
        """The ranks whose factors the penalty wants orthonormal."""
        return active

    def remember(self, params: Any, moments: list[Any], sites: Sites) -> Averages:
        return Averages(*(triplets.only(jnp.zeros_like, params, sites) for _ in range(2)))

    def pull(self, factors: list[Triplet], active: list[jax.Array]) -> list[Triplet] | None:
        if not self.orthogonality:
            return None
        return orthogonality.penalty_gradient(factors, self.constrained(active), self.orthogonality)

    def decide(self, step: Step, sites: Sites) -> tuple[list[Edit], Averages]:
        """Updates the averages, then chooses; averages stay where a gradient is not finite, and from the last allocation on."""
        learning = step.sound & (step.number < self.phases.last)
        old = [triplets.read(tree, sites) for tree in step.memory]
        new = [
            scores.smoothed(mean, spread, values, gradients, self.beta1, self.beta2)
            for mean, spread, values, gradients in zip(*old, step.factors, step.gradients, strict=True)
        ]
        means, spreads = ([_where(learning, *pair) for pair in zip(news, olds)] for news, olds in zip(zip(*new), old))
        edits = self.choose(step, lambda: scores.of_sites(means, spreads))
        kept = ([_without(each, edit.forget) for each, edit in zip(values, edits)] for values in (means, spreads))
        return edits, Averages(*(triplets.write(tree, sites, values) for tree, values in zip(step.memory, kept)))


def _where(condition: jax.Array, new: Triplet, old: Triplet) -> Triplet:
    return Triplet(*(jnp.where(condition, n, o) for n, o in zip(new, old)))


def _without(values: Triplet, gone: Triplet) -> Triplet:
    return Triplet(*(v if mask is None else jnp.where(mask, jnp.zeros_like(v), v) for v, mask in zip(values, gone)))
