"""The protocol of codes: how a base leaf is kept in another form, such as 4-bit numbers, and read again.

A code is a frozen dataclass of hyperparameters, as a method is. Its functions are pure and see one matrix `w [in, out]`,
used as `y = x @ w`; the core folds leaves to that form and maps over stacks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax

Arrays = dict[str, jax.Array]


@dataclass(frozen=True)
class Code:
    """Base of all codes. A subclass is a frozen dataclass and gives `axes`, `encode` and `decode`.

    A code whose matrices have fields in common says over what by `over`, names these fields in `common`, and gives
    `encode_together` in the place of `encode`.
    """

    #: Examples of the code for its tests; every code that `quantize` takes has some.
    CASES: ClassVar[tuple[Code, ...]] = ()

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """For each field the role of each axis: "in" or "out" where it runs along the matrix's in whole blocks, else ""."""
        raise NotImplementedError(f"{type(self).__name__} must state the axes of its fields")

    @property
    def local(self) -> frozenset[str]:
        """Roles along which the matrix can be cut: a part of it is what `decode` gives for the parts of its fields."""
        return frozenset(("in", "out"))

    @property
    def over(self) -> str:
        """Which matrices have fields in common, by which a group of them is found.

        "leaves": those of the leaves of one layer that one entry of a spec matches; "layers": those of leaves whose paths
        differ in nothing but the number of the layer, and all of a stack; "": none.
        """
        return ""

    @property
    def common(self) -> frozenset[str]:
        """Names of the fields that a group has in common."""
        return frozenset()

    @property
    def trained(self) -> frozenset[str]:
        """Names of the fields that `jlora.Fields` can train: of floating point, with `decode` differentiable in them."""
        return frozenset()

    def check_group(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Whether matrices of these sizes `(in, out)` can be a group.

        Raises:
            ValueError: saying what was wanted and what was got.
        """

    def encode_together(self, matrices: Sequence[jax.Array]) -> list[Arrays]:
        """The fields of each matrix of a group, `common` ones the same in all. `matrices` are `[in, out]` in float32."""
        return [self.encode(w) for w in matrices]

    def check(self, rows: int, columns: int) -> None:
        """Whether a matrix of this size can be kept so.

        Raises:
            ValueError: saying what was wanted and what was got.
        """

    def encode(self, w: jax.Array) -> Arrays:
        """The fields of a matrix `w [in, out]` in float32."""
        raise NotImplementedError(f"{type(self).__name__} has no encode")

    def decode(self, fields: Arrays, rows: int, columns: int) -> jax.Array:
        """The matrix `[in, out]` in float32 that fields stand for."""
        raise NotImplementedError(f"{type(self).__name__} has no decode")

    def factored(self, fields: Arrays, rows: int, columns: int) -> tuple[jax.Array, ...] | None:
        """Two or more matrices of which `decode` gives the product; None where there are none.

        An activation goes through them one after another where that takes less work than decoding.
        """
        return None

    def __str__(self) -> str:
        """The code with the hyperparameters that differ from the defaults."""
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!s}' for f in changed)})"
