"""Converts factors and whole leaves between the layouts of jlora and torch."""

from __future__ import annotations

import math

import numpy as np

from jlora.core.protocol.method import Site
from jlora.interchange.leaves.names import Slot


def check_site(slot: Slot, site: Site) -> None:
    """Refuses names that give a leaf's axes other roles than the adapter does.

    Raises:
        ValueError: naming both.
    """
    if not site.method.matrix:
        return
    if slot.kind == "plain":
        raise ValueError(f"names: {slot.path} is adapted as a matrix, but its kind is 'plain'")
    part = slot.axes("part")
    batch = [*slot.stacked, *slot.axes("expert")]
    out = [*slot.axes("out")]
    (batch if set(part) <= set(site.batch_axes) else out).extend(part)
    ours = (slot.axes("in"), tuple(sorted(out)), tuple(sorted(batch)))
    theirs = (site.in_axes, site.out_axes, site.batch_axes)
    if ours != theirs:
        texts = ["in {}, out {}, stacked {}".format(*axes) for axes in (ours, theirs)]
        raise ValueError(f"names: {slot.path}, shape {slot.shape}: the axes are {texts[0]} by the names, but {texts[1]} "
                         "by the adapter; give a TorchParameter with roles")  # fmt: skip
    if (site.kind == "gather") != (slot.kind == "embedding"):
        what = "looks it up as an embedding" if site.kind == "gather" else "contracts it"
        raise ValueError(f"names: {slot.path}: the function {what}, but its kind is {slot.kind!r}")


def part_is_stacked(slot: Slot, site: Site) -> bool:
    """Whether the axis with the role "part", which counts the names, is one of the adapter's batch axes."""
    return bool(slot.axes("part")) and set(slot.axes("part")) <= set(site.batch_axes)


def batch_index(slot: Slot, site: Site) -> tuple[int | slice, ...]:
    """The index of the slot's piece along the batch axes of the method's arrays; an axis of experts is taken whole."""
    stacked = dict(zip(slot.stacked, slot.index))
    part = dict.fromkeys(slot.axes("part"), slot.part)
    return tuple(stacked.get(axis, part.get(axis, slice(None))) for axis in site.batch_axes)  # type: ignore[misc]


def columns(slot: Slot, site: Site) -> np.ndarray | slice:
    """The columns of the folded matrix that belong to the slot."""
    if slot.part is None or part_is_stacked(slot, site):
        return slice(None)
    return slot.leaf_columns()


def _window(slot: Slot) -> tuple[int, ...]:
    """`[*window, in]` of a convolution."""
    return slot.sizes("in")


def a_to_torch(slot: Slot, a: np.ndarray) -> np.ndarray:
    """`[in, r]` (experts: `[E, in, r]`) as PEFT's A."""
    if slot.kind == "conv":
        return a.T.reshape(a.shape[1], *_window(slot)).transpose(0, len(_window(slot)), *range(1, len(_window(slot))))
    if slot.experts is not None:  # (E r, in), expert-major
        return a.transpose(0, 2, 1).reshape(-1, a.shape[1])
    return a.T


def a_from_torch(slot: Slot, tensor: np.ndarray) -> np.ndarray:
    """The inverse of `a_to_torch`."""
    if slot.kind == "conv":
        order = (*range(2, tensor.ndim), 1, 0)
        return tensor.transpose(order).reshape(-1, tensor.shape[0])
    if slot.experts is not None:
        return tensor.reshape(slot.experts, -1, tensor.shape[1]).transpose(0, 2, 1)
    return tensor.T


def b_to_torch(slot: Slot, b: np.ndarray) -> np.ndarray:
    """`[r, out]` (experts: `[E, r, out]`) as PEFT's B."""
    if slot.kind == "conv":
        return b.T.reshape(b.shape[1], b.shape[0], *([1] * (len(_window(slot)) - 1)))
    if slot.experts is not None:  # (out, r E), expert-minor
        return b.transpose(2, 1, 0).reshape(b.shape[2], -1)
    return b.T


def b_from_torch(slot: Slot, tensor: np.ndarray) -> np.ndarray:
    """The inverse of `b_to_torch`."""
    if slot.kind == "conv":
        return tensor.reshape(tensor.shape[:2]).T
    if slot.experts is not None:
        return tensor.reshape(tensor.shape[0], -1, slot.experts).transpose(2, 1, 0)
    return tensor.T


