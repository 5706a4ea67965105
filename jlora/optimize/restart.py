"""`restart`: ends a link of a chain of adapters and begins the next, in one compiled program for all links."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding

from jlora import _compat, paths
from jlora.core.protocol.method import Arrays, Site
from jlora.core.protocol.renewal import Renewal
from jlora.core.protocol.stored import Stored
from jlora.core.tree import placement
from jlora.core.tree.adapted import SHARED, Adapted
from jlora.core.tree.merge import effective_leaf
from jlora.core.tree.starts import starts_of
from jlora.core.walk import weight as weights
from jlora.core.walk.weight import Weight
from jlora.optimize.allocate.triplets import put
from jlora.optimize.events import EventContext
from jlora.optimize.moments import check_state, renewed


@dataclass(frozen=True)
class _Link:
    """What a restart does: static, a part of the compiled program's key.

    Attributes:
        sites: the leaves that begin anew.
        tx: the optimizer.
        renewal: what becomes of its moments.
    """

    sites: tuple[Site, ...]
    tx: optax.GradientTransformation
    renewal: Renewal


def restart(
    adapted: Adapted,
    opt_state: Any,
    tx: optax.GradientTransformation,
    key: jax.Array,
    *,
    prune: float | None = None,
    by: str | None = None,
    donate: bool = True,
    sites: Sequence[Site] | None = None,
) -> tuple[Adapted, Any]:
    """Keeps what the adapters have learned, and begins new ones: the end of a link of COLA, RAC-LoRA, XGBLoRA or ReLoRA.

    1. Each adapted leaf of the base becomes its effective weight. For `Chain` the base stays as it is, to the bit, and the
       link's factors go among the finished ones.
    2. The method's arrays are drawn anew from `key`, the constants too, except those that leaves share. The new adapter starts
       at the base's output, so the output stays what it was.
    3. The optimizer's moments of these arrays become what they were at the start, and so does the step count by which Adam
       corrects them (`jlora.optimizer` has one count for each chain, and another for what never begins anew, but for
       optimizers that look at all arrays together). A learning-rate schedule's count goes on. With `prune` below 1, as in
       ReLoRA, only that share of each moment becomes zero, and all counts go on.

    Leaves whose methods train values of the weight itself (`Full`, `Rows`) keep them, and their moments. All is one
    compiled program that serves every link; shapes, dtypes and shardings stay.

    Args:
        adapted: what is trained.
        opt_state: the optimizer's state.
        tx: the optimizer; pass the same object every time, since a restart is compiled once for each.
        key: random key of the new link: fold the number of the link into one of your own.
        prune: share of the moments that become zero; by default what a `Chain` says, else all.
        by: which of them: "random" ones, or those where the first moment (Adam's mean) is smallest in "magnitude", matrix by
            matrix. One choice serves all moments of an array. By default what a `Chain` says, else "random".
        donate: whether the memory of `opt_state` and of the folded leaves of the base may be used for the results. Then
            those arrays are deleted, also in the `params` that `adapterize` was given, since it copies nothing.
        sites: the leaves that begin anew; by default all whose methods can.

    Returns:
        The new `Adapted` and the new optimizer state.

    Raises:
        ValueError: for a base of 16 bits, in which a small link would be rounded away; a full chain; a method that starts
            elsewhere than at the base, from data, or follows a schedule of its own, or trains arrays that leaves share; a share
            or choice out of range, or chains that disagree about them; an optimizer that accumulates gradients, in the middle
            of that; L-BFGS and line searches; a share of the moments of an optimizer that keeps copies of the trained arrays.
        TypeError: for a `Chain` under `jit`, where the number of finished links can't be read.

    Example:
        >>> adapted = jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.Chain(jlora.LoRA(rank=2), links=3)})
        >>> tx = jlora.optimizer(adapted, optax.adamw, learning_rate=1e-3)
        >>> opt_state = tx.init(adapted.params)
        >>> adapted, opt_state = jlora.restart(adapted, opt_state, tx, jax.random.fold_in(key, 1))

    Reference:
        Xia et al. 2024, arXiv:2401.04151; Lialin et al. 2023, arXiv:2307.05695.
    """
    renewing = tuple(site for site in adapted.plan.sites if site.method.restarts) if sites is None else tuple(sites)
    renewal = _renewal(renewing, prune, by)
    check_state(opt_state, renewal)
    leaves = dict(paths.flatten_with_keys(adapted.base)[0])
    _check(adapted, renewing, leaves)
    shared = Counter(map(id, leaves.values()))
    folded = {site.path: leaves[site.keys] for site in renewing if not site.method.kept_fields}
    # A donated array is deleted; one that is also another leaf of the base must not be.
    folded = {path: jnp.copy(leaf) if shared[id(leaf)] > 1 else leaf for path, leaf in folded.items()}
    kept = {site.path: leaves[site.keys] for site in renewing if site.method.kept_fields}
    link = _Link(renewing, tx, renewal)
    given = (folded, opt_state, kept, adapted.params, adapted.frozen, _compat.typed_key(key))
    places, form = jax.tree.flatten(
        jax.tree.map(place_of, (folded, opt_state, adapted.params, adapted.frozen)), is_leaf=lambda x: x is None
    )
    found, opt_state, trained, frozen = _compiled(link, adapted.plan, tuple(places), form, donate)(*given)
    new = [found.get(site.path, leaves[site.keys]) for site in adapted.plan.sites]
    base = adapted.with_leaves(new) if found else adapted.base
    return adapted.replace(base=base, params=trained, frozen=frozen), opt_state


def check_restart(adapted: Adapted, sites: tuple[Site, ...]) -> None:
    """Whether these leaves can begin anew.

    Raises:
        ValueError, TypeError: see `restart`.
    """
    _check(adapted, sites, dict(paths.flatten_with_keys(adapted.base)[0]))


def restarted(
    adapted: Adapted, opt_state: Any, tx: optax.GradientTransformation, key: jax.Array, sites: tuple[Site, ...]
) -> tuple[Adapted, Any]:
    """`restart` as a part of another program, in which nothing can be checked: call `check_restart` before.

    A chain must have room for another link.
    """
    leaves = dict(paths.flatten_with_keys(adapted.base)[0])
    folded, kept = {}, {}
    for site in sites:
        (kept if site.method.kept_fields else folded)[site.path] = leaves[site.keys]
    link = _Link(sites, tx, _renewal(sites, None, None))
    given = (folded, opt_state, kept, adapted.params, adapted.frozen, _compat.typed_key(key))
    found, opt_state, trained, frozen = _restarted(link, adapted.plan, *given)
    base = adapted.with_replaced({site.keys: found[site.path] for site in sites if site.path in found})
    return adapted.replace(base=base, params=trained, frozen=frozen), opt_state


def _renewal(sites: tuple[Site, ...], prune: float | None, by: str | None) -> Renewal:
    """What becomes of the moments: as asked for, else as the chains say.

    Raises:
        ValueError: for a share or choice out of range, or sites that disagree.
    """
    own = {(wanted.prune, wanted.by) for wanted in (site.method.renewal for site in sites)}
    if len(own) > 1 and (prune is None or by is None):
        raise ValueError(
            f"the methods that begin anew prune moments in different ways, {sorted(own)}: say prune and by, or restart them "
            "apart by sites"
        )
    wanted = next(iter(own), (1.0, "random"))
    return Renewal(wanted[0] if prune is None else prune, wanted[1] if by is None else by)


def place_of(leaf: Any) -> NamedSharding | None:
    """The sharding of an array on a mesh, which its successor gets too; None for any other."""
    concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
    return leaf.sharding if concrete and isinstance(leaf.sharding, NamedSharding) else None


def _check(adapted: Adapted, sites: tuple[Site, ...], leaves: dict[tuple[str, ...], Any]) -> None:
    """Whether these leaves can begin anew.

    Raises:
        ValueError, TypeError: see `restart`.
    """
    if not sites:
        raise ValueError(
            "nothing adapted here can begin anew: restart is for methods such as LoRA, not for Full or Rows"
        )
    drawers = adapted.plan.shared_names()
    for site in sites:
        if not site.method.exact_start:
            raise ValueError(
                f"{site.path}: {site.method} does not start at the base's output, so a restart would move it"
            )
        if not site.method.mergeable or site.beside:
            raise ValueError(
                f"{site.path}: {site.method} changes more than the weight, so that no new base can take its place; it can't be "
                "restarted"
            )
        scheduled = site.method.optimizer_rule is not None or not (site.method.event is None or site.method.kept_fields)
        if paths.lookup(adapted.params, (SHARED, drawers.get(site.method, ""))):
            raise ValueError(
                f"{site.path}: {site.method} trains arrays that its leaves share, which no leaf can begin anew; merge, and "
                "adapterize the merged params anew"
            )
        if site.method.needs or scheduled:
            what = (
                "starts from data" if site.method.needs else "follows a rule or schedule of its own over the whole run"
            )
            raise ValueError(
                f"{site.path}: {site.method} {what} and can't be restarted; merge, and adapterize the merged params anew"
            )
        if site.method.kept_fields:
            _check_room(site, paths.lookup(adapted.frozen, site.keys))
        elif isinstance(leaf := leaves[site.keys], Stored):
            raise ValueError(
                f"{site.path}: the base is kept as {leaf.code}, into which a finished link can't be merged; use "
                f"jlora.Chain({site.method}, links=...), which leaves the base as it is"
            )
        elif jnp.dtype(site.dtype).itemsize < 4:
            raise ValueError(
                f"{site.path}: the base is {site.dtype}, to which a small link would be rounded away; use "
                f"jlora.Chain({site.method}, links=...), which leaves the base as it is, or a base of float32"
            )


def _check_room(site: Site, frozen: Arrays) -> None:
    done, links = _done(site, frozen), site.method.links
    if links is not None and done + 1 >= links:
        raise ValueError(
            f"{site.path}: link {done + 1} of {site.method} is the last; give it more links at the start, or go on from "
            "jlora.merge(adapted)"
        )


def _done(site: Site, frozen: Arrays) -> int:
    """The number of links that are finished."""
    if "link" not in frozen:
        return 0
    if isinstance(frozen["link"], Tracer):
        raise TypeError(f"{site.path}: call this outside of jit, where it sees how many links {site.method} has done")
    return int(np.max(np.asarray(placement.complete(frozen["link"]))))


@functools.lru_cache(maxsize=64)
def _compiled(link: _Link, plan: Any, places: tuple[Any, ...], form: Any, donate: bool) -> Any:
    """The jitted restart; each result is sharded as what it replaces."""
    return jax.jit(
        partial(_restarted, link, plan),
        out_shardings=jax.tree.unflatten(form, places),
        donate_argnums=(0, 1) if donate else (),
    )


def _restarted(
    link: _Link, plan: Any, folded: Arrays, opt_state: Any, kept: Arrays, params: Any, frozen: Any, key: jax.Array
) -> tuple[Arrays, Any, Any, Any]:
    """The folded leaves, optimizer state, trained arrays and constants of the next link."""
    leaves = {site.keys: {**folded, **kept}[site.path] for site in link.sites}
    found = _weights(link, plan, leaves, params, frozen)
    ends = {keys: effective_leaf(weight) for keys, weight in found.items()}
    for site, start in starts_of(link.sites, ends, key).items():
        params = put(params, site.keys, start.params)
        constants = {**start.frozen, **(_finished(found[site.keys]) if site.method.kept_fields else {})}
        frozen = put(frozen, site.keys, constants) if constants else frozen
    new = {site.path: ends[site.keys] for site in link.sites if site.path in folded}
    moments = renewed(link.tx, opt_state, params, link.sites, link.renewal, jax.random.fold_in(key, len(link.sites)))
    return new, moments, params, frozen


def _weights(link: _Link, plan: Any, leaves: dict[Any, Any], params: Any, frozen: Any) -> dict[Any, Weight]:
    """The weights of the leaves that begin anew."""
    base: dict[str, Any] = {}
    for keys, leaf in leaves.items():
        paths.insert(base, keys, leaf)
    part = Adapted(base, params, frozen, {}, type(plan)(link.sites))
    names = plan.shared_names()
    return {site.keys: weight for site, weight in zip(link.sites, part.weights(names))}


def _finished(weight: Weight) -> Arrays:
    """The constants of a method that keeps what was learned in them."""

    def cut(sharding: Any) -> Any:
        assert weight.site is not None
        specs = placement.field_specs(weight.site, sharding.spec)
        return {name: specs[name] for name in weight.method.kept_fields}

    finish = partial(weights.over_batch, weight.method.finished)
    return _compat.automatic(finish, weight.aval, cut)(weight)


@dataclass(frozen=True)
class LinkEnds:
    """The event of `Chain`: a restart at the end of each link but the last.

    Attributes:
        links: the number of links.
        steps: optimizer steps of the run.
        prune, by: as for `restart`.
    """

    links: int
    steps: int
    prune: float
    by: str

    @property
    def restarts(self) -> tuple[int, ...]:
        """The steps after which the training job's learning rate rises anew: equal shares of the run."""
        return tuple(link_ends(self.links, self.steps))

    def due(self, step: int) -> bool:
        """Whether a link other than the last ends after this many steps."""
        return step in self.restarts

    def happen(self, context: EventContext) -> tuple[Adapted, Any]:
        """Restarts the leaves that share the event."""
        options: Any = {"prune": self.prune, "by": self.by, "sites": context.sites}
        found = restart(context.adapted, context.opt_state, context.tx, context.key, **options)
        context.say(f"link {link_ends(self.links, self.steps).index(context.step) + 2} of {self.links} begins")
        return found


