"""A table with more rows than its matrix: ids beyond the last row of an embedding read rows of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import jax

from jlora.core.products.contraction import Options, matmul
from jlora.core.products.update import Update


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Extended(Update):
    """The base's matrix `w [in, out]` as it is, and rows that only a lookup reaches.

    As a head (`x @ w.T`) the table has its own rows alone, since no model predicts the ids beyond them.

    Attributes:
        rows: `[number, out]`, what the ids `in`, `in + 1`, .. read.
        path: the leaf, for messages; static.
    """

    rows: jax.Array
    path: str = field(metadata={"static": True})
    drops: ClassVar[frozenset[str]] = frozenset()
    alone: ClassVar[frozenset[str]] = frozenset({"dense", "transposed", "lookup"})

    def times(self, number: jax.Array) -> Self:
        """With the rows times the number."""
        return replace(self, rows=self.rows * number.astype(self.rows.dtype))

    def cost(self, rows: int, columns: int, lookup: bool) -> int:
        """Nothing."""
        return 0

    def dense(self, x: jax.Array, w: jax.Array, key: jax.Array | None, options: Options) -> jax.Array:
        """Refuses: the only product with a table's rows is one of one-hot ids, in which ids beyond the last row are zero.

        Raises:
            ValueError: always, with the leaf.
        """
        raise ValueError(
            f"{self.path}: virtual tokens are ids beyond the last row, which a lookup reads (jnp.take, or indexing); the "
            "function multiplies the table with an activation, such as one-hot ids, in which they would be zero"
        )

    def transposed(self, x: jax.Array, w: jax.Array, key: jax.Array | None, options: Options) -> jax.Array:
        """`x [..., out] @ w.T`."""
        return matmul(x, w.T, options.out_dtype, options.precision)

    def lookup(self, base: jax.Array, w: jax.Array, take: Callable[[jax.Array], jax.Array], side: str) -> jax.Array:
        """The rows as they are.

        Raises:
            ValueError: where columns are looked up.
        """
        if side != "in":
            raise ValueError(f"{self.path}: virtual tokens are rows of a table, of which the function looks up columns")
        return base

    def beyond(self) -> jax.Array:
        """The rows."""
        return self.rows
