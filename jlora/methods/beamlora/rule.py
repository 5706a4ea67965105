"""BeamLoRA's rule: now and then each module's weakest ranks give way to copies of what its strongest were."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _compat
from jlora.optimize.allocate import budget, triplets
from jlora.optimize.allocate.transform import Allocation, Edit, Sites, Step
from jlora.optimize.allocate.triplets import Fields, Triplet

#: What a snapshot holds: the two factors, not the scores.
_COPIED: Fields = ("a", None, "b")


class Snapshot(NamedTuple):
    """The factors and their moments as they were at the middle of the interval.

    Attributes:
        values: `a` and `b`, laid out as the params.
        moments: the optimizer's moments of them, for each of its trees.
    """

    values: Any
    moments: tuple[Any, ...]


class Pairing(NamedTuple):
    """Which ranks of a leaf give way to copies of which, `[*batch, r]` each.

    Attributes:
        dropped: mask of the ranks that give way.
        origin: int32: the rank that is copied there; a rank's own number where it stays.
    """

    dropped: jax.Array
    origin: jax.Array


@dataclass(frozen=True)
class BeamLoRARule(Allocation):
    """Prunes by one top-p over all modules, and expands each module's best ranks into the free places.

    Attributes:
        temperature: of the softmax of the scores.
        top_p: the part of the sum of all gates that is kept at first; it rises to 1 as half a cosine.
        seed: of the shuffling.
    """

    temperature: float
    top_p: float
    seed: int

    name: ClassVar[str] = "BeamLoRA"
    fields: ClassVar[Fields] = ("a", "score", "b")

    def remember(self, params: Any, moments: list[Any], sites: Sites) -> Snapshot:
        """A snapshot of the factors and moments at the start."""
        copies = [triplets.only(jnp.copy, tree, sites, _COPIED) for tree in (params, *moments)]
        return Snapshot(copies[0], tuple(copies[1:]))

    def decide(self, step: Step, sites: Sites) -> tuple[list[Edit], Snapshot]:
        """A snapshot in the middle of each interval; pruning and expansion at the end of each, where another one follows."""
        interval, t = self.phases.interval, step.number
        assert self.phases.steps is not None
        memory = _renewed(step, sites, t % interval == interval // 2)
        due = (t % interval == 0) & (self.phases.steps - t >= interval)
        moments = [triplets.read(tree, sites, _COPIED) for tree in step.moments]

        def stay():
            return [jnp.zeros_like(mask) for mask in step.active], step.factors, moments

        dropped, factors, moments = jax.lax.cond(due, lambda: self._expanded(step, sites), stay)
        edits = []
        for n, (mask, factor, active) in enumerate(zip(dropped, factors, step.active)):
            where = Triplet(mask[..., None, :], jnp.broadcast_to(due, mask.shape), mask[..., :, None])
            edits.append(Edit(active, where, factor, where, [tree[n] for tree in moments]))
        return edits, memory

    def kept_weight(self) -> np.ndarray:
        """The part of the sum of all gates that is kept, at step 0 and at the end of every interval; infinite for all of it."""
        phases = self.phases
        assert phases.steps is not None
        steps = range(0, phases.steps + 1, phases.interval)
        part = [1 - (1 - self.top_p) * (1 + math.cos(math.pi * phases.done(step))) / 2 for step in steps]
        return np.array([p if p < 1 else math.inf for p in part])

    def _expanded(self, step: Step, sites: Sites) -> tuple[list[jax.Array], list[Triplet], list[list[Triplet]]]:
        """The masks of dropped ranks, the factors with copies in their place, and the moments likewise."""
        weights = [gates(factor.e, self.temperature) for factor in step.factors]
        total = sum(weight.size for weight in weights)
        kept = jnp.asarray(total * self.kept_weight(), jnp.float32)[step.number // self.phases.interval]
        key = jax.random.fold_in(jax.random.key(self.seed), step.number)
        pairings = [
            pairing(weight, drop, jax.random.uniform(jax.random.fold_in(key, n), weight.shape))
            for n, (weight, drop) in enumerate(zip(weights, outside_top_p(weights, kept)))
        ]
        old = [triplets.read(tree, sites, _COPIED) for tree in (step.memory.values, *step.memory.moments)]
        new = [step.factors, *(triplets.read(tree, sites, _COPIED) for tree in step.moments)]
        factors, *moments = ([_copied(*each) for each in zip(pairings, o, n)] for o, n in zip(old, new))
        scores = [shared_scores(factor.e, pair) for factor, pair in zip(step.factors, pairings)]
        factors = [factor._replace(e=score) for factor, score in zip(factors, scores)]
        return [pair.dropped for pair in pairings], factors, moments


def gates(score: jax.Array, temperature: float) -> jax.Array:
    """`r * softmax(score / temperature)` along the last axis of `r` ranks, in float32 at least; the sum is `r`."""
    wide = score.astype(jnp.promote_types(score.dtype, jnp.float32))
    return score.shape[-1] * jax.nn.softmax(wide / temperature, axis=-1)


def outside_top_p(weights: list[jax.Array], kept: jax.Array | float) -> list[jax.Array]:
    """Masks of the ranks from the first on at which the sum of weights, largest first, exceeds `kept`.

    The ranks of all modules are ordered together, equal weights by place. An infinite `kept` drops nothing, however sums are
    rounded.

    Args:
        weights: the gates of every site, `[*batch, r]`; they sum to the number of ranks.
        kept: the part of the sum that is kept, times the number of ranks.
    """
    exists = triplets.table([jnp.ones(weight.shape, bool) for weight in weights], False)
    whole = jnp.where(exists, jnp.nan_to_num(triplets.table(weights, 0)), -1).ravel()
    order = jnp.argsort(-whole, stable=True)
    beyond = jnp.cumsum(whole[order]) > kept
    drop = beyond[jnp.argsort(order)].reshape(exists.shape) & exists
    return triplets.split(drop, weights)


def pairing(weights: jax.Array, drop: jax.Array, noise: jax.Array) -> Pairing:
    """Gives every dropped rank of a leaf one of the best ranks of the same matrix to copy, each to one, in random order.

    At most half of a matrix's ranks are dropped, the weakest, so that no source is dropped itself.

    Args:
        weights: `[*batch, r]`.
        drop: mask of the ranks to drop, the weakest of each matrix.
        noise: random numbers that shuffle, `[*batch, r]`.
    """
    count = weights.shape[-1]
    place = budget.positions(-weights)
    dropped = drop & (place >= count - count // 2)
    source = place < jnp.sum(dropped, axis=-1, keepdims=True)
    shuffled = jnp.argsort(jnp.where(source, noise, jnp.inf), axis=-1)
    turn = jnp.maximum(jnp.cumsum(dropped, axis=-1) - 1, 0)
    own = jnp.broadcast_to(jnp.arange(count), weights.shape)
    origin = jnp.where(dropped, jnp.take_along_axis(shuffled, turn, axis=-1), own)
    return Pairing(dropped, origin.astype(jnp.int32))


def shared_scores(score: jax.Array, pair: Pairing) -> jax.Array:
    """The scores where a dropped rank and the rank that is copied there both get the mean of their two."""
    copies = pair.dropped[..., :, None] & (pair.origin[..., :, None] == jnp.arange(score.shape[-1]))
    partner = jnp.sum(jnp.where(copies, score[..., :, None], 0), axis=-2)
    other = jnp.where(pair.dropped, jnp.take_along_axis(score, pair.origin, axis=-1), partner)
    touched = pair.dropped | jnp.any(copies, axis=-2)
    return jnp.where(touched, (score + other) / 2, score)


def _renewed(step: Step, sites: Sites, now: jax.Array) -> Snapshot:
    """The snapshot: a new one where `now` is true."""

    def one(old: Any, new: list[Triplet]) -> Any:
        before = triplets.read(old, sites, _COPIED)
        merged = [
            Triplet(*(jnp.where(now, n, o) if _is_array(o) else None for n, o in zip(*each)))
            for each in zip(new, before, strict=True)
        ]
        return triplets.write(old, sites, merged, _COPIED)

    moments = [triplets.read(tree, sites, _COPIED) for tree in step.moments]
    pairs = zip(step.memory.moments, moments, strict=True)
    return Snapshot(one(step.memory.values, step.factors), tuple(one(*pair) for pair in pairs))


def _copied(pair: Pairing, old: Triplet, new: Triplet) -> Triplet:
    """`new` with columns of `a` and rows of `b` from the snapshot `old` at dropped ranks.

    A moment in another shape than its factor, such as Adafactor's sums, stays as it is.
    """

    def one(old: Any, new: Any, axis: int, mask: jax.Array, index: jax.Array) -> Any:
        ranks = pair.origin.shape
        if not _is_array(new) or new.shape[: len(ranks) - 1] + new.shape[axis:][:1] != ranks or new.ndim != mask.ndim:
            return new
        return jnp.where(mask, triplets.taken(old, index, axis), new)

    columns = one(old.a, new.a, -1, pair.dropped[..., None, :], pair.origin[..., None, :])
    return Triplet(columns, None, one(old.b, new.b, -2, pair.dropped[..., :, None], pair.origin[..., :, None]))


def _is_array(value: Any) -> bool:
    return _compat.is_array(value)
