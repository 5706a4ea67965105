"""What an optimizer keeps for every trained value (its moments): found in its state whatever the optimizer, and edited."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jlora import paths
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
        where: for each site and factor a mask of the entries to set, in a shape that broadcasts; None for a factor that stays.
        values: for each of `trees` and each site the new values; by default zero.
    """
    number = itertools.count()

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

    return optax.tree_map_params(tx, one_tree, state, is_leaf=lambda _: True)


def _fits(moment: Any, mask: jax.Array) -> bool:
    """Whether a mask for a factor broadcasts to a moment, so that the moment has the factor's shape."""
    if not hasattr(moment, "shape") or not len(moment.shape) == mask.ndim > 0:
        return False
    return all(m in (1, n) for m, n in zip(mask.shape, moment.shape))
