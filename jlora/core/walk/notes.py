"""What a method tells the other leaves of its layer: said at one product, known at the products that come after it.

A note stays where it was said: in the body of a loop or a checkpoint, and in bodies inside of that. Where layers are leaves of
their own, each has its own notes; where they are matrices of a stack, a body is a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from jlora.core.protocol.layers import numbered
from jlora.core.protocol.method import Arrays
from jlora.core.walk.weight import Weight

Layer = tuple[str, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Note:
    """What is told at one product, on its way out of it.

    Attributes:
        told: arrays by name.
        layer: whose leaves are told; static.
    """

    told: Arrays
    layer: Layer = field(metadata={"static": True})


Notes = dict[Layer, Arrays]


def known(notes: Notes, weight: Weight) -> Weight:
    """The weight with what its layer was told so far, for a method that tells and is told."""
    if weight.site is None or not weight.method.tells:
        return weight
    return replace(weight, context={**weight.context, **notes.get(_layer(weight), {})})


def note(weight: Weight, said: Arrays) -> list[Note]:
    """What of that which a method said at a product is for the others of its layer.

    Raises:
        ValueError: where the product is one with several matrices at once, which have no layer.
    """
    told = {name: said[name] for name in said if name in weight.method.tells}
    if told and any(piece.size > 1 for piece in weight.batch):
        raise ValueError(
            f"{weight.name}: {weight.method} tells the leaves of its layer something, and this product is one with all layers "
            "at once"
        )
    depth = len(weight.batch)  # of axes of size 1, as of a slice of a stack
    return [Note({name: x.reshape(x.shape[depth:]) for name, x in told.items()}, _layer(weight))] if told else []


def kept(notes: Notes, taps: Sequence[Any]) -> list[Any]:
    """Takes the notes among what came out of a product into those that are known; the rest."""
    for tap in taps:
        if isinstance(tap, Note):
            notes[tap.layer] = {**notes.get(tap.layer, {}), **tap.told}
    return [tap for tap in taps if not isinstance(tap, Note)]


def _layer(weight: Weight) -> Layer:
    site = weight.site
    assert site is not None
    return () if site.batch_shape else numbered(site.keys) or ()
