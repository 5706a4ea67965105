"""ALoRA's rounds: ranks are scored by what the loss is without them and with them alone, and the worst go to other modules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jlora import paths
from jlora.core.protocol.method import Site
from jlora.core.protocol.wrapping import innermost
from jlora.core.tree.adapted import Adapted
from jlora.core.tree.starts import start_of
from jlora.optimize import moments, offload
from jlora.optimize.allocate import budget, history, triplets
from jlora.optimize.allocate.budget import Phases
from jlora.optimize.allocate.transform import Allocation, AllocationState, Edit, Step, allocated, counts
from jlora.optimize.allocate.triplets import NOTHING, Fields, Triplet
from jlora.optimize.events import EventContext, Loss

Sites = tuple[Site, ...]
_FIELDS: Fields = ("a", None, "b")


@dataclass(frozen=True)
class ALoRARule(Allocation):
    """Keeps a record of the ranks in the optimizer's state. The ranks themselves change between steps, in a `Round`.

    Attributes:
        pruned: ranks that a round prunes; None for as many as there are modules.
    """

    pruned: int | None

    name: ClassVar[str] = "ALoRA"
    fields: ClassVar[Fields] = _FIELDS

    def begin(self, factors: list[Triplet]) -> list[jax.Array]:
        """The masks of the ranks in use at the start: those with a factor that is not zero."""
        return [jnp.any(factor.a != 0, axis=-2) | jnp.any(factor.b != 0, axis=-1) for factor in factors]

    def decide(self, step: Step, sites: Sites) -> tuple[list[Edit], Any]:
        """Nothing: in a step no rank changes."""
        return [Edit(active, NOTHING, NOTHING, NOTHING) for active in step.active], ()


@dataclass(frozen=True)
class Round:
    """The event of ALoRA: after `start_steps`, and every `interval` steps from then on, but not in the last `final_steps`.

    Attributes: as for `ALoRARule`.
    """

    phases: Phases
    pruned: int | None

    def due(self, step: int) -> bool:
        """Whether a round is made after this many steps."""
        phases = self.phases
        # Not after the last step: new ranks would never be trained.
        if phases.steps is None or step == phases.steps or not max(1, phases.start_steps) <= step <= phases.last:
            return False
        return (step - phases.start_steps) % phases.interval == 0

    def happen(self, context: EventContext) -> tuple[Adapted, Any]:
        """Makes the round, with scores on the middle one of the held-out batches: the first one may have short rows only.

        Raises:
            ValueError: where the loop gives no loss or no held-out batch.
        """
        if context.loss is None or not context.batches:
            raise ValueError(
                f"{context.sites[0].path}: ALoRA scores ranks by a loss on held-out data: give the loop's events a loss "
                "and batches, as in jlora.run_events(adapted, opt_state, tx, key, step, loss, batches)"
            )
        batch = context.batches[len(context.batches) // 2]
        whole = (context.adapted, context.opt_state, context.tx, context.loss, batch, context.key, self.pruned)
        adapted, opt_state, before, after = _reallocated(*whole, context.sites)
        context.say(f"ALoRA: {_moved(before, after)} ranks moved, {int(after.sum())} in use")
        return adapted, opt_state


def _moved(before: jax.Array, after: jax.Array) -> int:
    return int(jnp.sum(jnp.maximum(after - before, 0)))


def reallocate(
    adapted: Adapted,
    opt_state: Any,
    tx: optax.GradientTransformation,
    loss: Loss,
    batch: Any,
    key: jax.Array,
    pruned: int | None = None,
) -> tuple[Adapted, Any]:
    """One round of ALoRA: prunes the worst ranks of all its leaves, and gives as many to the modules that lost none.

    A rank's score is `S(alone) - S(without)`, `S` minus the loss on the batch: with all other ranks switched off, and with it
    alone switched off. The `pruned` ranks with the lowest scores go, fewer where the modules that lose none have no room for
    so many (`max_rank`) or every module would lose one. Those that lose none get as many new ones, as evenly as possible, the
    remainder to those with the higher mean score. So the total stays. (In the paper it falls where every module loses one.) A
    new rank starts as LoRA's, changes nothing yet, and has no moments. Where no score is a number, as after a run went
    astray, nothing moves.

    Compiled once for all rounds with the same `loss` and `tx`: ranks are switched by arrays, one forward pass each for every
    rank alone and without, one after the other. `jlora.run_events` calls this by the method's own schedule.

    Args:
        adapted: what is trained; its trained arrays are donated, but for those that are also the base's.
        opt_state: the optimizer's state; donated.
        tx: the optimizer.
        loss: `loss(adapted, batch) -> scalar`, traceable, such as the mean loss of `jlora.lift(model.apply)`.
        batch: held-out data, the same in every round.
        key: random key for the factors of new ranks.
        pruned: ranks to prune; by default what the method of the first leaf says.

    Returns:
        `adapted` and `opt_state` with the new ranks.

    Raises:
        ValueError: where no leaf has ALoRA.

    Example:
        >>> method = jlora.ALoRA(rank=2, steps=100)
        >>> adapted = jlora.adapterize(params, {r".*/q_proj/kernel": method})
        >>> tx = jlora.optimizer(adapted, optax.adamw, learning_rate=1e-3)
        >>> loss = lambda adapted, tokens: jnp.mean(jlora.lift(model.apply)({"params": adapted}, tokens) ** 2)
        >>> adapted, opt_state = jlora.reallocate(adapted, tx.init(adapted.params), tx, loss, tokens, key)
    """
    sites = tuple(site for site in adapted.plan.sites if isinstance(site.method.optimizer_rule, ALoRARule))
    if not sites:
        raise ValueError("reallocate found no leaf with ALoRA; other methods allocate ranks in the optimizer's steps")
    rule: Any = sites[0].method.optimizer_rule
    return _reallocated(adapted, opt_state, tx, loss, batch, key, pruned or rule.pruned, sites)[:2]


def _reallocated(
    adapted: Adapted, opt_state: Any, tx: Any, loss: Loss, batch: Any, key: Any, pruned: int | None, sites: Sites
) -> tuple[Adapted, Any, jax.Array, jax.Array]:
    """`adapted` and `opt_state` after the round, and the modules' numbers of ranks before and after it."""
    # `_round` donates the trained arrays. One of them may be the base's own array (`Full` starts so), which must not be lost.
    lent = {id(leaf) for leaf in jax.tree.leaves(adapted.base)}
    given = (jax.tree.map(lambda x: jnp.copy(x) if id(x) in lent else x, adapted.params), opt_state)
    places = jax.tree.map(lambda x: None if isinstance(x, Tracer) else getattr(x, "sharding", None), given)
    made = _round(*given, adapted.replace(params={}), batch, key, tx, loss, sites, pruned)
    params, opt_state = jax.tree.map(_placed, made[:2], places)
    frozen = adapted.frozen
    for site, gate in zip(sites, made[2]):
        old = paths.lookup(frozen, (*site.keys, "gate"))
        gate = _placed(gate, None if isinstance(old, Tracer) else getattr(old, "sharding", None))
        frozen = triplets.put(frozen, (*site.keys, "gate"), gate)
    return adapted.replace(params=params, frozen=frozen), opt_state, *made[3:]


