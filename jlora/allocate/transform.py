"""What every allocation rule shares: an optax transformation around the optimizer, its state, and how to read that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora import paths
from jlora.adapted import Adapted
from jlora.allocate import history, orthogonality, scores, triplets
from jlora.allocate.budget import Phases
from jlora.allocate.history import History, RankHistory
from jlora.allocate.triplets import Triplet
from jlora.method import Site

Sites = tuple[Site, ...]


class AllocationState(NamedTuple):
    """The optimizer's state with what rank allocation remembers; arrays alone, so it is saved and resumed as any other.

    Attributes:
        inner: the state of the optimizer inside.
        step: int32, updates made.
        sensitivity, uncertainty: moving averages of `|value * gradient|` and of its deviation, laid out as the params.
        active: mask of the ranks in use at every site, `[*batch, r]`, as of the last allocation.
        history: the number of ranks in use over the run.
    """

    inner: Any
    step: jax.Array
    sensitivity: Any
    uncertainty: Any
    active: Any
    history: History


class Edit(NamedTuple):
    """What a rule does at a site after a step.

    Attributes:
        active: mask of the ranks in use from now on, `[*batch, r]`.
        where: for each factor a mask of the entries that are set, or None.
        value: for each factor what they are set to, or None.
        forget: mask of the ranks whose optimizer moments and averages start anew, `[*batch, r]`.
    """

    active: jax.Array
    where: Triplet
    value: Triplet
    forget: jax.Array


class Step(NamedTuple):
    """What a rule decides from; lists have one entry a site.

    Attributes:
        number: int32, of this update, from 1.
        sensitivity, uncertainty: the averages, this step included.
        active: masks of the ranks in use so far.
        factors: as the optimizer's step left them.
    """

    number: jax.Array
    sensitivity: list[Triplet]
    uncertainty: list[Triplet]
    active: list[jax.Array]
    factors: list[Triplet]


@dataclass(frozen=True)
class Allocation:
    """Base of the rules: what `Method.optimizer_rule` returns. A subclass says `name`, `begin` and `decide`.

    Attributes:
        phases: when ranks are allocated.
        beta1, beta2: memory of the averages of sensitivity and of uncertainty.
        orthogonality: weight of the penalty on factors that are not orthonormal.
    """

    phases: Phases
    beta1: float
    beta2: float
    orthogonality: float

    name: ClassVar[str] = ""

    def begin(self, factors: list[Triplet]) -> list[jax.Array]:
        """The masks of the ranks in use at the start."""
        raise NotImplementedError

    def decide(self, step: Step, sites: Sites) -> list[Edit]:
        """What happens after a step, in traced arrays of fixed shapes."""
        raise NotImplementedError

    def constrained(self, active: list[jax.Array]) -> list[jax.Array]:
        """The ranks whose factors the penalty wants orthonormal."""
        return active

    def wrap(self, tx: optax.GradientTransformation, sites: Sites) -> optax.GradientTransformation:
        """The optimizer with penalty, averages and allocation around it.

        Its `update` needs the params. Nothing may rescale what it returns: a rank is taken away by the update `-value`.

        Raises:
            ValueError: if the number of steps is not known.
        """
        if self.phases.steps is None:
            raise ValueError(
                f"{sites[0].path}: {self.name} follows a schedule over the whole run and must know its number of "
                f"optimizer steps: give {self.name}(..., steps=...)"
            )
        inner = optax.with_extra_args_support(tx)

        def init(params: Any) -> AllocationState:
            return self._init(inner, params, sites)

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
            if params is None:
                raise ValueError(f"{self.name} needs the params: call tx.update(gradients, state, params)")
            return self._update(inner, sites, updates, state, params, extra)

        return optax.GradientTransformationExtraArgs(init, update)

    def _init(self, tx: optax.GradientTransformation, params: Any, sites: Sites) -> AllocationState:
        steps = self.phases.steps
        assert steps is not None
        record = history.empty(steps, len(triplets.names(sites)))
        # `optax.tree_map_params` calls with a stand-in for the params, which has no leaves.
        active = [jnp.zeros((), bool)] * len(sites)
        if jax.tree.leaves(params):
            active = self.begin(triplets.read(params, sites))
            record = history.recorded(record, 0, counts(active))
        mean, spread = (triplets.only(jnp.zeros_like, params, sites) for _ in range(2))
        return AllocationState(tx.init(params), jnp.zeros((), jnp.int32), mean, spread, _tree(active, sites), record)

    def _update(
        self,
        tx: optax.GradientTransformationExtraArgs,
        sites: Sites,
        gradients: Any,
        state: AllocationState,
        params: Any,
        extra: dict[str, Any],
    ) -> tuple[Any, AllocationState]:
        before = triplets.read(params, sites)
        active = [paths.lookup(state.active, site.keys) for site in sites]
        gradients = self._with_penalty(gradients, before, active, sites)
        updates, inner = tx.update(gradients, state.inner, params, **extra)
        moves = triplets.read(updates, sites)
        number: Any = optax.safe_increment(state.step)
        factors = [_sum(value, move) for value, move in zip(before, moves)]
        means = self._averages(number, state, factors, triplets.read(gradients, sites), sites)
        edits = self.decide(Step(number, *means, active, factors), sites)
        moves = [_edited(move, value, edit) for move, value, edit in zip(moves, before, edits)]
        forget = [triplets.along_rank(edit.forget) for edit in edits]
        mean, spread = (
            triplets.write(tree, sites, list(map(_without, each, forget)))
            for tree, each in zip((state.sensitivity, state.uncertainty), means)
        )
        masks = [edit.active for edit in edits]
        record = history.recorded(state.history, number, counts(masks))
        inner = _forget(tx, inner, params, sites, forget)
        state = AllocationState(inner, number, mean, spread, _tree(masks, sites), record)
        return triplets.write(updates, sites, moves), state

    def _with_penalty(self, gradients: Any, factors: list[Triplet], active: list[jax.Array], sites: Sites) -> Any:
        """The gradients with that of the penalty, as if it were part of the loss."""
        if not self.orthogonality:
            return gradients
        pull = orthogonality.penalty_gradient(factors, self.constrained(active), self.orthogonality)
        given = triplets.read(gradients, sites)
        return triplets.write(gradients, sites, [Triplet(g.a + p.a, None, g.b + p.b) for g, p in zip(given, pull)])

    def _averages(
        self, number: jax.Array, state: AllocationState, factors: list[Triplet], gradients: list[Triplet], sites: Sites
    ) -> tuple[list[Triplet], list[Triplet]]:
        """The averages with this step, up to the last allocation."""
        learning = number < self.phases.last
        old = triplets.read(state.sensitivity, sites), triplets.read(state.uncertainty, sites)
        new = [scores.smoothed(*each, self.beta1, self.beta2) for each in zip(*old, factors, gradients, strict=True)]
        kept = [
            tuple(Triplet(*(jnp.where(learning, n, o) for n, o in zip(*pair))) for pair in zip(new_two, old_two))
            for new_two, old_two in zip(new, zip(*old))
        ]
        return [mean for mean, _ in kept], [spread for _, spread in kept]


def _sum(value: Triplet, move: Triplet) -> Triplet:
    return Triplet(*(v + m.astype(v.dtype) for v, m in zip(value, move)))


def _edited(move: Triplet, before: Triplet, edit: Edit) -> Triplet:
    """The updates, changed so that the edit's values come out; where the value is 0, exactly."""

    def one(move: jax.Array, old: jax.Array, where: Any, value: Any) -> jax.Array:
        return move if where is None else jnp.where(where, (value - old).astype(move.dtype), move)

    return Triplet(*map(one, move, before, edit.where, edit.value))


