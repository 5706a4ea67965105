"""What a walk takes out of a function beside its outputs: statistics of inputs, and what methods say beside a product.

A weight that is listened to carries the numbers of its matrices among its method's arrays. Whatever slices a stack slices them
too, so that a product knows which matrices it is of, inside loops as well. Each product leaves a `Tap`: those numbers and what
is taken. Loops and checkpoints return the taps of their bodies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from jlora.core.protocol.method import Arrays, Site
from jlora.core.walk.interpreter import Walk
from jlora.core.walk.weight import Weight

#: The name of a weight's matrix numbers among its constants; no field of a method starts so.
NUMBERS = "~numbers"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tap:
    """What is taken at one product.

    Attributes:
        numbers: which of the leaf's matrices it is of, `[...]`; more axes in front for the loops around it.
        sums: arrays with the axes of `numbers` in front.
        name: path of the leaf; static.
    """

    numbers: jax.Array
    sums: Any
    name: str = field(metadata={"static": True})


def numbered(weight: Weight, batch_shape: tuple[int, ...]) -> Weight:
    """The weight with the numbers of its matrices, whose batch axes have the given sizes."""
    numbers = jnp.arange(math.prod(batch_shape), dtype=jnp.int32).reshape(batch_shape)
    return replace(weight, frozen={**weight.frozen, NUMBERS: numbers})


def listens(walk: Walk, weight: Weight) -> bool:
    """Whether what the method says of a weight is taken."""
    return walk.says and NUMBERS in weight.frozen


def hear(walk: Walk, weight: Weight, said: Arrays, stacked: bool = True) -> None:
    """Adds what a method said at a product to the walk's taps: `[*batch, ...]`, or of its only matrix where not `stacked`."""
    numbers = weight.frozen[NUMBERS]
    if said:
        walk.taps.append(Tap(numbers if stacked else numbers.reshape(()), said, weight.name))


def laid_out(taps: Sequence[Tap], site: Site) -> Arrays:
    """What the products of a leaf's matrices said, by name, `[*batch, ...]`; NaN for a matrix that says nothing.

    Args:
        taps: those of the leaf.
        site: the leaf.

    Raises:
        ValueError: for matrices that are used more than once, or say things of different names or shapes.
    """
    count, total = math.prod(site.batch_shape), sum(tap.numbers.size for tap in taps)
    if total > count:
        raise ValueError(
            f"aux: {site.path} has {count} {'matrix' if count == 1 else 'matrices'}, used by {total} products, and what is "
            "said at each use can't be told apart; lift the part of the function that uses it once"
        )
    shapes = [{name: (x.shape[tap.numbers.ndim :], x.dtype) for name, x in tap.sums.items()} for tap in taps]
    for other in shapes[1:]:
        if other != shapes[0]:
            raise ValueError(f"aux: the matrices of {site.path} say different things: {shapes[0]} and {other}")
    numbers = jnp.concatenate([tap.numbers.reshape(-1) for tap in taps])
    said: Arrays = {}
    for name, (shape, dtype) in shapes[0].items():
        flat = jnp.concatenate([tap.sums[name].reshape(-1, *shape) for tap in taps])
        if count > 1:
            nothing = jnp.nan if jnp.issubdtype(dtype, jnp.inexact) else 0
            flat = jnp.full((count, *shape), nothing, dtype).at[numbers].set(flat)
        said[name] = flat.reshape(*site.batch_shape, *shape)
    return said
