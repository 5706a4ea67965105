"""`coding_errors`: what leaves lost when they were kept in the form of a code."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jlora import paths
from jlora.core.protocol.code import Code
from jlora.core.protocol.stored import Stored, decoded, kept_bytes


@dataclass(frozen=True)
class CodingError:
    """What one leaf lost, or all together.

    Attributes:
        path: of the leaf.
        code: the code; None in a sum over leaves.
        size: number of weights.
        bits: bits a weight; what leaves have in common counts for each in equal parts.
        relative: `|w - decoded| / |w|` in Frobenius norm; 0 where both are zero.
        largest: the largest `|w - decoded|` of a single weight, in the weights' unit.
    """

    path: str
    code: Code | None
    size: int
    bits: float
    relative: float
    largest: float


@dataclass(frozen=True)
class CodingErrors:
    """The errors of all leaves that are kept in the form of a code; as text a table, the worst leaf first.

    Attributes:
        leaves: one entry a leaf, in the order of the tree.
        total: of all leaves together.
    """

    leaves: tuple[CodingError, ...]
    total: CodingError

    def __str__(self) -> str:
        """The table."""
        rows = [("leaf", "code", "weights", "bits", "relative", "largest")]
        for each in (*sorted(self.leaves, key=lambda each: -each.relative), self.total):
            code = "-" if each.code is None else str(each.code)
            numbers = f"{each.size:,}", f"{each.bits:.3f}", f"{each.relative:.4f}", f"{each.largest:.3g}"
            rows.append((each.path, code, *numbers))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        aligned = [[*map(str.ljust, row[:2], widths[:2]), *map(str.rjust, row[2:], widths[2:])] for row in rows]
        return "\n".join("  ".join(row) for row in aligned)


def coding_errors(params: Any, quantized: Any) -> CodingErrors:
    """What every leaf lost that is kept in the form of a code, and the bits that it takes.

    Args:
        params: the original params. Leaves that are not kept in the form of a code may be missing.
        quantized: the same by `jlora.quantize`, or read so.

    Raises:
        ValueError: where nothing is kept in the form of a code, or such a leaf has no original, one of another shape, or one
            that is no array but kept in the form of a code itself.

    Example:
        >>> print(jlora.coding_errors(params, jlora.quantize(params, {r".*/q_proj/kernel": jlora.Int8()})))
    """
    originals = dict(paths.flatten_with_keys(params)[0])
    stored = {keys: leaf for keys, leaf in paths.flatten_with_keys(quantized)[0] if isinstance(leaf, Stored)}
    if not stored:
        raise ValueError(
            "no leaf is kept in the form of a code: give the original params first, then those of jlora.quantize"
        )
    shares = _bits(list(stored.values()))
    found, lost, whole = [], 0.0, 0.0
    for (keys, leaf), bits in zip(stored.items(), shares, strict=True):
        path = "/".join(keys)
        squares, of, largest = map(float, _measured(_original(path, originals.get(keys), leaf), leaf))
        found.append(CodingError(path, leaf.code, leaf.size, bits / leaf.size, _ratio(squares, of), largest))
        lost, whole = lost + squares, whole + of
    size = sum(leaf.size for leaf in stored.values())
    worst = max(each.largest for each in found)
    bits = 8 * kept_bytes(stored.values()) / size
    return CodingErrors(tuple(found), CodingError("together", None, size, bits, _ratio(lost, whole), worst))


def _original(path: str, original: Any, leaf: Stored) -> Any:
    if original is None or isinstance(original, Stored) or getattr(original, "shape", None) != leaf.shape:
        got = "nothing" if original is None else repr(original) if isinstance(original, Stored) else original.shape
        raise ValueError(
            f"{path} is kept as {leaf.code} and of shape {leaf.shape}; among the originals there is {got} for it"
        )
    return original


def _bits(leaves: list[Stored]) -> list[float]:
    """The bits of each leaf, with its equal part of what a group has in common."""
    members = [[other for other in leaves if leaf.group and other.group == leaf.group] or [leaf] for leaf in leaves]
    alone = [kept_bytes([leaf]) for leaf in leaves]
    over = [sum(kept_bytes([each]) for each in group) - kept_bytes(group) for group in members]
    # A group of n leaves that each count the common bytes c has them n - 1 times too often.
    shared = [extra / max(len(group) - 1, 1) for extra, group in zip(over, members, strict=True)]
    return [8 * (own - c + c / len(group)) for own, c, group in zip(alone, shared, members, strict=True)]


@jax.jit
def _measured(original: Any, leaf: Stored) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The squared error, the squared norm of the original, and the largest error."""
    w = jnp.asarray(original).astype(jnp.float32)
    off = w - decoded(leaf).astype(jnp.float32)
    return jnp.sum(off**2), jnp.sum(w**2), jnp.max(jnp.abs(off))


def _ratio(squares: float, of: float) -> float:
    return math.sqrt(squares / of) if of else 0.0 if not squares else math.inf
