"""Refuses optimizers that a rule can't go around: those that skip updates, copy or hide arrays, or leave some out."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import optax
import optax.contrib

from jlora import paths
from jlora.core.protocol.method import Site
from jlora.core.tree.adapted import Adapted
from jlora.optimize.offload import on_host

_SEARCH = "a line search inside it would search along a step that the rule then changes; use an optimizer without one"
_WHY = {
    optax.MultiStepsState: "optax.MultiSteps inside it would have it count and score parts of a step; put it around, as in "
    "optax.MultiSteps(jlora.optimizer(...), k)",
    optax.ApplyEvery: "optax.apply_every inside it would have it count and score parts of a step; accumulate outside, as in "
    "optax.MultiSteps(jlora.optimizer(...), k)",
    optax.ScaleByLBFGSState: "L-BFGS inside it would take the rule's changes for its own steps, and search along one that the "
    "rule then changes; use another optimizer",
    optax.ScaleByZoomLinesearchState: _SEARCH,
    optax.ScaleByBacktrackingLinesearchState: _SEARCH,
    optax.contrib.ScheduleFreeState: "a schedule-free optimizer inside it keeps a second copy of the trained arrays, from "
    "which what is taken away comes back; use another optimizer",
}


def around(tx: optax.GradientTransformation, adapted: Adapted, site: Site) -> optax.GradientTransformationExtraArgs:
    """The optimizer, which is checked at once if its state can be traced, and in `init` and `update` in any case.

    Raises:
        ValueError: for one with which the site's rule would do something else than it says.
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        state = inner.init(params)
        _check(state, site)
        return state

    try:
        state = jax.eval_shape(inner.init, adapted.params)
    except Exception:  # an optimizer for more arrays than these: `init` checks it
        state = None
    _check(state, site)
    return optax.GradientTransformationExtraArgs(init, partial(_whole, inner))


def _check(state: Any, site: Site) -> None:
    kinds = tuple(_WHY)
    for node in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds)):
        for kind, why in _WHY.items():
            if isinstance(node, kind):
                raise ValueError(f"{site.path}: {site.method} goes around the optimizer's steps, and {why}")
    if any(map(on_host, jax.tree.leaves(state))):
        raise ValueError(
            f"{site.path}: {site.method} goes around the optimizer's steps, and jlora.offload inside it hides the moments that "
            "it reads; put it around, as in jlora.offload(jlora.optimizer(...))"
        )


def _whole(
    inner: optax.GradientTransformationExtraArgs, updates: Any, state: Any, params: Any = None, **extra: Any
) -> tuple[Any, Any]:
    """An update that refuses an optimizer which gives the gradients of some arrays back unchanged, as `optax.masked` does.

    One that gives all of them back (`optax.identity`) passes: then the user has left the step to something outside.

    Raises:
        ValueError: naming the first such array.
    """
    new, state = inner.update(updates, state, params, **extra)
    before, after = paths.flatten_with_keys(updates)[0], jax.tree.leaves(new)
    raw = ["/".join(keys) for (keys, old), found in zip(before, after) if found is old]
    if raw and len(raw) < len(before):
        raise ValueError(
            f"{raw[0]}: the optimizer gives back its raw gradient as the update, without a rate, as optax.masked does with "
            "what it leaves out; give it an optimizer too, by optax.partition"
        )
    return new, state
