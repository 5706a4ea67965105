"""`next_task`: ends a task of a method that learns one after another, in one compiled program for all tasks."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.core import Tracer

from jlora import _compat, paths
from jlora.core.protocol.lifelong import Lifelong
from jlora.core.protocol.method import Method, Site, Start
from jlora.core.protocol.renewal import Renewal
from jlora.core.protocol.wrapping import parts
from jlora.core.tree import placement
from jlora.core.tree.adapted import SHARED, Adapted
from jlora.core.tree.starts import start_of
from jlora.optimize.allocate.triplets import Triplet, put
from jlora.optimize.moments import check_state, edited, renewed
from jlora.optimize.restart import place_of


class _Drawer(NamedTuple):
    """Where the arrays that leaves share lie, in the place of a site."""

    keys: tuple[str, ...]


def next_task(
    adapted: Adapted,
    opt_state: Any,
    tx: optax.GradientTransformation,
    key: jax.Array,
    *,
    inputs: Any = None,
    donate: bool = True,
) -> tuple[Adapted, Any]:
    """Ends a task and begins the next, for the leaves whose methods learn one after another (`SDLoRA`, `DualLoRA`).

    1. What the task has learned is kept in the method's constants. The lifted function gives what it gave before (but where the
       method's hyperparameters say otherwise).
    2. The method's trained arrays are drawn anew from `key`, but those that go on, such as SD-LoRA's magnitudes.
    3. The optimizer's moments of what begins anew become what they were at the start, with the step count by which Adam
       corrects them. A learning-rate schedule's count goes on.

    All is one compiled program for every task; shapes, dtypes and shardings stay. What is remembered lies in `adapted` and in
    the optimizer's state, so a run that was stopped, within a task too, goes on from both.

    Args:
        adapted: what is trained.
        opt_state: the optimizer's state.
        tx: the optimizer; pass the same object every time, since the program is compiled once for each.
        key: random key of the new task: fold the number of the task into one of your own.
        inputs: for methods that need it (`DualLoRA`) the covariance of each leaf's inputs on the data of the *next* task, as
            `jlora.observe(fn, jlora.input_covariance)` gives it.
        donate: whether the memory of `opt_state` may be used for the results. Then its arrays are deleted.

    Returns:
        The new `Adapted` and the new optimizer state.

    Raises:
        ValueError: where no method learns tasks, or one does inside another; when there is no room for another task; for
            `inputs` that are missing or of another shape; an optimizer that accumulates gradients, in the middle of that;
            L-BFGS and line searches.
        TypeError: under `jit`, where the number of tasks done can't be read.

    Example:
        >>> adapted = jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.SDLoRA(rank=2, tasks=3)})
        >>> tx = jlora.optimizer(adapted, optax.adam, learning_rate=1e-3)
        >>> adapted, opt_state = jlora.next_task(adapted, tx.init(adapted.params), tx, jax.random.fold_in(key, 1))
    """
    sites = tuple(site for site in adapted.plan.sites if isinstance(site.method, Lifelong))
    if not sites:
        raise ValueError(
            "nothing adapted here learns one task after another: next_task is for methods such as SDLoRA and DualLoRA; "
            "jlora.restart begins others anew"
        )
    for site in adapted.plan.sites:
        if site not in sites and any(isinstance(part, Lifelong) for part in parts(site.method)):
            raise ValueError(f"{site.path}: {site.method} has a method inside whose tasks can't be ended there")
    check_state(opt_state, Renewal())
    names = adapted.plan.shared_names()
    for site in sites:
        _check_room(site, paths.lookup(adapted.frozen, site.keys), adapted.shared(names.get(site.method, "")))
    seen = {site.path: _seen(site, inputs) for site in sites if site.method.needs}
    leaves, kept = dict(paths.flatten_with_keys(adapted.base)[0]), (adapted.params, adapted.frozen)
    places, form = jax.tree.flatten(jax.tree.map(place_of, (opt_state, *kept)), is_leaf=lambda x: x is None)
    program = _compiled(sites, adapted.plan, tx, tuple(places), form, donate)
    given = {site.path: leaves[site.keys] for site in sites}
    opt_state, params, frozen = program(opt_state, given, *kept, seen, _compat.typed_key(key))
    return adapted.replace(params=params, frozen=frozen), opt_state


def _check_room(site: Site, frozen: Any, shared: Any) -> None:
    method: Any = site.method
    task = method.task(frozen, shared)
    if isinstance(task, Tracer):
        raise TypeError(f"{site.path}: call next_task outside of jit, where it sees how many tasks {method} has done")
    done = int(np.asarray(placement.complete(task)))
    if done + 1 >= method.tasks:
        raise ValueError(
            f"{site.path}: {method} has room for {method.tasks} tasks, and all of it is taken; give it more tasks at the start"
        )


def _seen(site: Site, inputs: Any) -> jax.Array:
    """A leaf's covariance.

    Raises:
        ValueError: for one that is missing or has another shape.
    """
    found: Any = inputs
    wanted = (*site.batch_shape, site.in_size, site.in_size)
    for name in site.keys:
        found = found.get(name) if hasattr(found, "get") else None
    if found is None or getattr(found, "shape", None) != wanted:
        got = "nothing" if found is None else f"shape {getattr(found, 'shape', type(found).__name__)}"
        raise ValueError(
            f"{site.path}: {site.method} finds the next task's directions in its inputs' covariance {wanted}, got {got}; pass "
            "inputs= what jlora.observe(fn, jlora.input_covariance)(adapted, batch) has seen"
        )
    return found


@functools.lru_cache(maxsize=64)
def _compiled(sites: tuple[Site, ...], plan: Any, tx: Any, places: tuple[Any, ...], form: Any, donate: bool) -> Any:
    """The jitted event; each result is sharded as what it replaces."""
    return jax.jit(
        functools.partial(_begun, sites, plan, tx),
        out_shardings=jax.tree.unflatten(form, places),
        donate_argnums=(0,) if donate else (),
    )


def _begun(
    sites: tuple[Site, ...],
    plan: Any,
    tx: Any,
    opt_state: Any,
    leaves: Any,
    params: Any,
    frozen: Any,
    seen: Any,
    key: Any,
) -> tuple[Any, Any, Any]:
    """The optimizer's state, trained arrays and constants of the next task."""
    names, shared = plan.shared_names(), []
    for method in dict.fromkeys(site.method for site in sites):
        same = tuple(site for site in sites if site.method == method)
        params, frozen, drawer = _one_method(method, same, names.get(method), leaves, params, frozen, seen, key)
        shared.extend([drawer] if drawer else [])
    opt_state = renewed(tx, opt_state, params, sites, Renewal(), key)
    for keys, masks in shared:
        for name, mask in masks.items():
            where = [Triplet(mask, None, None)]
            opt_state = edited(tx, opt_state, (_Drawer(keys),), (name, None, ""), where)  # type: ignore[arg-type]
    return opt_state, params, frozen


