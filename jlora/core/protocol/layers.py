"""Layers: which matrices of a model belong to one, for methods that treat layers alike."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jlora.core.protocol.method import Site


def layer_numbers(sites: Sequence[Site]) -> tuple[list[np.ndarray], int]:
    """For each leaf the layer of each of its matrices, `[*batch]`, counted from 0, and the number of layers.

    The first axis along which a leaf is stacked counts layers. A leaf that is not stacked belongs to the layer of the first
    key of its path that ends in digits, as in `layers_10/q_proj/kernel`; numbers are ordered as numbers. A stacked leaf
    below the same key as one that is not stacked belongs to that key's layer too: its axis counts experts. A leaf without
    either, such as a pooler, is a layer of its own, before or after the others as their paths are ordered. Layers with the
    same number are one layer, even of two stacks such as an encoder's and a decoder's.
    """
    unstacked = {numbered(site.keys) for site in sites if not site.batch_shape} - {None}
    places = [_places(site, numbered(site.keys) in unstacked) for site in sites]
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


def stated_layers(sites: Sequence[Site]) -> list[np.ndarray]:
    """For each leaf the layer of each of its matrices, `[*batch]`, by the number that the stack or the path gives it.

    As `layer_numbers`, which counts the layers that there are: here layer 5 stays 5 where the leaves of others are left out.

    Raises:
        ValueError: for a leaf in no layer, and for stacked leaves in several numbered parts of the tree, such as experts of
            layers that are leaves of their own, where nothing tells whether their first axis counts layers.
    """
    unstacked = {numbered(site.keys) for site in sites if not site.batch_shape} - {None}
    found, alike = [], {}
    for site in sites:
        layer = numbered(site.keys)
        places = _places(site, layer in unstacked)
        if places is None:
            raise ValueError(f"{site.path} is in no layer: it is not stacked, and no key of its path ends in a number")
        by_axis = bool(site.batch_shape) and layer not in unstacked
        if (
            layer is not None
            and by_axis
            and (other := alike.setdefault(_unnumbered(site.keys, layer), site)) is not site
        ):
            raise ValueError(
                f"{other.path} and {site.path} are stacked, and nothing tells whether their first axis counts layers, or "
                "experts of the layer in the path; give each a pattern of its own"
            )
        column = np.array([number for _, number, _ in places], np.int32)
        shape = (-1, *[1] * (len(site.batch_shape) - 1)) if site.batch_shape else ()
        found.append(np.broadcast_to(column.reshape(shape), site.batch_shape))
    return found


def _places(site: Site, by_path: bool) -> list[tuple[int, int, Any]] | None:
    """What the layers of a leaf are ordered by; None where nothing says it."""
    if site.batch_shape and not by_path:
        return [(0, number, ()) for number in range(site.batch_shape[0])]
    layer = numbered(site.keys)
    if layer is None:
        return None
    number = int(re.findall(r"\d+$", layer[-1])[0])
    return [(0, number, ())] * (site.batch_shape[0] if site.batch_shape else 1)


def layer_paths(sites: Sequence[Site]) -> list[tuple[str, ...] | None]:
    """For each leaf the part of its path that names its layer; None where a stacked axis counts layers, or nothing does."""
    own = [numbered(site.keys) for site in sites]
    unstacked = {path for site, path in zip(sites, own) if not site.batch_shape}
    return [path if path in unstacked else None for path in own]


def kinds(sites: Sequence[Site]) -> tuple[list[int], int]:
    """For each leaf its kind, counted from 0 in the order of the leaves, and the number of kinds.

    Leaves whose paths differ in nothing but the number of the layer are of one kind: the queries of all layers, say.
    """
    names = []
    for site, layer in zip(sites, layer_paths(sites)):
        names.append(site.keys if layer is None else _unnumbered(site.keys, layer))
    known = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return [known[name] for name in names], len(known)


def numbered(keys: tuple[str, ...]) -> tuple[str, ...] | None:
    """The part of a path that names a layer: up to the first key that ends in digits."""
    at = next((n for n, key in enumerate(keys) if key[-1:].isdigit()), None)
    return None if at is None else keys[: at + 1]


def _unnumbered(keys: tuple[str, ...], layer: tuple[str, ...]) -> tuple[str, ...]:
    """A path without the number of its layer."""
    return (*layer[:-1], layer[-1].rstrip("0123456789"), *keys[len(layer) :])


def _natural(path: str) -> tuple[tuple[str, int], ...]:
    """A path in pieces that are ordered as a reader would, numbers as numbers."""
    return tuple((text, int(digits or -1)) for text, digits in re.findall(r"(\D*)(\d*)", path))