def _without(values: Triplet, gone: Triplet) -> Triplet:
    return Triplet(*(jnp.where(mask, jnp.zeros_like(value), value) for value, mask in zip(values, gone)))


def _forget(tx: Any, state: Any, params: Any, sites: Sites, gone: list[Triplet]) -> Any:
    """An optimizer's state with zeros for some ranks, in all that it keeps in the shape of the params.

    What it keeps in another shape, such as Adafactor's sums over rows and columns, stays.
    """

    def clear(moment: Any, mask: Any) -> Any:
        if isinstance(moment, optax.MaskedNode):
            return moment
        array, shaped = jnp.asarray(moment), jnp.ndim(moment) == jnp.ndim(mask) > 0
        if not shaped or any(m not in (1, n) for m, n in zip(mask.shape, array.shape)):
            return moment
        return jnp.where(mask, jnp.zeros_like(array), array)

    nothing = jax.tree.map(lambda _: np.zeros((), bool), params)
    masks = triplets.write(nothing, sites, gone)
    return optax.tree_map_params(tx, clear, state, masks, is_leaf=lambda x: isinstance(x, optax.MaskedNode))


def _tree(values: list[Any], sites: Sites) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for site, value in zip(sites, values, strict=True):
        paths.insert(tree, site.keys, value)
    return tree