def link_ends(links: int, steps: int) -> list[int]:
    """The steps after which the links end, but for the last: equal shares of the run.

    Example:
        >>> jlora.link_ends(links=4, steps=10)
        [2, 5, 7]
    """
    return [step * steps // links for step in range(1, links)]


def restart_schedule(schedule: optax.Schedule, restarts: Sequence[int], warmup: int) -> optax.Schedule:
    """A schedule that rises anew after each restart: ReLoRA's jagged cosine, if `schedule` is a cosine.

    After a restart at step `t` the rate is `(n + 1) / warmup * schedule(t + warmup)` for `n` = 0 to `warmup - 1`
    steps, then `schedule` again. ReLoRA's reference code begins at 0, a step that does nothing; and its cosine ends at a
    tenth of the peak, which is `optax.cosine_decay_schedule(peak, steps, alpha=0.1)`.

    Args:
        schedule: the rate without restarts.
        restarts: the steps after which links end, such as `jlora.link_ends(links, steps)`.
        warmup: steps of each rise; links shorter than that rise for as long as they last.

    Raises:
        ValueError: for a negative warm-up, or restarts that do not ascend.

    Example:
        >>> rate = jlora.restart_schedule(optax.cosine_decay_schedule(1e-3, 100, alpha=0.1), [25, 50, 75], warmup=5)

    Reference:
        Lialin et al. 2023, arXiv:2307.05695.
    """
    starts = list(restarts)
    if warmup < 0 or starts != sorted(set(starts)):
        raise ValueError(f"restart_schedule wants ascending restarts and a warmup of 0 or more, got {starts}, {warmup}")
    if not starts or not warmup:
        return schedule

    def jagged(count: Any) -> Any:
        last = jnp.max(jnp.where(jnp.asarray(starts) <= count, jnp.asarray(starts), -1))
        since = count - last
        rising = (last >= 0) & (since < warmup)
        return jnp.where(rising, (since + 1) / warmup * schedule(last + warmup), schedule(count))

    return jagged
