"""How arrays meet the folded matrix of a weight: which side of it a use contracts, and axes regrouped to and fro."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jlora.core.products.update import Update
from jlora.core.walk import weight as weights
from jlora.core.walk.weight import Piece, Weight

Label = Any  # a Piece of the weight, or ("x", axis) for an axis of the activation


def side_of(weight: Weight, contract: Any, batch: Any) -> str | None:
    """ "in" for `x @ w`, "out" for `x @ w.T`, None where the contraction is neither."""
    contracted = big(piece for axis in contract for piece in weight.axes[axis])
    stacked = big(piece for axis in batch for piece in weight.axes[axis])
    groups = [weight.axes[axis] for axis in range(len(weight.axes))]
    if any(len({weight.role(piece) for piece in big(group)}) > 1 for group in groups):
        return None
    if any(weight.role(piece) != "batch" for piece in stacked):
        return None
    for role in ("in", "out"):
        if contracted == big(weight.with_role(role)) and (contracted or role == "in"):
            return role
    return None


def big(pieces: Any) -> set[Piece]:
    """The pieces of more than one entry."""
    return {piece for piece in pieces if piece.size > 1}


def sized(group: Sequence[Piece]) -> list[Piece]:
    """The pieces of more than one entry, in their order."""
    return [piece for piece in group if piece.size > 1]


def single_matrix(weight: Weight) -> tuple[jax.Array, Update]:
    """The base matrix and the update of a weight whose batch axes are all of size 1."""
    drop = partial(jax.tree.map, lambda m: m.reshape(m.shape[len(weight.batch) :]))
    return drop(weights.matrix(weight)), drop(weights.update(weight))


def is_float(x: jax.Array) -> bool:
    """Whether an update can be cast to the activation's dtype; 8 bits would round it away."""
    return jnp.issubdtype(x.dtype, jnp.floating) and jnp.dtype(x.dtype).itemsize > 1


def regroup(x: jax.Array, have: list[Any], want: list[Any], sizes: dict[Any, int]) -> jax.Array:
    """Moves an array between two groupings of labels; pieces of size 1 may be missing on either side."""

    def size(label: Label) -> int:
        return label.size if isinstance(label, Piece) else sizes[label]

    flat = [label for group in have for label in group]
    x = x.reshape([size(label) for label in flat])
    target = [label for group in want for label in group]
    present = [label for label in target if label in flat]
    if present != flat:
        x = jax.lax.transpose(x, [flat.index(label) for label in present])
    return x.reshape([math.prod(size(label) for label in group) for group in want])


def arrange(y: jax.Array, labels: list[Label], order: list[Any], shape: tuple[int, ...]) -> jax.Array:
    """The product in the axis order of the equation's result."""
    target = [label for group in order for label in group if label in labels]
    target += [label for label in labels if label not in target]  # hidden axes of size 1
    if target != labels:
        y = jax.lax.transpose(y, [labels.index(label) for label in target])
    return y.reshape(shape)
