"""Makes one low-rank adapter for each torch parameter: leaves are split along stacks and parts, then joined by parameter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from jlora.interchange.leaves import layout
from jlora.interchange.leaves.forms import Form
from jlora.interchange.leaves.names import Slot


@dataclass(frozen=True)
class Source:
    """Where some ranks of a tensor come from.

    Attributes:
        slot: the piece of a leaf that they come from.
        form: that leaf's adapter.
        ranks: start and stop of the leaf's ranks among those of the parameter.
    """

    slot: Slot
    form: Form
    ranks: tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """A low-rank adapter of one torch parameter: `s * a @ b`, with `a [in, r]`, `b [r, out]`, and an axis of experts in front.

    Attributes:
        slot: the parameter; where several leaves make it up, the first of them.
        a, b: the factors.
        m: DoRA's magnitude `[out]`, or None.
        alpha: numerator of the scale.
        rslora: whether the scale is `alpha / sqrt(r)`.
        sources: where the values come from.
    """

    slot: Slot
    a: np.ndarray
    b: np.ndarray
    m: np.ndarray | None
    alpha: float
    rslora: bool
    sources: tuple[Source, ...]

    @property
    def name(self) -> str:
        """The torch parameter."""
        return self.slot.name

    @property
    def rank(self) -> int:
        """Columns of `a`."""
        return self.a.shape[-1]

    @property
    def scale(self) -> float:
        """The factor `s` of `a @ b`."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def split(form: Form, slots: Iterable[Slot]) -> list[Piece]:
    """A leaf's adapter cut into pieces, one for each slot."""
    found = []
    for slot in slots:
        index, columns = layout.batch_index(slot, form.site), layout.columns(slot, form.site)
        arrays = {name: array[index] for name, array in form.arrays.items()}
        source = Source(slot, form, (0, form.rank))
        m = arrays["m"][..., columns] if "m" in arrays else None
        found.append(Piece(slot, arrays["a"], arrays["b"][..., columns], m, form.alpha, form.rslora, (source,)))
    return found


def join(pieces: Iterable[Piece]) -> list[Piece]:
    """Joins the pieces of one torch parameter: `a` side by side, `b` as diagonal blocks, so that ranks add up.

    Raises:
        ValueError: for DoRA on some columns of a parameter only, since PEFT's magnitude has all columns.
    """
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.name, []).append(piece)
    return [_joined(sorted(group, key=lambda piece: piece.slot.torch_columns())) for group in groups.values()]


def _joined(group: list[Piece]) -> Piece:
    first, width = group[0], group[0].slot.torch_columns()[2]
    if len(group) == 1 and first.b.shape[-1] == width:
        return first
    if any(piece.m is not None for piece in group):
        raise ValueError(f"{first.slot.path}: DoRA on a part of the torch parameter {first.name!r} can't be expressed")
    same = len({(piece.scale, piece.rslora) for piece in group}) == 1
    rank, at = sum(piece.rank for piece in group), 0
    b = np.zeros((*first.b.shape[:-2], rank, width), first.b.dtype)
    sources = []
    for piece in group:
        start, stop, _ = piece.slot.torch_columns()
        b[..., at : at + piece.rank, start:stop] = piece.b if same else _scaled(piece)
        sources += [replace(source, ranks=(at, at + piece.rank)) for source in piece.sources]
        at += piece.rank
    rslora = first.rslora and same
    alpha = first.scale * (rank**0.5 if rslora else rank) if same else float(rank)
    return Piece(first.slot, np.concatenate([p.a for p in group], axis=-1), b, None, alpha, rslora, tuple(sources))


def _scaled(piece: Piece) -> np.ndarray:
    return piece.b * piece.b.dtype.type(piece.scale)


def folded(piece: Piece, rank: int) -> Piece:
    """The piece with its scale in `b` and zero columns up to a rank: `alpha = rank`, scale 1."""
    more = [(0, 0)] * (piece.a.ndim - 2)
    a = np.pad(piece.a, [*more, (0, 0), (0, rank - piece.rank)])
    b = np.pad(_scaled(piece), [*more, (0, rank - piece.rank), (0, 0)])
    return replace(piece, a=a, b=b, alpha=float(rank), rslora=False)
