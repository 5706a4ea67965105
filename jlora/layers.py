"""Layers: which matrices of a model belong to one, for methods that treat layers alike."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jlora.method import Site


def layer_numbers(sites: Sequence[Site]) -> tuple[list[np.ndarray], int]:
    """For each leaf the layer of each of its matrices, `[*batch]`, counted from 0, and the number of layers.

    The first axis along which a leaf is stacked counts layers. A leaf that is not stacked belongs to the layer of the first
    key of its path that ends in digits, as in `layers_10/q_proj/kernel`; numbers are ordered as numbers. A leaf without
    either, such as a pooler, is a layer of its own, before or after those as its path is in order.
    """
    places = [_places(site) for site in sites]
    counted = [_natural(site.path) for site, each in zip(sites, places) if each is not None]
    first = min(counted, default=None)
    found = [
        each if each is not None else [(-1 if first and _natural(site.path) < first else 1, 0, _natural(site.path))]
        for site, each in zip(sites, places)
    ]
    known = {place: number for number, place in enumerate(sorted({place for each in found for place in each}))}
    numbers = []
    for site, each in zip(sites, found):
        column = np.array([known[place] for place in each], np.int32)
        numbers.append(
            np.broadcast_to(column.reshape(-1, *[1] * (len(site.batch_shape) - 1)), site.batch_shape or (1,))
        )
    return [n if site.batch_shape else n[0] for site, n in zip(sites, numbers)], len(known)


def _places(site: Site) -> list[tuple[int, int, Any]] | None:
    """What the layers of a leaf are ordered by; None where nothing says it."""
    if site.batch_shape:
        return [(0, number, ()) for number in range(site.batch_shape[0])]
    ends = (re.search(r"(\d+)$", key) for key in site.keys)
    number = next((int(found[1]) for found in ends if found), None)
    return None if number is None else [(0, number, ())]


def _natural(path: str) -> tuple[tuple[str, int], ...]:
    """A path in pieces that are ordered as a reader would, numbers as numbers."""
    return tuple((text, int(digits or -1)) for text, digits in re.findall(r"(\D*)(\d*)", path))
