"""SoRA's rule: after every step a soft threshold on the gates, which leaves those of ranks that are not needed at zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora.optimize.allocate import budget, triplets
from jlora.optimize.allocate.budget import Phases
from jlora.optimize.allocate.transform import Allocation, Edit, Sites, Step
from jlora.optimize.allocate.triplets import Fields, Triplet


@dataclass(frozen=True)
class SoRARule(Allocation):
    """Turns the optimizer's step `u` of the gates into `T(g + u) - g`, with the threshold of the step.

    Where the threshold is zero, the step is the optimizer's own, bit for bit.

    Attributes:
        thresholds: one for each stage; stages are equally long, and the first threshold also holds before them.
        l1: weight of the mean of `|g|` over all gates, which is added to the loss.
        target: None, or ranks a module, on average, in the end.
    """

    thresholds: tuple[float, ...]
    l1: float
    target: int | None

    name: ClassVar[str] = "SoRA"
    fields: ClassVar[Fields] = ("a", "g", "b")

    def begin(self, factors: list[Triplet]) -> list[jax.Array]:
        """The masks of the ranks in use at the start: those whose gate is not zero."""
        return [factor.e != 0 for factor in factors]

    def pull(self, factors: list[Triplet], active: list[jax.Array]) -> list[Triplet] | None:
        """The gradient of `l1 * mean |g|`, which is 0 where a gate is zero."""
        if not self.l1:
            return None
        share = self.l1 / sum(factor.e.size for factor in factors)
        return [Triplet(None, share * jnp.sign(factor.e), None) for factor in factors]

    def decide(self, step: Step, sites: Sites) -> tuple[list[Edit], tuple[()]]:
        """Applies the threshold; with a target also chooses, at the last allocation and for good, the gates that stay."""
        settled = (step.number >= self.phases.last) & (self.target is not None)
        threshold = jnp.where((step.number > self.phases.last) & settled, 0, self._threshold(step.number))
        gates = [soft_threshold(factor.e, threshold) for factor in step.factors]
        kept = self._kept(step, gates, settled)
        edits = [_edit(gate, mask, threshold, settled) for gate, mask in zip(gates, kept)]
        return edits, ()

    def _threshold(self, step: jax.Array) -> jax.Array:
        starts = stage_starts(self.phases, len(self.thresholds))
        return jnp.asarray(self.thresholds, jnp.float32)[jnp.sum(starts <= step) - 1]

    def _kept(self, step: Step, gates: list[jax.Array], settled: jax.Array) -> list[jax.Array]:
        """The ranks that may be in use: all, until a target settles them."""
        if self.target is None:
            return [jnp.ones(gate.shape, bool) for gate in gates]
        modules = sum(math.prod(gate.shape[:-1]) for gate in gates)
        best = largest_gates(gates, self.target * modules)
        now = step.number == self.phases.last
        return [jnp.where(now, new, old | ~settled) for new, old in zip(best, step.active)]


def soft_threshold(gate: jax.Array, threshold: jax.Array | float) -> jax.Array:
    """`T(g) = sign(g) max(|g| - threshold, 0)`, the proximal step of `threshold * |g|`; for a threshold of 0 `g` itself."""
    shrunk = jnp.sign(gate) * jnp.maximum(jnp.abs(gate) - threshold, 0).astype(gate.dtype)
    return jnp.where(threshold > 0, shrunk, gate)


def largest_gates(gates: Sequence[jax.Array], count: int) -> list[jax.Array]:
    """Masks of exactly `count` gates, the largest in size of all modules; of equal ones the first."""
    sizes = [jnp.nan_to_num(jnp.abs(gate)) for gate in gates]
    exists = triplets.table([jnp.ones(gate.shape, bool) for gate in gates], False)
    return triplets.split(budget.largest(triplets.table(sizes, 0), count, exists), sizes)


def stage_starts(phases: Phases, stages: int) -> np.ndarray:
    """The first step of every stage, int32 `[stages]`: 0 for the first, then equal shares of the steps between the phases."""
    length = phases.last - phases.start_steps
    later = [phases.start_steps + 1 - (-number * length // stages) for number in range(1, stages)]
    return np.array([0, *later], np.int32)


def _edit(gate: jax.Array, kept: jax.Array, threshold: jax.Array, settled: Any) -> Edit:
    where = (threshold > 0) | ~kept
    value = jnp.where(kept, gate, jnp.zeros_like(gate))
    active = jnp.where(settled, kept, value != 0)
    return Edit(active, Triplet(None, where, None), Triplet(None, value, None), triplets.along_rank(~kept))
