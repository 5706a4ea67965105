"""The protocol of codes: how a base leaf is kept in another form, such as 4-bit numbers, and read again.

A code is a frozen dataclass of hyperparameters, as a method is. Its functions are pure and see one matrix `w [in, out]`,
used as `y = x @ w`; the core folds leaves to that form and maps over stacks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax

Arrays = dict[str, jax.Array]


@dataclass(frozen=True)
class Code:
    """Base of all codes. A subclass is a frozen dataclass and gives `axes`, `encode` and `decode`.

    Class attributes:
        axes: for each field the role of each of its axes: "in" or "out" for an axis that runs along the matrix's, in whole
            blocks; "" for any other, along which it can't be cut.
    """

    axes: ClassVar[dict[str, tuple[str, ...]]] = {}

    def check(self, rows: int, columns: int) -> None:
        """Whether a matrix of this size can be kept so.

        Raises:
            ValueError: saying what was wanted and what was got.
        """

    def encode(self, w: jax.Array) -> Arrays:
        """The fields of a matrix `w [in, out]` in float32."""
        raise NotImplementedError

    def decode(self, fields: Arrays, rows: int, columns: int) -> jax.Array:
        """The matrix `[in, out]` in float32 that fields stand for."""
        raise NotImplementedError
