"""What a trace finds out of a function: how it reads each leaf of its params."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from jlora import _compat, paths
from jlora.core.protocol.method import GROUPED

#: Primitives that use a weight rather than pass it on, with the kind of site that they make it.
PRODUCTS = {"dot_general": "dot", "ragged_dot_general": "dot", "conv_general_dilated": "conv", "gather": "gather"}


@dataclass(frozen=True)
class Reading:
    """One way in which a function reads a leaf; axes are the leaf's own.

    Attributes:
        name: path of the leaf.
        primitive: the primitive that reads it.
        in_axes, out_axes, batch_axes: roles of the axes; empty where the primitive is no product.
        grouped: whether it is a convolution in feature groups.
    """

    name: str
    primitive: str
    in_axes: tuple[int, ...] = ()
    out_axes: tuple[int, ...] = ()
    batch_axes: tuple[int, ...] = ()
    grouped: bool = False

    @property
    def has_roles(self) -> bool:
        """Whether the axes' roles are known."""
        return bool(self.in_axes or self.out_axes or self.batch_axes)


Keys = tuple[str, ...]


@dataclass(frozen=True)
class Leaf:
    """A leaf of the params tree and how the function reads it.

    Attributes:
        keys: the keys that lead to it.
        shape: its shape.
        readings: every way in which it is read, in program order.
        head: whether it is a head of the function: its product is an output, with no other weight's product after it.
        entered: whether it, or something made of it without data, meets an activation in a product.
    """

    keys: Keys
    shape: tuple[int, ...]
    readings: tuple[Reading, ...]
    head: bool
    entered: bool = False

    @property
    def path(self) -> str:
        """The `/`-joined path."""
        return "/".join(self.keys)

    @property
    def products(self) -> tuple[Reading, ...]:
        """The readings that are products or lookups, as far as the leaf's axes are known there."""
        return tuple(reading for reading in self.readings if reading.primitive in PRODUCTS and reading.has_roles)

    @property
    def kind(self) -> str | None:
        """ "gather" where the leaf is looked up, else "dot", "conv" or "grouped conv"; None where it is in no product."""
        kinds = [GROUPED if reading.grouped else PRODUCTS[reading.primitive] for reading in self.products]
        return next((kind for kind in ("gather", GROUPED, *kinds) if kind in kinds), None)

    @property
    def roles(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
        """(in, out, batch) axes; None where products disagree, or contract a part of an axis.

        In and out may be exchanged, as in a head that is tied to an embedding: then those of the lookup count.
        """
        products = sorted(self.products, key=lambda reading: reading.primitive != "gather")
        if not products:
            return None
        # A product of one input with all matrices of a stack reads like a product with more out axes; where another product
        # shows which of them is the stack's, it is so here too.
        stacks = {reading.batch_axes for reading in products if reading.batch_axes}
        products = [_as_stack(reading, *stacks) if len(stacks) == 1 else reading for reading in products]
        first = products[0]
        for other in products[1:]:
            same = (other.in_axes, other.out_axes) in ((first.in_axes, first.out_axes), (first.out_axes, first.in_axes))
            if not same or other.batch_axes != first.batch_axes:
                return None
        return first.in_axes, first.out_axes, first.batch_axes


def _as_stack(reading: Reading, batch: tuple[int, ...]) -> Reading:
    """The reading with the axes `batch`, which it has among its out axes, as batch axes."""
    out = tuple(axis for axis in reading.out_axes if axis not in batch)
    is_one = not reading.batch_axes and out and set(batch) <= set(reading.out_axes)
    return replace(reading, out_axes=out, batch_axes=batch) if is_one else reading


@dataclass(frozen=True)
class Sites:
    """The report of `jlora.sites`; print it to see what the function does with each leaf.

    Attributes:
        leaves: one entry for each leaf of the function's params.
    """

    leaves: tuple[Leaf, ...]

    def aligned(self, shapes: dict[Keys, Any]) -> dict[Keys, Leaf]:
        """The leaves by the keys of a params tree, which may sit deeper in the function's argument than at its top.

        Raises:
            ValueError: where the tree is no part of the argument that was traced.
        """
        by_keys = {leaf.keys: leaf for leaf in self.leaves}
        arrays = {keys: leaf for keys, leaf in shapes.items() if _compat.is_array(leaf)}
        wrong: list[Keys] = list(arrays)
        for prefix in _prefixes(arrays, by_keys):
            found = {keys: leaf for keys in arrays if (leaf := by_keys.get((*prefix, *keys))) is not None}
            other = [keys for keys, array in arrays.items() if _differs(array, found.get(keys))]
            if not other:
                return found
            wrong = min(wrong, other, key=len)
        if not wrong:
            return {}
        path = "/".join(wrong[0])
        raise ValueError(
            f"sites was traced on other params: leaf {path!r}, shape {tuple(arrays[wrong[0]].shape)}, is not among its "
            f"{len(self.leaves)} leaves (nearest: {paths.nearest(path, [leaf.path for leaf in self.leaves])})"
        )

    def __str__(self) -> str:
        rows = []
        for leaf in self.leaves:
            roles = leaf.roles
            text = "-" if roles is None else " ".join(_role_words(leaf.shape, roles))
            reads = ", ".join(dict.fromkeys(reading.primitive for reading in leaf.readings)) or "not read"
            rows.append((leaf.path, "x".join(map(str, leaf.shape)), text, reads + (" (head)" if leaf.head else "")))
        widths = [max(len(row[n]) for row in rows) for n in range(4)] if rows else []
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def _prefixes(arrays: dict[Keys, Any], traced: dict[Keys, Leaf]) -> list[Keys]:
    """The keys below which a params tree may sit in the argument that was traced: those before the first leaf found there."""
    ends = ({found[: len(found) - len(keys)] for found in traced if found[-len(keys) :] == keys} for keys in arrays)
    return sorted(next(filter(None, ends), set()), key=len)


def _differs(array: Any, leaf: Leaf | None) -> bool:
    """Whether an array was traced in another shape, or was left out of the trace although it could be adapted."""
    if leaf is None:
        return jnp.issubdtype(array.dtype, jnp.floating)
    return leaf.shape != tuple(array.shape)


def _role_words(shape: tuple[int, ...], roles: tuple[tuple[int, ...], ...]) -> list[str]:
    names = dict(
        zip(
            (axis for axes in roles for axis in axes),
            (n for n, axes in zip(("in", "out", "batch"), roles) for _ in axes),
        )
    )
    return [names.get(axis, "?") for axis in range(len(shape))]