def _placed(array: Any, place: Any) -> Any:
    """An array with the sharding that it had before the round, for which the compiler may have chosen another."""
    return array if place is None or array.sharding == place else jax.device_put(array, place)


@partial(jax.jit, donate_argnums=(0, 1), static_argnums=(5, 6, 7, 8))
def _round(
    params: Any, opt_state: Any, still: Adapted, batch: Any, key: Any, tx: Any, loss: Loss, sites: Sites, pruned: Any
) -> tuple[Any, Any, list[jax.Array], jax.Array, jax.Array]:
    adapted = still.replace(params=params)
    gates = [paths.lookup(adapted.frozen, (*site.keys, "gate")) for site in sites]
    active, slots = (triplets.table([test(gate) for gate in gates], False) for test in (_in_use, jnp.ones_like))
    scores = _scores(_switched(adapted, loss, batch, sites, gates), active, _most(sites))
    known = jnp.any(active & (scores > jnp.finfo(scores.dtype).min))
    count = jnp.where(known, active.shape[0] if pruned is None else pruned, 0)
    kept, grown = chosen(scores, active, slots.astype(bool), count)
    params, opt_state = _edited(
        adapted, opt_state, tx, key, sites, triplets.split(kept, gates), triplets.split(grown, gates)
    )
    masks = triplets.split(kept | grown, gates)
    opt_state = offload.put_back(_recorded(offload.fetched(opt_state), adapted, sites, masks), opt_state)
    before, after = (jnp.sum(table, axis=1, dtype=jnp.int32) for table in (active, kept | grown))
    return params, opt_state, [mask.astype(gate.dtype) for mask, gate in zip(masks, gates)], before, after


def _in_use(gate: jax.Array) -> jax.Array:
    return gate != 0


def _most(sites: Sites) -> int:
    """The number of ranks in use at the start of a run, which later numbers never exceed."""
    return sum(innermost(site.method).rank * math.prod(site.batch_shape) for site in sites)


def _switched(
    adapted: Adapted, loss: Loss, batch: Any, sites: Sites, gates: list[jax.Array]
) -> Callable[[jax.Array], jax.Array]:
    """`S(table)`: minus the loss with the ranks of a table `[modules, r]` switched on."""

    def score(table: jax.Array) -> jax.Array:
        frozen = adapted.frozen
        for site, gate in zip(sites, triplets.split(table, gates)):
            frozen = triplets.put(frozen, (*site.keys, "gate"), gate.astype(gates[0].dtype))
        return -loss(adapted.replace(frozen=frozen), batch)

    return score


