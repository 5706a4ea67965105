"""What allocation rules share: an optax transformation around the optimizer, and its state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from jlora import paths
from jlora.core.protocol.method import Site
from jlora.core.tree.adapted import Adapted
from jlora.optimize import moments
from jlora.optimize.allocate import history, scores, triplets
from jlora.optimize.allocate.budget import Phases
from jlora.optimize.allocate.history import History
from jlora.optimize.allocate.triplets import FIELDS, Fields, Triplet

Sites = tuple[Site, ...]


@runtime_checkable
class LearningState(Protocol):
    """The state of a rule that learns from every sound step, found in an optimizer's state by these two names.

    Attributes:
        inner: the state of the optimizer inside.
        skipped: int32, updates from which it learned nothing, since something was not finite.
    """

    inner: Any
    skipped: Any


class AllocationState(NamedTuple):
    """The optimizer's state with what rank allocation remembers; arrays alone, so it is saved and resumed as any other.

    Attributes:
        inner: the state of the optimizer inside.
        step: int32, updates made.
        memory: what the rule remembers from step to step, such as averages laid out as the params.
        active: mask of the ranks in use at every site, `[*batch, r]`.
        history: the number of ranks in use over the run.
        skipped: int32, updates whose gradients were not finite, which changed no score.
        closed: mask of the ranks whose gate the last update set to zero, laid out as `active`.
        reopened: int32 `[modules]`, updates that found such a gate not zero: what `update` returned was not applied as it was.
    """

    inner: Any
    step: jax.Array
    memory: Any
    active: Any
    history: History
    skipped: jax.Array
    closed: Any
    reopened: jax.Array


class Edit(NamedTuple):
    """What a rule does at a site after a step.

    Attributes:
        active: mask of the ranks in use from now on, `[*batch, r]`.
        where: for each factor a mask of the entries that are set, or None.
        value: for each factor what they are set to, or None.
        forget: for each factor a mask of the entries whose optimizer moments start anew, or None.
        moments: for each of the optimizer's trees of moments what those entries start with; None for zero.
    """

    active: jax.Array
    where: Triplet
    value: Triplet
    forget: Triplet
    moments: list[Triplet] | None = None


class Step(NamedTuple):
    """What a rule decides from; lists have one entry a site.

    Attributes:
        number: int32, of this update, from 1.
        factors: as the optimizer's step left them.
        gradients: those that the step was made with.
        active: masks of the ranks in use so far.
        memory: what the rule remembered so far.
        moments: the optimizer's trees of moments after the step (`moments.trees`).
        sound: bool, whether all gradients are finite. A rule that learns from gradients skips a step that is not.
    """

    number: jax.Array
    factors: list[Triplet]
    gradients: list[Triplet]
    active: list[jax.Array]
    memory: Any
    moments: list[Any]
    sound: jax.Array


@dataclass(frozen=True)
class Allocation:
    """Base of the rules that `Method.optimizer_rule` returns. A subclass gives `name` and `decide`.

    Attributes:
        phases: when ranks are allocated.
        name: of the method, for error messages.
        fields: names of the method's `a`, gate and `b`.
    """

    phases: Phases

    name: ClassVar[str] = ""
    fields: ClassVar[Fields] = FIELDS

    def begin(self, factors: list[Triplet]) -> list[jax.Array]:
        """The masks of the ranks in use at the start: all."""
        return [jnp.ones(factor.e.shape, bool) for factor in factors]

    def remember(self, params: Any, moments: list[Any], sites: Sites) -> Any:
        """The memory before the first step.

        Args:
            params: the trained arrays, or a placeholder without leaves, by which `optax.tree_map_params` asks for the form.
            moments: the optimizer's trees of moments.
            sites: the sites that share the rule.
        """
        return ()

    def pull(self, factors: list[Triplet], active: list[jax.Array]) -> list[Triplet] | None:
        """The gradient of a term that the method adds to the loss, None for factors that it leaves out."""
        return None

    def decide(self, step: Step, sites: Sites) -> tuple[list[Edit], Any]:
        """The edits after a step, one a site, and the new memory; traced, so of fixed shapes."""
        raise NotImplementedError

    def wrap(self, tx: optax.GradientTransformation, sites: Sites) -> optax.GradientTransformation:
        """The optimizer with the rule around it.

        Its `update` needs the params. Its updates must be applied unchanged, since a rank is set to zero by the update
        `-value`. The next update checks this, and `ranks` and `rank_history` refuse a state for which it was not so.

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
        modules = len(triplets.names(sites))
        record = history.empty(steps, modules)
        # `optax.tree_map_params` calls `init` with a placeholder for the params, which has no leaves.
        active = [jnp.zeros((), bool)] * len(sites)
        if jax.tree.leaves(params):
            active = self.begin(triplets.read(params, sites, self.fields))
            record = history.recorded(record, 0, counts(active))
        inner = tx.init(params)
        memory = self.remember(params, moments.trees(tx, inner), sites)
        # Three arrays, not one three times: the state may be donated, and an array can be donated once.
        step, skipped, reopened = (jnp.zeros(shape, jnp.int32) for shape in ((), (), modules))
        closed = _tree([jnp.zeros_like(mask) for mask in active], sites)
        return AllocationState(inner, step, memory, _tree(active, sites), record, skipped, closed, reopened)

    def _update(
        self,
        tx: optax.GradientTransformationExtraArgs,
        sites: Sites,
        gradients: Any,
        state: AllocationState,
        params: Any,
        extra: dict[str, Any],
    ) -> tuple[Any, AllocationState]:
        before = triplets.read(params, sites, self.fields)
        active = [paths.lookup(state.active, site.keys) for site in sites]
        gradients = added(gradients, self.pull(before, active), sites, self.fields)
        updates, inner = tx.update(gradients, state.inner, params, **extra)
        moves, given = (triplets.read(tree, sites, self.fields) for tree in (updates, gradients))
        factors = [_sum(value, move) for value, move in zip(before, moves)]
        number: Any = optax.safe_increment(state.step)
        sound = scores.finite((gradients, [_product(*pair) for pair in zip(factors, given)]))
        step = Step(number, factors, given, active, state.memory, moments.trees(tx, inner), sound)
        edits, memory = self.decide(step, sites)
        moves = [_edited(move, value, edit) for move, value, edit in zip(moves, before, edits)]
        masks = [edit.active for edit in edits]
        record = history.recorded(state.history, number, counts(masks))
        state = AllocationState(
            self._with_moments(tx, inner, sites, edits),
            number,
            memory,
            _tree(masks, sites),
            record,
            state.skipped + ~sound,
            _tree([_closed(edit) for edit in edits], sites),
            state.reopened + _reopened(before, [paths.lookup(state.closed, site.keys) for site in sites]),
        )
        return triplets.write(updates, sites, moves, self.fields), state

    def _with_moments(self, tx: optax.GradientTransformation, inner: Any, sites: Sites, edits: list[Edit]) -> Any:
        """The optimizer's state with the moments that the edits ask for."""
        values = [edit.moments for edit in edits if edit.moments is not None]
        by_tree = list(zip(*values, strict=True)) if values else None
        return moments.edited(tx, inner, sites, self.fields, [edit.forget for edit in edits], by_tree)


