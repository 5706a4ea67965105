"""What an optimizer keeps for every trained value (its moments): found in its state, edited, and renewed at a restart."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.core import Tracer

from jlora import paths
from jlora.core.protocol.method import Site
from jlora.core.protocol.renewal import Renewal
from jlora.optimize import offload
from jlora.optimize.allocate import triplets
from jlora.optimize.allocate.triplets import NOTHING, Fields, Sites, Triplet


def trees(tx: optax.GradientTransformation, state: Any) -> list[Any]:
    """The trees in an optimizer's state that are laid out as the params, such as Adam's two, in a fixed order.

    Leaves that a partition gave to another optimizer are `optax.MaskedNode`.
    """
    found: list[Any] = []
    optax.tree_map_params(tx, found.append, state, is_leaf=lambda _: True)
    return found


def edited(
    tx: optax.GradientTransformation,
    state: Any,
    sites: Sites,
    fields: Fields,
    where: Sequence[Triplet],
    values: Sequence[Sequence[Triplet]] | None = None,
) -> Any:
    """An optimizer's state with some entries set in all that it keeps in the shape of the params.

    What it keeps in another shape, such as Adafactor's sums over rows and columns, stays.

    Args:
        tx: the optimizer.
        state: its state.
        sites: the leaves.
        fields: the names of their factors.
        where: for each site and factor a mask of the entries to set, in a shape that broadcasts; None for a factor that
            stays.
        values: for each of `trees` and each site the new values; by default zero.
    """
    number = itertools.count()
    given, state = state, offload.fetched(state)

    def one_tree(tree: Any) -> Any:
        n = next(number)
        for place, (site, masks) in enumerate(zip(sites, where, strict=True)):
            news = NOTHING if values is None else values[n][place]
            for name, mask, new in zip(fields, masks, news):
                if name is None or mask is None:
                    continue
                moment = paths.lookup(tree, (*site.keys, name))
                if _fits(moment, mask):
                    value = jnp.where(mask, jnp.zeros_like(moment) if new is None else new, moment)
                    tree = triplets.put(tree, (*site.keys, name), value)
        return tree

    return offload.put_back(optax.tree_map_params(tx, one_tree, state, is_leaf=lambda _: True), given)


def _fits(moment: Any, mask: jax.Array) -> bool:
    """Whether a mask for a factor broadcasts to a moment, so that the moment has the factor's shape."""
    if not hasattr(moment, "shape") or not len(moment.shape) == mask.ndim > 0:
        return False
    return all(m in (1, n) for m, n in zip(mask.shape, moment.shape))


@dataclass(frozen=True)
class _Mark:
    """Says of an array of the optimizer's state what becomes of it.

    Attributes:
        number: for a moment of a trained array that begins anew, that array's number among all trained arrays; -1 for a
            moment of one that stays, -2 for what is no moment.
        batch: number of stacked axes of the trained array.
    """

    number: int
    batch: int = 0


_STAYS, _OTHER = _Mark(-1), _Mark(-2)
# A step count that begins anew: any number that is not negative says so.
_COUNT = _Mark(0)
# The names that optax gives to what a state has counted since its start: the steps, by which it corrects its averages, and
# Prodigy's and D-Adaptation's sum, which they divide by one of moments.
_COUNTS = ("count", "t", "numerator_weighted")
# Optimizers whose state has a copy of the trained arrays.
_COPIES = {optax.contrib.ScheduleFreeState: "a schedule-free optimizer", optax.contrib.ProdigyState: "Prodigy"}
_SEARCHES = (optax.ScaleByLBFGSState, optax.ScaleByZoomLinesearchState, optax.ScaleByBacktrackingLinesearchState)


def check_state(opt_state: Any, renewal: Renewal) -> None:
    """Refuses states whose moments can't be renewed.

    Raises:
        ValueError: for gradients that are being accumulated, a share of copies of the trained arrays, and line searches.
    """
    kinds = (optax.MultiStepsState, *_COPIES, *_SEARCHES)
    for state in jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kinds)):
        done = state.mini_step if isinstance(state, optax.MultiStepsState) else 0
        if not isinstance(done, Tracer) and np.asarray(done):
            raise ValueError(
                f"the optimizer is in the middle of accumulating gradients (part {np.asarray(done)} of a step of "
                "optax.MultiSteps): restart after a whole step"
            )
        if isinstance(state, _SEARCHES):
            raise ValueError(
                "L-BFGS and line searches keep gradients and losses of the function as it was: restart with optax.identity() "
                "and its state, and make a new state by tx.init(adapted.params)"
            )
        if type(state) in _COPIES and renewal.prune < 1:
            raise ValueError(
                f"{_COPIES[type(state)]} keeps a copy of the trained arrays in its state, of which no share can become zero: "
                "restart it with prune=1"
            )