def counts(active: list[jax.Array]) -> jax.Array:
    """The number of ranks in use of every module, int32 `[modules]`."""
    return jnp.concatenate([jnp.sum(mask, axis=-1, dtype=jnp.int32).ravel() for mask in active])


def _states(opt_state: Any) -> list[AllocationState]:
    """The allocations in an optimizer's state, however deep, one inside the other too."""
    found, waiting = [], [opt_state]
    while waiting:
        leaves = jax.tree.leaves(waiting.pop(), is_leaf=lambda x: isinstance(x, AllocationState))
        states = [leaf for leaf in leaves if isinstance(leaf, AllocationState)]
        found += states
        waiting += [state.inner for state in states]
    if not found:
        raise ValueError(
            "this optimizer state holds no rank allocation: make it by jlora.optimizer (or jlora.with_rules) for "
            "methods such as AdaLoRA, and restore it with that state as the target"
        )
    return found


def _allocated(adapted: Adapted, state: AllocationState) -> Sites:
    """The sites that an allocation is about."""
    return tuple(site for site in adapted.plan.sites if not isinstance(paths.lookup(state.active, site.keys), dict))


def ranks(adapted: Adapted, opt_state: Any) -> dict[str, int]:
    """The ranks in use now, by module: a leaf's path, with the index of the matrix where the leaf is a stack.

    Args:
        adapted: what is trained.
        opt_state: the state of an optimizer by `jlora.optimizer` or `jlora.with_rules`, wrapped or not.

    Raises:
        ValueError: for a state without rank allocation.
    """
    found: dict[str, int] = {}
    for state in _states(opt_state):
        sites = _allocated(adapted, state)
        masks = [np.asarray(jax.device_get(paths.lookup(state.active, site.keys))) for site in sites]
        numbers = np.concatenate([mask.sum(-1).ravel() for mask in masks])
        found |= dict(zip(triplets.names(sites), map(int, numbers), strict=True))
    return {name: found[name] for name in triplets.names(adapted.plan.sites) if name in found}


def rank_history(adapted: Adapted, opt_state: Any) -> RankHistory:
    """The ranks of every module over a run so far, at up to 128 steps evenly spread over it.

    Args:
        adapted: what is trained.
        opt_state: the state of an optimizer by `jlora.optimizer` or `jlora.with_rules`, wrapped or not.

    Returns:
        Steps, names and ranks, which can be plotted as a heat map of modules by time.

    Raises:
        ValueError: for a state without rank allocation, or with several of different lengths.

    Example:
        >>> adapted = jlora.adapterize(params, {r".*/q_proj/kernel": jlora.AdaLoRA(rank=4, target=2, steps=100)})
        >>> opt_state = jlora.optimizer(adapted, optax.adamw, learning_rate=1e-3).init(adapted.params)
        >>> jlora.rank_history(adapted, opt_state).ranks.tolist()
        [[4]]
    """
    states = _states(opt_state)
    rows = [history.complete_rows(*state.history, state.step) for state in states]
    if any(not np.array_equal(steps, rows[0][0]) for steps, _ in rows):
        raise ValueError("the methods of this optimizer allocate ranks over different numbers of steps")
    names = [name for state in states for name in triplets.names(_allocated(adapted, state))]
    columns = dict(zip(names, np.concatenate([table for _, table in rows], axis=1).T, strict=True))
    order = tuple(name for name in triplets.names(adapted.plan.sites) if name in columns)
    return RankHistory(rows[0][0], order, np.stack([columns[name] for name in order], axis=1))