def added(gradients: Any, pull: list[Triplet] | None, sites: Sites, fields: Fields) -> Any:
    """The gradients plus those of a further term of the loss, `pull`."""
    if pull is None:
        return gradients
    sums = [
        Triplet(*(None if p is None else g + p for g, p in zip(*pair)))
        for pair in zip(triplets.read(gradients, sites, fields), pull, strict=True)
    ]
    return triplets.write(gradients, sites, sums, fields)


def _product(value: Triplet, gradient: Triplet) -> Triplet:
    return Triplet(*(None if v is None else v * g for v, g in zip(value, gradient)))


def _closed(edit: Edit) -> jax.Array:
    """The ranks whose gate an edit sets to zero."""
    if edit.where.e is None:
        return jnp.zeros_like(edit.active)
    return jnp.broadcast_to(edit.where.e & (edit.value.e == 0), edit.active.shape)


def _reopened(factors: list[Triplet], closed: list[jax.Array]) -> jax.Array:
    """For each module 1 if a gate that was set to zero is not zero, int32 `[modules]`."""
    gates = [jnp.zeros(mask.shape) if factor.e is None else factor.e for factor, mask in zip(factors, closed)]
    return jnp.minimum(counts([(gate != 0) & mask for gate, mask in zip(gates, closed)]), 1)


def _sum(value: Triplet, move: Triplet) -> Triplet:
    return Triplet(*(None if v is None else v + m.astype(v.dtype) for v, m in zip(value, move)))


def _edited(move: Triplet, before: Triplet, edit: Edit) -> Triplet:
    """The updates, changed so that adding them gives the edit's values, up to rounding, and exactly where the value is 0."""

    def one(move: jax.Array, old: jax.Array, where: Any, value: Any) -> jax.Array:
        return move if where is None else jnp.where(where, (value - old).astype(move.dtype), move)

    return Triplet(*map(one, move, before, edit.where, edit.value))


def _tree(values: list[Any], sites: Sites) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for site, value in zip(sites, values, strict=True):
        paths.insert(tree, site.keys, value)
    return tree


def counts(active: list[jax.Array]) -> jax.Array:
    """The number of ranks in use of every module, int32 `[modules]`."""
    return jnp.concatenate([jnp.sum(mask, axis=-1, dtype=jnp.int32).ravel() for mask in active])


def _states(opt_state: Any, kind: type = AllocationState) -> list[Any]:
    """The states of rules in an optimizer's state, at any depth and inside one another.

    Raises:
        ValueError: where there is none.
    """
    found, waiting = [], [opt_state]
    while waiting:
        leaves = jax.tree.leaves(waiting.pop(), is_leaf=lambda x: isinstance(x, kind))
        states = [leaf for leaf in leaves if isinstance(leaf, kind)]
        found += states
        waiting += [state.inner for state in states]
    if not found:
        raise ValueError(
            "this optimizer state holds no rank allocation: make it by jlora.optimizer (or jlora.with_rules) for "
            "methods such as AdaLoRA, and restore it with that state as the target"
        )
    return found


def allocated(adapted: Adapted, state: AllocationState) -> Sites:
    """The sites whose ranks an allocation's state holds."""
    return tuple(site for site in adapted.plan.sites if not isinstance(paths.lookup(state.active, site.keys), dict))