def _scores(score: Callable[[jax.Array], jax.Array], active: jax.Array, most: int) -> jax.Array:
    """`S(alone) - S(without)` of every rank in use, 0 for the others; `[modules, r]`."""
    first = jnp.argsort(~active.ravel(), stable=True)[:most]

    def one(case: tuple[jax.Array, jax.Array]) -> jax.Array:
        rank, alone = case
        mask = (jnp.arange(active.size) == rank).reshape(active.shape)
        return score(jnp.where(alone, mask, active & ~mask))

    both = jax.lax.map(one, (jnp.tile(first, 2), jnp.arange(2 * len(first)) < len(first)))
    found = both[: len(first)] - both[len(first) :]
    # A loss that is no number makes the score the worst.
    found = jnp.nan_to_num(found, nan=jnp.finfo(found.dtype).min)
    return jnp.where(active, jnp.zeros(active.size, found.dtype).at[first].set(found).reshape(active.shape), 0)


def chosen(
    scores: jax.Array, active: jax.Array, slots: jax.Array, count: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """A round's choice: the masks of the ranks that stay, and of the new ones, `[modules, r]`.

    Args:
        scores: finite, of the ranks in use.
        active: mask of the ranks in use.
        slots: mask of the ranks that a module has room for.
        count: ranks to prune; fewer where the modules that lose none have no room for so many.
    """
    gone = budget.largest(-scores, _affordable(scores, active, slots, count), active)
    whole = ~jnp.any(gone, axis=1)
    number = jnp.sum(active, axis=1)
    mean = jnp.where(number > 0, jnp.sum(jnp.where(active, scores, 0), axis=1) / jnp.maximum(number, 1), -jnp.inf)
    # The modules get one rank each in turn, the one with the highest mean first. So the split is even, and what is left over
    # goes to the highest means.
    place = budget.positions(-mean)
    free = slots & ~active & whole[:, None]
    turn = (jnp.cumsum(free, axis=1) - 1) * len(mean) + place[:, None]
    grown = budget.largest(-turn, jnp.sum(gone), free)
    return active & ~gone, grown


def _affordable(scores: jax.Array, active: jax.Array, slots: jax.Array, count: jax.Array | int) -> jax.Array:
    """The largest number of ranks, up to `count`, that the modules which lose none can take."""
    order = budget.positions(jnp.where(active, scores, jnp.inf).ravel()).reshape(active.shape)
    worst = jnp.min(jnp.where(active, order, active.size), axis=1)
    room = jnp.sum(slots & ~active, axis=1)
    numbers = jnp.arange(active.size + 1)
    taken = jnp.sum(jnp.where(worst[None, :] >= numbers[:, None], room[None, :], 0), axis=1)
    return jnp.max(jnp.where((taken >= numbers) & (numbers <= count), numbers, 0))


def _edited(
    adapted: Adapted, opt_state: Any, tx: Any, key: Any, sites: Sites, kept: list[jax.Array], grown: list[jax.Array]
) -> tuple[Any, Any]:
    """Params and moments: zero where a rank is out of use, LoRA's start and no moments where it is new."""
    leaves = dict(paths.flatten_with_keys(adapted.base)[0])
    factors = triplets.read(adapted.params, sites, _FIELDS)
    news, forget = [], []
    for site, factor, keep, new in zip(sites, factors, kept, grown, strict=True):
        drawn = dataclasses.replace(site, method=innermost(site.method).drawn(new.shape[-1]))
        fresh = start_of(drawn, leaves[site.keys], key).params
        along, used = triplets.along_rank(new), triplets.along_rank(keep)
        a = jnp.where(along.a, fresh["a"], jnp.where(used.a, factor.a, 0))
        b = jnp.where(along.b, fresh["b"], jnp.where(used.b, factor.b, 0))
        news.append(Triplet(a, None, b))
        forget.append(Triplet(~used.a, None, ~used.b))
    return triplets.write(adapted.params, sites, news, _FIELDS), moments.edited(tx, opt_state, sites, _FIELDS, forget)


def _recorded(opt_state: Any, adapted: Adapted, sites: Sites, masks: list[jax.Array]) -> Any:
    """The optimizer's state with the new masks in ALoRA's record."""
    new = {site.keys: mask for site, mask in zip(sites, masks)}

    def one(node: Any) -> Any:
        if not isinstance(node, AllocationState):
            return node
        mine = allocated(adapted, node)
        active = node.active
        for site in mine:
            if site.keys in new:
                active = triplets.put(active, site.keys, new[site.keys])
        numbers = counts([paths.lookup(active, site.keys) for site in mine])
        record = history.recorded(node.history, node.step, numbers)
        return node._replace(inner=_each(node.inner), active=active, history=record)

    def _each(tree: Any) -> Any:
        return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, AllocationState))

    return _each(opt_state)