def a_shape(slot: Slot, rank: int) -> tuple[int, ...]:
    """Shape of PEFT's A for a rank."""
    if slot.kind == "conv":
        *window, width = _window(slot)
        return (rank, width, *window)
    return (rank * (slot.experts or 1), math.prod(slot.sizes("in")))


def b_shape(slot: Slot, rank: int) -> tuple[int, ...]:
    """Shape of PEFT's B for a rank."""
    width = slot.torch_columns()[2]
    if slot.kind == "conv":
        return (width, rank, *([1] * (len(_window(slot)) - 1)))
    return (width, rank * (slot.experts or 1))


def torch_shape(slot: Slot) -> tuple[int, ...]:
    """Shape of the torch parameter."""
    width = slot.torch_columns()[2]
    if slot.kind == "plain":
        if slot.part is None and slot.entry.columns is None:
            return tuple(size for axis, size in enumerate(slot.shape) if axis not in slot.stacked)
        return (width,)
    rows = slot.sizes("in")
    if slot.kind == "conv":
        return (width, rows[-1], *rows[:-1])
    one = (width, math.prod(rows)) if slot.kind in ("linear", "parameter", "experts") else (math.prod(rows), width)
    return one if slot.experts is None else (slot.experts, *one)


def _permutation(slot: Slot) -> tuple[int, ...]:
    """The leaf's axes as `[*stacked, expert, *in, *out and part]`."""
    return (*slot.stacked, *slot.axes("expert"), *slot.axes("in"), *slot.axes("out", "part"))


def whole_to_torch(slot: Slot, leaf: np.ndarray) -> np.ndarray:
    """The slot's piece of a leaf in torch's layout: `torch_shape`, with the slot's own columns only."""
    folded = leaf.transpose(_permutation(slot))[(*slot.index, ...)]
    if slot.kind == "plain" and torch_shape(slot) == folded.shape and slot.part is None:
        return folded
    out = math.prod(slot.sizes("out", "part"))
    columns = slot.leaf_columns()
    if slot.kind == "plain":
        return folded.reshape(out)[columns]
    folded = folded.reshape(*folded.shape[: folded.ndim - len(slot.axes("out", "part"))], out)[..., columns]
    if slot.kind == "conv":
        return folded.transpose(folded.ndim - 1, folded.ndim - 2, *range(folded.ndim - 2))
    lead = () if slot.experts is None else (slot.experts,)
    matrix = folded.reshape(*lead, -1, len(columns))
    return matrix.swapaxes(-1, -2) if slot.kind in ("linear", "parameter", "experts") else matrix


def whole_from_torch(slot: Slot, tensor: np.ndarray, leaf: np.ndarray) -> None:
    """Writes the slot's piece of a torch parameter (with the slot's columns only) into a leaf of jlora's layout."""
    order = _permutation(slot)
    target = leaf.transpose(order)[(*slot.index, ...)]  # the ellipsis makes it a view even where all axes are indexed
    if slot.kind == "plain" and slot.part is None and slot.entry.columns is None:
        target[...] = tensor
        return
    if slot.kind == "conv":
        tensor = tensor.transpose(*range(2, tensor.ndim), 1, 0)
    elif slot.kind in ("linear", "parameter", "experts"):
        tensor = tensor.swapaxes(-1, -2)
    outs = slot.sizes("out", "part")
    lead = target.shape[: target.ndim - len(outs)]
    flat = target.reshape(*lead, -1).copy()
    flat[..., slot.leaf_columns()] = tensor.reshape(*lead, -1)
    target[...] = flat.reshape(target.shape)


def take_columns(slot: Slot, tensor: np.ndarray) -> np.ndarray:
    """The slot's columns of a whole torch parameter."""
    if slot.entry.columns is None:
        return tensor
    start, stop, _ = slot.entry.columns
    return np.take(tensor, np.arange(start, stop), axis=out_axis(slot))


def out_axis(slot: Slot) -> int:
    """The number of the torch parameter's out axis."""
    return {"linear": 0, "parameter": 0, "conv": 0, "plain": 0, "experts": 1}.get(
        slot.kind, 2 if slot.experts is not None else 1
    )
