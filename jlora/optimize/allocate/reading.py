"""Reads from an optimizer's state what its rules did: ranks now and over the run, and steps that were skipped."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jlora import paths
from jlora.core.protocol.gated import Gated
from jlora.core.protocol.wrapping import innermost
from jlora.core.tree.adapted import Adapted
from jlora.optimize.allocate import history, triplets
from jlora.optimize.allocate.history import RankHistory
from jlora.optimize.allocate.transform import AllocationState, LearningState, _states, allocated


def ranks(adapted: Adapted, opt_state: Any = None) -> dict[str, int]:
    """The ranks in use now, by module: a leaf's path, with the index of the matrix where the leaf is a stack.

    Args:
        adapted: what is trained.
        opt_state: the state of an optimizer by `jlora.optimizer` or `jlora.with_rules`, wrapped or not. Without it the gates
            that are not zero are counted, for methods that have gates, such as GeLoRA and PRILoRA.

    Raises:
        ValueError: for a state without rank allocation, or one whose updates were changed before they were applied.
    """
    if opt_state is None:
        return _open_gates(adapted)
    found: dict[str, int] = {}
    for state in _faithful(adapted, opt_state):
        sites = allocated(adapted, state)
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
        ValueError: for a state without rank allocation, with several of different lengths, or one whose updates were changed
            before they were applied.

    Example:
        >>> adapted = jlora.adapterize(params, {r".*/q_proj/kernel": jlora.AdaLoRA(rank=4, target=2, steps=100)})
        >>> opt_state = jlora.optimizer(adapted, optax.adamw, learning_rate=1e-3).init(adapted.params)
        >>> jlora.rank_history(adapted, opt_state).ranks.tolist()
        [[4]]
    """
    states = _faithful(adapted, opt_state)
    rows = [history.complete_rows(*state.history, state.step) for state in states]
    if any(not np.array_equal(steps, rows[0][0]) for steps, _ in rows):
        raise ValueError("the methods of this optimizer allocate ranks over different numbers of steps")
    names = [name for state in states for name in triplets.names(allocated(adapted, state))]
    columns = dict(zip(names, np.concatenate([table for _, table in rows], axis=1).T, strict=True))
    order = tuple(name for name in triplets.names(adapted.plan.sites) if name in columns)
    return RankHistory(rows[0][0], order, np.stack([columns[name] for name in order], axis=1))


def skipped_steps(opt_state: Any) -> int:
    """The updates so far whose gradients were not all finite, from which rank allocation and PRILoRA learned nothing.

    Such a step counts in their schedules, but changes no score and no average.

    Args:
        opt_state: the state of an optimizer by `jlora.optimizer` or `jlora.with_rules`, wrapped or not.

    Raises:
        ValueError: for a state of neither.

    Example:
        >>> adapted = jlora.adapterize(params, {r".*/q_proj/kernel": jlora.AdaLoRA(rank=4, target=2, steps=100)})
        >>> jlora.skipped_steps(jlora.optimizer(adapted, optax.adamw, learning_rate=1e-3).init(adapted.params))
        0
    """
    return max(int(jax.device_get(state.skipped)) for state in _states(opt_state, LearningState))


def _open_gates(adapted: Adapted) -> dict[str, int]:
    """The number of gates that are not zero, by module, of the methods that have gates."""
    found: dict[str, int] = {}
    for site in adapted.plan.sites:
        if isinstance(inner := innermost(site.method), Gated):
            fields = {**paths.lookup(adapted.frozen, site.keys), **paths.lookup(adapted.params, site.keys)}
            numbers = (np.asarray(jax.device_get(inner.gates(fields))) != 0).sum(-1)
            found |= dict(zip(triplets.names([site]), map(int, numbers.ravel()), strict=True))
    return found


def _faithful(adapted: Adapted, opt_state: Any) -> list[AllocationState]:
    """The allocations in an optimizer's state.

    Raises:
        ValueError: where there are none, or where ranks that they set to zero were not zero at the next update.
    """
    states = _states(opt_state)
    for state in states:
        reopened = np.asarray(jax.device_get(state.reopened))
        if np.any(reopened):
            name = triplets.names(allocated(adapted, state))[int(np.argmax(reopened))]
            raise ValueError(
                f"{name}: the optimizer set ranks to zero that were not zero at its next update ({reopened.max()} times), so "
                "their number is not known; nothing may change what tx.update returns: put optax.scale and the like into "
                "the optimizer inside, as in jlora.with_rules(adapted, optax.chain(optax.adamw(...), optax.scale(...)))"
            )
    return states
