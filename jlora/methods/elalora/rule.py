"""ElaLoRA's rule: each round moves a few ranks from where they matter least to where even the weakest matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora import _compat
from jlora.optimize.allocate import budget, orthogonality, triplets
from jlora.optimize.allocate.scored import ScoredAllocation
from jlora.optimize.allocate.transform import Edit, Step
from jlora.optimize.allocate.triplets import Triplet

# The gate that a new rank starts with, as in the paper's code: the rank changes next to nothing, and yet every factor has a
# gradient.
_START = 1e-13


@dataclass(frozen=True)
class ElaLoRARule(ScoredAllocation):
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
        """The masks of the ranks in use at the start: those whose column of `a` is not zero."""
        return [jnp.any(factor.a != 0, axis=-2) for factor in factors]

    def choose(self, step: Step, score: Callable[[], list[jax.Array]]) -> list[Edit]:
        """A round at the end of every interval, before `phases.last`."""
        phases, t = self.phases, step.number
        count = self._count(t)
        due = (t - phases.start_steps) % phases.interval == 0
        now = (t > phases.start_steps) & (t < phases.last) & due & (count > 0)

        def stay():
            return step.active, [jnp.zeros_like(mask) for mask in step.active], step.factors

        active, grown, factors = jax.lax.cond(now, lambda: self._round(step, score(), count), stay)
        return [_edit(*each) for each in zip(active, grown, factors, strict=True)]

    def _count(self, step: jax.Array) -> jax.Array:
        if not self.anneal:
            return jnp.asarray(self.moved, jnp.int32)
        schedule = budget.cubic_moves(self.phases, self.moved)
        return budget.after(self.moved, budget.falls(schedule, self.phases.start_steps, self.phases.last), step)

    def _round(self, step: Step, found: list[jax.Array], count: jax.Array) -> tuple[list, list, list]:
        """The masks after a round, those of the new ranks, and the factors with the new ranks in place."""
        whole = triplets.table(step.active, False)
        slots = triplets.table([jnp.ones_like(mask) for mask in step.active], False)
        kept, grows = exchange(triplets.table(found, 0), whole, slots, count, self.per_module)
        free = slots & ~whole
        grown = free & (jnp.cumsum(free, axis=-1) <= grows[:, None])
        keeps, news = triplets.split(kept, found), triplets.split(grown, found)
        key = jax.random.fold_in(jax.random.key(self.seed), step.number)
        factors = _grow(key, step.factors, keeps, news)
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
        slots: mask of the ranks that a module has room for.
        count: ranks to move, at most.
        per_module: most ranks that one module loses or gets.
    """
    held, room = jnp.sum(active, axis=-1), jnp.sum(slots & ~active, axis=-1)
    pool = active & (budget.positions(jnp.where(active, scores, jnp.inf)) < jnp.minimum(per_module, held - 1)[:, None])
    # A module gets one new rank for each of its ranks that is among the strongest of the pool, so no more of its ranks may
    # take part in that choice than it has room for.
    standing = pool & (budget.positions(jnp.where(pool, -scores, jnp.inf)) < room[:, None])
    count = jnp.minimum(count, jnp.sum(standing))
    grows = jnp.sum(budget.largest(scores, count, standing), axis=-1)
    return active & ~budget.largest(-scores, count, pool), grows


def _grow(key: jax.Array, factors: list[Triplet], keeps: list[jax.Array], news: list[jax.Array]) -> list[Triplet]:
    """The factors with new ranks: unit vectors at right angles to those that remain, and a tiny `e`."""
    columns = [m for factor in factors for m in (factor.a, jnp.matrix_transpose(factor.b))]
    masks = [masks for masks in zip(keeps, news, strict=True) for _ in "ab"]
    columns = _with_new_columns(key, columns, masks)
    found = []
    for factor, keep, new, a, b in zip(factors, keeps, news, columns[::2], columns[1::2]):
        least = jnp.min(jnp.where(keep, jnp.abs(factor.e), jnp.inf), axis=-1, keepdims=True)
        e = jnp.where(new, jnp.minimum(least, _START).astype(factor.e.dtype), factor.e)
        found.append(Triplet(a, e, jnp.matrix_transpose(b)))
    return found


def _with_new_columns(
    key: jax.Array, columns: list[jax.Array], masks: list[tuple[jax.Array, jax.Array]]
) -> list[jax.Array]:
    """`orthogonality.with_new_columns` of every matrix: those of one shape together, since each loop takes long to compile."""
    found = list(columns)
    for number, members in enumerate(_alike(columns, lambda m: (m.shape[-2:], m.dtype))):
        like = [columns[n] for n in members]
        count = sum(math.prod(m.shape[:-2]) for m in like)
        draw = jax.random.normal(jax.random.fold_in(key, number), (count, *like[0].shape[-2:]), like[0].dtype)
        noise = dict(zip(members, triplets.split(draw, like, 2)))
        # Arrays that are cut differently over a mesh with explicit axes can't be joined. The random numbers were drawn for all
        # of them before, so they don't depend on the mesh.
        for group in _alike(like, _cut):
            chosen = [members[n] for n in group]
            parts = [columns[n] for n in chosen]
            keep, new = (_together([masks[n][which][..., None, :] for n in chosen])[:, 0] for which in (0, 1))
            random = _together([noise[n] for n in chosen])
            whole = orthogonality.with_new_columns(_together(parts), keep, new, random)
            for n, part in zip(chosen, triplets.split(whole, parts, 2)):
                found[n] = part
    return found


def _alike(values: list[jax.Array], kind: Callable[[jax.Array], Any]) -> list[list[int]]:
    """The places of the values in groups of one kind."""
    groups: dict[Any, list[int]] = {}
    for place, value in enumerate(values):
        groups.setdefault(kind(value), []).append(place)
    return list(groups.values())


def _cut(m: jax.Array) -> Any:
    sharding = _compat.explicit_sharding(jax.typeof(m))
    return None if sharding is None else tuple(sharding.spec)[m.ndim - 2 :]


def _together(matrices: list[jax.Array]) -> jax.Array:
    return jnp.concatenate([m.reshape(-1, *m.shape[-2:]) for m in matrices])


def _edit(active: jax.Array, grown: jax.Array, factor: Triplet) -> Edit:
    """Sets ranks out of use to zero, in every step, since the optimizer may move them, and new ranks to their start."""
    changed, new = triplets.along_rank(~active | grown), triplets.along_rank(grown)
    value = Triplet(*(jnp.where(mask, x, jnp.zeros_like(x)) for mask, x in zip(new, factor)))
    return Edit(active, changed, value, changed)
