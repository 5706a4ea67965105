"""LoraHub: adapters of other tasks put together by a few numbers, which a search without gradients finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

from jlora import paths
from jlora.compose import plain
from jlora.compose.combine import check_one_base
from jlora.core.protocol.plain import PlainLoRA
from jlora.core.tree.adapted import Adapted, Plan
from jlora.methods.lora import LoRA


@dataclass(frozen=True)
class LoraHub:
    """What `jlora.lorahub` found.

    Attributes:
        adapted: the adapters put together by the best weights, as one LoRA.
        weights: the best weights, `[n]`.
        tried: all weights in the order in which they were tried, `[steps, n]`.
        objectives: what was minimized, of each of them, `[steps]`.
    """

    adapted: Adapted
    weights: np.ndarray
    tried: np.ndarray
    objectives: np.ndarray


def lorahub(
    adapters: Sequence[Adapted],
    loss_fn: Callable[[Adapted], Any],
    *,
    steps: int = 40,
    bound: float = 1.5,
    penalty: float = 0.05,
    say: Callable[[str], None] | None = None,
) -> LoraHub:
    """LoraHub: finds weights by which adapters of other tasks do a new one, from a few examples and without gradients.

    The weight of a leaf is `w + s (Σ w_i a_i) (Σ w_i b_i)`: the factors are added up, so that the update is quadratic in the
    weights `w_i`. Minimized is `loss + penalty * mean |w_i|` over `|w_i| <= bound`. The search begins at 0, the base itself,
    with steps of a third of the bound, by COBYLA (Powell 1994), which is what the authors' optimizer chooses for 5 to 50
    adapters and 40 steps; weights beyond a bound are reflected at it.

    Args:
        adapters: on equal bases, all on the same leaves, with equal ranks and scales, of methods that are plain LoRA exactly.
        loss_fn: of an `Adapted`, one number; compiled once. Such as `lambda adapted: loss(lifted_apply(adapted, x), y)`. The
            authors' code divides the mean loss of its examples by their number again: with five of them, divide by 5 for their
            balance with the penalty.
        steps: how many weights are tried.
        bound: of the weights' sizes.
        penalty: factor of the mean of the weights' sizes.
        say: takes a line whenever better weights are found; None for silence.

    Raises:
        ValueError: for less than one adapter or step, adapters on different bases or leaves, or of different ranks or scales,
            and a loss that is not finite at the base.
        TypeError: for a method without factors.

    Example:
        >>> loss_fn = lambda adapted: jnp.mean(jlora.lift(model.apply)({"params": adapted}, tokens) ** 2)
        >>> hub = jlora.lorahub([adapted, adapted], loss_fn)

    Reference:
        Huang et al. 2023, arXiv:2307.13269.
    """
    if not adapters or steps < 1 or not bound > 0:
        raise ValueError(f"wanted adapters, steps and a bound above 0, got {len(adapters)}, {steps} and {bound}")
    check_one_base(adapters)
    stack, plan = _stacked(adapters)

    @jax.jit
    def score(weights: jax.Array, base: Any, stack: Any) -> jax.Array:
        return loss_fn(_summed(base, stack, plan, weights)) + penalty * jnp.mean(jnp.abs(weights))

    def objective(weights: np.ndarray) -> float:
        return float(score(jnp.asarray(weights, jnp.float32), adapters[0].base, stack))

    tried, objectives = search(objective, len(adapters), steps, bound, say)
    best = tried[int(np.argmin(objectives))]
    adapted = _summed(adapters[0].base, stack, plan, jnp.asarray(best, jnp.float32))
    return LoraHub(adapted, best, tried, objectives)


def search(
    objective: Callable[[np.ndarray], float],
    size: int,
    steps: int,
    bound: float,
    say: Callable[[str], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Tries `steps` points of a box around 0, by COBYLA from 0, and from the best so far where it ends early.

    Returns:
        The points `[steps, size]` in the order in which they were tried, and the objective of each.

    Raises:
        ValueError: for an objective that is not finite at 0. Elsewhere such a point counts as worse than any other.
    """
    tried: list[np.ndarray] = []
    objectives: list[float] = []

    def one(point: np.ndarray) -> float:
        if len(tried) == steps:
            raise _Spent
        inside = _reflected(point, bound)
        found = objective(inside)
        if not tried and not np.isfinite(found):
            raise ValueError(f"the loss of the base, where all weights are 0, is {found}")
        found = found if np.isfinite(found) else np.inf
        if say is not None and (not objectives or found < min(objectives)):
            say(f"LoraHub  {len(tried) + 1}/{steps}  {found:.4f}  by {np.array2string(inside, precision=2)}")
        tried.append(inside)
        objectives.append(found)
        return min(found, _WORST)

    try:
        while True:
            start = tried[int(np.argmin(objectives))] if tried else np.zeros(size)
            minimize(
                one, start, method="COBYLA", tol=1e-6, options={"rhobeg": bound / 3, "maxiter": max(steps, size + 2)}
            )
    except _Spent:
        return np.array(tried), np.array(objectives)


class _Spent(Exception):
    """All steps are made."""


_WORST = 1e30


def _reflected(point: np.ndarray, bound: float) -> np.ndarray:
    """Points beyond a bound reflected at it, once."""
    point = np.asarray(point, np.float64)
    beyond = np.abs(point) - bound
    return np.where(beyond > 0, np.sign(point) * np.maximum(bound - beyond, -bound), point)


def _stacked(adapters: Sequence[Adapted]) -> tuple[list[PlainLoRA], Plan]:
    """The factors of every leaf, those of all adapters stacked in front, and the plan of their sum."""
    paths_of = [[site.path for site in adapted.plan.sites] for adapted in adapters]
    for order, other in enumerate(paths_of):
        if odd := sorted(set(other) ^ set(paths_of[0])):
            raise ValueError(
                f"{odd[0]}: of adapters 0 and {order} only one changes it; LoraHub adds up factors of equal leaves"
            )
    stack, sites = [], []
    weights = [dict(zip(names, adapted.weights())) for names, adapted in zip(paths_of, adapters)]
    for site in adapters[0].plan.sites:
        members: list[PlainLoRA] = []
        for each in weights:
            factors = plain.factors(each[site.path])
            if factors is None:
                raise TypeError(f"{site.path}: {each[site.path].method} has no factors that could be added up")
            members.append(factors)
        sizes = [(one.a.shape, one.b.shape, one.scale) for one in members]
        if different := [size for size in sizes if size != sizes[0]]:
            raise ValueError(
                f"{site.path}: factors and scales must be equal to be added up, got {sizes[0]} and {different[0]}"
            )
        rank = members[0].a.shape[-1]
        a = jnp.stack([one.a * one.gates[..., None, :] for one in members])
        stack.append(replace(members[0], a=a, b=jnp.stack([one.b for one in members])))
        sites.append(replace(site, method=LoRA(rank, members[0].scale * rank), beside=()))
    return stack, Plan(tuple(sites))


def _summed(base: Any, stack: list[PlainLoRA], plan: Plan, weights: jax.Array) -> Adapted:
    params: dict[str, Any] = {}
    for site, factors in zip(plan.sites, stack, strict=True):
        sums = {
            name: jnp.tensordot(weights.astype(side.dtype), side, 1)
            for name, side in (("a", factors.a), ("b", factors.b))
        }
        paths.insert(params, site.keys, sums)
    return Adapted(base, params, {}, {}, plan)
