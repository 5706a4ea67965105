"""The sparse form: `(w + scatter(index, values)) * scale`, and its uses.

A lookup, a convolution and grouped experts form the weight: a copy with a few changed entries is all that they would need.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from jlora.core.products import entries
from jlora.core.products.contraction import Options, accumulation_dtype
from jlora.core.products.entries import Entries
from jlora.core.products.update import Update


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sparse(Update):
    """The effective weight as data: `(w + scatter(index, values)) * scale`.

    Attributes:
        index: `[k]`, int32: distinct flat positions `row * out + column`.
        values: `[k]`, what is added there.
        scale: `[out]`, or None for one.
    """

    index: jax.Array
    values: jax.Array
    scale: jax.Array | None = None
    sums_matrices: ClassVar[bool] = True

    def times(self, number: jax.Array) -> Self:
        """With the values times the number."""
        return replace(self, values=self.values * number.astype(self.values.dtype))

    def scaled(self, scale: jax.Array) -> Self:
        """With one scale more."""
        return replace(self, scale=scale if self.scale is None else scale * self.scale)

    def cost(self, rows: int, columns: int, lookup: bool) -> int:
        """One for each entry."""
        return self.values.shape[0] + (0 if self.scale is None else columns)

    def dense(self, x: jax.Array, w: jax.Array, key: jax.Array | None, options: Options) -> jax.Array:
        """`x [..., in] @ ((w + scatter(values)) * scale)`; there is no dropout, and the key is not used."""
        wide = accumulation_dtype(options.out_dtype)
        rows, columns = self._positions(w.shape[1])
        at = Entries(rows, columns, self.values)
        if self.scale is None:
            return entries.product(x, w, at, options)
        y = entries.product(x, w, at, replace(options, out_dtype=wide))
        return (y * self.scale.astype(y.dtype)).astype(options.out_dtype)

    def transposed(self, x: jax.Array, w: jax.Array, key: jax.Array | None, options: Options) -> jax.Array:
        """`x [..., out] @ ((w + scatter(values)) * scale).T`."""
        scaled = x if self.scale is None else x * self.scale.astype(x.dtype)
        rows, columns = self._positions(w.shape[1])
        return entries.product(scaled, w.T, Entries(columns, rows, self.values), options)

    def norms(self, w: jax.Array) -> jax.Array:
        """Column norms from `|w|² + sum of (2 w + value) value`, with no sum formed."""
        w, values = w.astype(self.values.dtype), self.values
        rows, columns = self._positions(w.shape[1])
        change = (2 * w[rows, columns] + values) * values
        norms = jnp.sqrt(jnp.maximum(jnp.sum(w * w, axis=0).at[columns].add(change), 0))
        return norms if self.scale is None else norms * jnp.abs(self.scale)

    def _positions(self, columns: int) -> tuple[jax.Array, jax.Array]:
        row, column = jnp.divmod(self.index, jnp.asarray(columns, self.index.dtype))
        return row, column
