"""`offload`: an optimizer whose state lies in the host's memory, and visits the device a group at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jlora import _compat, paths
from jlora.core.walk.interpreter import bind

#: The memory kind that the state lies in.
HOST = "pinned_host"


def offload(
    tx: optax.GradientTransformation | optax.MultiSteps, *, group_bytes: int = 2**22
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that keeps the state of another one in pinned host memory: the paged optimizer of QLoRA, for XLA.

    `init` puts every array of the state into the memory kind "pinned_host", beside its trained array on a mesh; scalars,
    such as step counts, stay on the device. `update` gives what that of `tx` gives.

    Under `jit` the state is fetched in groups, in the order of the trained arrays. What can be computed from a group is
    computed and sent back before the next one is fetched, so that the device holds the moments of one group and not of all.
    What needs several groups, such as a budget of ranks, waits for the last of them, and holds what it needs meanwhile.
    `optax.MultiSteps` makes each step in one branch, and so fetches all. Outside of `jit` the whole state is fetched too.

    The step needs no `out_shardings` for it, in `lax.scan` neither. A step that donates the state donates the trained arrays
    as well, and returns both in the order in which it takes them, or it has `out_shardings`: without, JAX pairs donated arrays
    with results by shape and dtype, and not by the memory that they lie in. Trained arrays that are committed to no device
    are so after the first step, for which it is compiled a second time; `jax.device_put(params, device)` before `init` saves
    that.

    Args:
        tx: the whole optimizer: `offload` goes around `jlora.optimizer`, `optax.chain` and `optax.MultiSteps`, not into them.
        group_bytes: trained arrays share a group until their state has so many bytes, all devices together. Four to six times
            as many were in use at once in LoRA's programs for a TPU, with what is computed and what is under way.

    Returns:
        An optax transformation whose states have the structure of those of `tx`.

    Raises:
        ValueError: for a `group_bytes` that is not positive; by `init` for devices without that memory kind, naming those that
            they have; by `update` for a state that is elsewhere.

    Example:
        >>> tx = jlora.offload(jlora.optimizer(adapted, optax.adamw, learning_rate=2e-4))
        >>> state = tx.init(adapted.params)

    Reference:
        Dettmers et al. 2023, arXiv:2305.14314, section 3.
    """
    if not group_bytes > 0:
        raise ValueError(f"offload wants a positive group_bytes, got {group_bytes!r}")
    if isinstance(tx, optax.MultiSteps):  # which is no transformation itself, and takes further arguments
        tx = optax.GradientTransformationExtraArgs(tx.init, tx.update)  # pyright: ignore[reportArgumentType]
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        _check_memory(params)
        return _sent(inner.init(params), params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        _check_state(state)
        given = (updates, state, params, extra)
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(given)):
            return _Grouped(inner, given, group_bytes).run()
        updates, new = inner.update(updates, fetched(state), params, **extra)
        return updates, _sent(new, updates if params is None else params)

    return optax.GradientTransformationExtraArgs(init, update)


def on_host(leaf: Any) -> bool:
    """Whether an array, or a traced one, lies in the host's memory."""
    return _compat.is_array(leaf) and jax.typeof(leaf).memory_space == jax.memory.Space.Host


def fetched(state: Any) -> Any:
    """An optimizer's state in device memory, wherever it lay."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Device) if on_host(leaf) else leaf, state)


def put_back(state: Any, like: Any) -> Any:
    """An optimizer's state in the memory that another of the same structure lies in."""
    to_host = partial(jax.device_put, device=jax.memory.Space.Host)
    return jax.tree.map(lambda leaf, old: to_host(leaf) if on_host(old) else leaf, state, like)


def _goes(leaf: Any) -> bool:
    """Whether a leaf of a state is kept on the host: an array of numbers with an axis."""
    return _compat.is_array(leaf) and leaf.ndim > 0 and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def _sent(state: Any, params: Any) -> Any:
    """The state with its arrays on the host."""
    place = _place_of(params)

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array):
            return jax.device_put(leaf, jax.memory.Space.Host) if _goes(leaf) else leaf
        # What has no place of its own, such as a rule's masks, goes where a step with the params finds it.
        own = leaf.sharding if leaf.committed or place is None else place
        if _goes(leaf):
            return jax.device_put(leaf, own.with_memory_kind(HOST))
        return leaf if place is None else jax.device_put(leaf, own)

    return jax.tree.map(one, state)


def _place_of(params: Any) -> Sharding | None:
    """Where arrays lie that belong to no trained array in particular: on every device of the trained ones."""
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.committed:
            sharding = leaf.sharding
            return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
    return None


def _check_memory(params: Any) -> None:
    """Refuses devices without pinned host memory.

    Raises:
        ValueError: with the backend, and the memory kinds that it has.
    """
    known = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)]
    device = next(iter(known[0].devices())) if known else jax.devices()[0]
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if HOST not in kinds:
        raise ValueError(
            f"offload keeps the optimizer's state in the memory kind {HOST!r}, which the backend {device.platform!r} lacks (it "
            f"has {', '.join(map(repr, kinds))}): use the optimizer without offload there"
        )


