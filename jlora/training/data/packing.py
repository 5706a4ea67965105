"""Several short examples in one row: fewer padded positions, the same predictions.

Each example keeps its own segment number, and its positions start at 0, so that with attention inside segments alone an
example is computed as if it stood by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jlora.training.data.encode import Example


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which examples share a row: best fit, the longest first, so the result depends on the lengths alone.

    Args:
        lengths: tokens of each example, at most `capacity`.
        capacity: tokens of a row.

    Returns:
        For each row the indices of its examples.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms = 0  # bit i is set where a row with room for i tokens is open: the tightest fit is then a bit operation
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[index])
        if length > capacity:
            raise ValueError(f"example {index} has {length} tokens, a row holds {capacity}")
        fitting = rooms >> length
        room = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
        if fitting:
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(index)
        by_room.setdefault(room - length, []).append(row)
        rooms |= 1 << (room - length)
    return rows


def join(examples: Sequence[Example]) -> Example:
    """Several examples as one, with segment numbers 1, 2, …"""
    if len(examples) == 1:
        return examples[0]
    segments = [np.full(len(example), number, np.int32) for number, example in enumerate(examples, 1)]
    fields = [
        np.concatenate([getattr(e, name) for e in examples]) for name in ("tokens", "targets", "weights", "types")
    ]
    return Example(*fields, label=-1, segments=np.concatenate(segments), cut=any(e.cut for e in examples))


def packed(examples: Sequence[Example], capacity: int) -> list[Example]:
    """The examples packed into rows of at most `capacity` tokens."""
    return [join([examples[i] for i in row]) for row in pack([len(e) for e in examples], capacity)]
