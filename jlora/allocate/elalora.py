"""ElaLoRA's rule: each round moves a few ranks from where they matter least to where even the weakest matter."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.allocate import budget, orthogonality, scores, triplets
from jlora.allocate.transform import Allocation, Edit, Sites, Step
from jlora.allocate.triplets import Triplet
from jlora.method import Site

# The paper's code: a new rank starts at this, so that it changes nothing and yet has a gradient in every factor.
_START = 1e-13


@dataclass(frozen=True)
class ElaLoRARule(Allocation):
    """Prunes and grows the same number of ranks a round, so that their total never changes.

    A rank out of use is zero in all factors, in its moments and in its averages.

    Attributes:
        moved: most ranks that a round moves; fewer as the run goes on, if `anneal`.
        per_module: most ranks that a round takes from, or gives to, one module.
        anneal: whether the number falls as `1 - p³` over the part `p` of the allocation that is over.
        seed: of the new ranks' random directions.
    """

    moved: int
    per_module: int
    anneal: bool
    seed: int

    name: ClassVar[str] = "ElaLoRA"

    def begin(self, factors: list[Triplet]) -> list[jax.Array]:
        """Those whose column of `a` is not zero."""
        return [jnp.any(factor.a != 0, axis=-2) for factor in factors]

    def decide(self, step: Step, sites: Sites) -> list[Edit]:
        """A round at every interval before the last allocation."""
        phases, t = self.phases, step.number
        count = self._count(t)
        due = (t - phases.start_steps) % phases.interval == 0
        now = (t > phases.start_steps) & (t < phases.last) & due & (count > 0)

        def stay():
            return step.active, [jnp.zeros_like(mask) for mask in step.active], step.factors

        active, grown, factors = jax.lax.cond(now, lambda: self._round(step, sites, count), stay)
        return [_edit(*each) for each in zip(active, grown, factors, strict=True)]

    def _count(self, step: jax.Array) -> jax.Array:
        if not self.anneal:
            return jnp.asarray(self.moved, jnp.int32)
        schedule = budget.cubic_moves(self.phases, self.moved)
        return budget.after(self.moved, budget.falls(schedule, self.phases.start_steps, self.phases.last), step)

    def _round(self, step: Step, sites: Sites, count: jax.Array) -> tuple[list, list, list]:
        """The masks after a round, those of the new ranks, and the factors with the new ranks in place."""
        found = scores.of_sites(step.sensitivity, step.uncertainty)
        whole = triplets.table(step.active, False)
        slots = triplets.table([jnp.ones_like(mask) for mask in step.active], False)
        kept, grows = exchange(triplets.table(found, 0), whole, slots, count, self.per_module)
        free = slots & ~whole
        grown = free & (jnp.cumsum(free, axis=-1) <= grows[:, None])
        keeps, news = triplets.split(kept, found), triplets.split(grown, found)
        key = jax.random.fold_in(jax.random.key(self.seed), step.number)
        factors = [_grow(key, *each) for each in zip(sites, step.factors, keeps, news, strict=True)]
        return [keep | new for keep, new in zip(keeps, news)], news, factors


def exchange(
    scores: jax.Array, active: jax.Array, slots: jax.Array, count: jax.Array | int, per_module: int
) -> tuple[jax.Array, jax.Array]:
    """One round's choice: the masks that remain, and how many ranks each module gets.

    The `per_module` weakest ranks of every module, but never its last one, make a pool. The modules of the pool's `count`
    strongest get a rank for each, as far as they have free slots; then exactly as many of the pool's weakest are pruned.

    Args:
        scores: finite, `[modules, r]`.
        active: mask of the ranks in use.
        slots: mask of the ranks that a module has at all.
        count: ranks to move, at most.
        per_module: see above.
    """
    held, room = jnp.sum(active, axis=-1), jnp.sum(slots & ~active, axis=-1)
    pool = active & (budget.positions(jnp.where(active, scores, jnp.inf)) < jnp.minimum(per_module, held - 1)[:, None])
    # A module's strongest pooled rank stands for its first new one, and so on: as many may stand as there is room.
    standing = pool & (budget.positions(jnp.where(pool, -scores, jnp.inf)) < room[:, None])
    count = jnp.minimum(count, jnp.sum(standing))
    grows = jnp.sum(budget.largest(scores, count, standing), axis=-1)
    return active & ~budget.largest(-scores, count, pool), grows


def _grow(key: jax.Array, site: Site, factor: Triplet, keep: jax.Array, new: jax.Array) -> Triplet:
    """The factors with new ranks: unit vectors at right angles to those that remain, and a tiny `e`."""
    keys = jax.random.split(jax.random.fold_in(key, zlib.crc32(site.path.encode())))
    a, b = factor.a, jnp.matrix_transpose(factor.b)
    columns = [
        orthogonality.with_new_columns(m, keep, new, jax.random.normal(k, m.shape, m.dtype))
        for k, m in zip(keys, (a, b))
    ]
    least = jnp.min(jnp.where(keep, jnp.abs(factor.e), jnp.inf), axis=-1, keepdims=True)
    e = jnp.where(new, jnp.minimum(least, _START).astype(factor.e.dtype), factor.e)
    return Triplet(columns[0], e, jnp.matrix_transpose(columns[1]))


def _edit(active: jax.Array, grown: jax.Array, factor: Triplet) -> Edit:
    """What is not in use is zero at every step, whatever the optimizer does; new ranks get their start."""
    changed, new = triplets.along_rank(~active | grown), triplets.along_rank(grown)
    value = Triplet(*(jnp.where(mask, x, jnp.zeros_like(x)) for mask, x in zip(new, factor)))
    return Edit(active, changed, value, ~active | grown)