def _check_state(state: Any) -> None:
    """Refuses a state that is not where `init` puts it.

    Raises:
        ValueError: naming the first such array.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if _goes(leaf) and not on_host(leaf):
            raise ValueError(
                f"offload: {jax.tree_util.keystr(path)} of the optimizer's state is not in the memory kind {HOST!r}: make the "
                "state by this optimizer's init, and restore a stored one with the shardings of such a state"
            )


class _Grouped:
    """One traced update: the equations of `tx.update`, each as soon as the last group that it needs has come.

    Attributes:
        leaves: of everything given to the update.
        groups: positions among the leaves of the state's arrays that are on the device together, group by group.
        variables: of the update's program, by position among the leaves.
        values: of variables of the program, so far.
        sent: arrays of the new state on the host, by position in it.
    """

    def __init__(self, tx: optax.GradientTransformationExtraArgs, given: tuple[Any, ...], group_bytes: int):
        updates, state, params, _ = given
        self.leaves, treedef = jax.tree.flatten(given)
        held = range(len(jax.tree.leaves(updates)), len(jax.tree.leaves((updates, state))))
        groups = _groups(state, updates if params is None else params, group_bytes)
        self.groups = [[held[number] for number in group] for group in groups]
        traced = [n for n, leaf in enumerate(self.leaves) if _compat.is_array(leaf)]

        def update(arrays: Sequence[Any]) -> Any:
            whole = list(self.leaves)
            for place, array in zip(traced, arrays, strict=True):
                whole[place] = array
            updates, state, params, extra = jax.tree.unflatten(treedef, whole)
            return tx.update(updates, state, params, **extra)

        program, form = jax.make_jaxpr(update, return_shape=True)(fetched([self.leaves[n] for n in traced]))
        self.form, self.before = jax.tree.structure(form), len(jax.tree.leaves(form[0]))
        self.jaxpr, consts = _compat.open_jaxpr(program)
        self.variables = dict(zip(traced, self.jaxpr.invars, strict=True))
        self.values = dict(zip(self.jaxpr.constvars, consts, strict=True))
        arrived = {place for group in self.groups for place in group}
        self.values |= {var: self.leaves[n] for n, var in self.variables.items() if n not in arrived}
        self.sent: dict[int, Any] = {}

    def run(self) -> tuple[Any, Any]:
        """The updates, and the new state with its arrays on the host."""
        turns = self._turns()
        due: dict[int, list[Any]] = {}
        for eqn in self.jaxpr.eqns:
            turn = max((turns.get(atom, 0) for atom in eqn.invars if not _is_literal(atom)), default=0)
            turns |= dict.fromkeys(eqn.outvars, turn)
            due.setdefault(turn, []).append(eqn)
        last: list[int] = []
        for turn in range(len(self.groups) + 1):
            if turn:
                self._fetch(self.groups[turn - 1], last)
            for eqn in due.get(turn, ()):
                self.values |= zip(eqn.outvars, bind(eqn, [self._value(atom) for atom in eqn.invars]), strict=True)
            last = self._send(turn, turns) or last
        found = [self.sent.get(n - self.before, None) for n in range(len(self.jaxpr.outvars))]
        found = [self._value(atom) if new is None else new for atom, new in zip(self.jaxpr.outvars, found)]
        return jax.tree.unflatten(self.form, found)

    def _turns(self) -> dict[Any, int]:
        """The number, from 1, of the group that a variable comes with; 0 for what needs none."""
        return {self.variables[place]: turn for turn, group in enumerate(self.groups, 1) for place in group}

    def _value(self, atom: Any) -> Any:
        return atom.val if _is_literal(atom) else self.values[atom]

    def _fetch(self, group: Sequence[int], last: Sequence[int]) -> None:
        """Puts a group on the device, after what was sent last has left it."""
        hosts = [self.leaves[place] for place in group]
        if last:
            # Nothing else says that a group waits: the compiler would fetch all of them as early as it can.
            left, hosts = jax.lax.optimization_barrier(([self.sent[n] for n in last], hosts))
            self.sent |= dict(zip(last, left, strict=True))
        self.values |= {self.variables[place]: array for place, array in zip(group, fetched(hosts), strict=True)}

    def _send(self, turn: int, turns: dict[Any, int]) -> list[int]:
        """Sends the arrays of the new state that are known since this group, and gives their positions."""
        unchanged = {var: self.leaves[place] for place, var in self.variables.items()}
        moved = []
        for n, atom in enumerate(self.jaxpr.outvars[self.before :]):
            if not _goes(atom.aval) or (0 if _is_literal(atom) else turns.get(atom, 0)) != turn:
                continue
            old = None if _is_literal(atom) else unchanged.get(atom)
            if on_host(old):
                self.sent[n] = old
            else:
                self.sent[n] = jax.device_put(self._value(atom), jax.memory.Space.Host)
                moved.append(n)
        return moved


def _is_literal(atom: Any) -> bool:
    return hasattr(atom, "val")


def _groups(state: Any, params: Any, group_bytes: int) -> list[list[int]]:
    """The numbers of the state's arrays on the host, in groups: those of a trained array are together.

    An array belongs to the trained one whose path its own ends with. What belongs to none, such as a rule's record, comes
    first.
    """
    order = {keys: n for n, (keys, _) in enumerate(paths.flatten_with_keys(params)[0])}
    bundles: dict[int, list[int]] = {}
    leaves, _ = paths.flatten_with_keys(state)
    for number, (keys, leaf) in enumerate(leaves):
        if _goes(leaf):
            ends = (keys[n:] for n in range(len(keys) + 1))
            bundles.setdefault(next((order[end] for end in ends if end in order), -1), []).append(number)
    groups, size = [], 0
    for _, bundle in sorted(bundles.items()):
        own = sum(leaves[number][1].size * leaves[number][1].dtype.itemsize for number in bundle)
        if groups and size + own <= group_bytes:
            groups[-1] += bundle
        else:
            groups.append(bundle)
            size = 0
        size += own
    return groups