def _one_method(
    method: Method,
    sites: tuple[Site, ...],
    name: str | None,
    leaves: Any,
    params: Any,
    frozen: Any,
    seen: Any,
    key: Any,
) -> tuple[Any, Any, tuple[tuple[str, ...], dict[str, jax.Array]] | None]:
    """The arrays of one method's leaves, and which entries of what they share begin anew."""
    assert isinstance(method, Lifelong)
    now, fresh = [], []
    inputs: list[Any] = [seen.get(site.path) for site in sites]
    for site, covariance in zip(sites, inputs, strict=True):
        now.append(Start(paths.lookup(params, site.keys), paths.lookup(frozen, site.keys)))
        statistics: dict[str, Any] = {} if covariance is None else dict.fromkeys(method.needs, covariance)
        fresh.append(start_of(site, leaves[site.path], key, **statistics))
    drawer = (SHARED, name or "")
    shared = Start(paths.lookup(params, drawer), paths.lookup(frozen, drawer)) if name else Start({})
    begun, after = method.after(now, fresh, shared, sites, inputs)
    for site, start in zip(sites, begun, strict=True):
        params = put(params, site.keys, start.params)
        frozen = put(frozen, site.keys, start.frozen) if start.frozen else frozen
    if name is None:
        return params, frozen, None
    params = put(params, drawer, after.params) if after.params else params
    frozen = put(frozen, drawer, after.frozen) if after.frozen else frozen
    return params, frozen, (drawer, method.renewed_entries(after))