def renewed(
    tx: optax.GradientTransformation,
    opt_state: Any,
    params: Any,
    sites: tuple[Site, ...],
    renewal: Renewal,
    key: jax.Array,
) -> Any:
    """The optimizer's state with the moments of some sites renewed.

    A moment is what the optimizer keeps for each trained array (`optax.tree_map_params`). With `prune=1` it becomes what
    `tx.init` makes of the new arrays.

    So does the step count in the same optax state (`count` or `t`), by which Adam corrects its averages for having started at
    zero, and what else such a state has counted since its start (`_COUNTS`). A state with a count and no moments, such as a
    schedule's, goes on. One count may serve moments that begin anew and moments that stay. For the latter the correction is
    then wrong: their steps are up to twice as long after a restart in the first hundred steps of a run, when averages are
    still small, and shorter after a later one. `jlora.optimizer` avoids this by a state of its own for everything that begins
    anew at a time of its own, but for optimizers that look at all arrays together.

    Args:
        tx: the optimizer.
        opt_state: its state.
        params: the new trained arrays, all of them.
        sites: the leaves that begin anew.
        renewal: how.
        key: random key, for pruning.
    """
    marks = optax.tree_map_params(
        tx,
        lambda leaf, mark: leaf if isinstance(leaf, optax.MaskedNode) else mark,
        opt_state,
        _marks(params, sites),
        transform_non_params=lambda _: _OTHER,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    if renewal.prune == 1:
        fresh = tx.init(params)
        return jax.tree.map(lambda mark, old, new: new if mark.number >= 0 else old, _counted(marks), opt_state, fresh)
    given, opt_state = opt_state, offload.fetched(opt_state)
    masks: dict[Any, jax.Array] = {}

    def pruned(mark: _Mark, moment: jax.Array) -> jax.Array:
        if mark.number < 0:
            return moment
        # All moments of an array share one mask, made from the first: Adam divides the mean gradient by the root of the mean
        # square, so a mean kept without its square would be divided by nearly zero.
        place = (mark.number, moment.shape)
        if place not in masks:
            masks[place] = _kept(mark, moment, renewal, key)
        return jnp.where(masks[place], moment, jnp.zeros_like(moment))

    return offload.put_back(jax.tree.map(pruned, marks, opt_state), given)


def _marks(params: Any, sites: tuple[Site, ...]) -> Any:
    """A mark for every trained array, in a tree like `params`."""
    batches = {site.keys: len(site.batch_axes) for site in sites}
    leaves, treedef = paths.flatten_with_keys(params)
    return jax.tree.unflatten(
        treedef,
        [_Mark(n, batches[keys[:-1]]) if keys[:-1] in batches else _STAYS for n, (keys, _) in enumerate(leaves)],
    )


def _counted(marks: Any) -> Any:
    """The marks, with `_COUNT` for the step count of every optax state that has a moment which begins anew."""
    if isinstance(marks, dict):
        return {name: _counted(each) for name, each in marks.items()}
    if not isinstance(marks, tuple | list):
        return marks
    inside = [_counted(each) for each in marks]
    if not hasattr(marks, "_fields"):
        return type(marks)(inside)
    node: Any = type(marks)(*inside)
    moments = [each for each in node if isinstance(each, Mapping)]
    if not any(mark.number >= 0 for mark in jax.tree.leaves(moments)):
        return node
    return node._replace(**{name: _COUNT for name in _COUNTS if getattr(node, name, None) == _OTHER})


def _kept(mark: _Mark, moment: jax.Array, renewal: Renewal, key: jax.Array) -> jax.Array:
    """A mask of the entries of a moment that are kept; by "magnitude" the same number in each matrix of a stack."""
    if renewal.by == "random":
        return jax.random.bernoulli(jax.random.fold_in(key, mark.number), 1 - renewal.prune, moment.shape)
    rows = jnp.abs(moment).reshape(*moment.shape[: mark.batch], -1)
    # By rank order and not by a threshold: then exactly so many are kept, of equal entries the first.
    place = jnp.argsort(jnp.argsort(-rows, axis=-1, stable=True), axis=-1)
    return (place < round((1 - renewal.prune) * rows.shape[-1])).reshape(moment.shape)
