"""Dropout around another form: entries of the input are dropped where the update acts, not where the base does."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import jax

from jlora.core.products.contraction import Options, accumulation_dtype, drop, matmul
from jlora.core.products.update import Update


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dropped(Update):
    """An update of any form, with dropout: `x @ w + (x' @ v - x' @ w)`, where `x'` is `x` with entries dropped.

    Attributes:
        inner: the update.
        rate: probability with which an entry is dropped; static.
    """

    inner: Update
    rate: float = field(metadata={"static": True})
    sums_matrices: ClassVar[bool] = True

    def times(self, number: jax.Array) -> Self:
        """With the inner update times the number."""
        return replace(self, inner=self.inner.times(number))

    def cost(self, rows: int, columns: int, lookup: bool) -> int:
        """The inner update's; a step with dropout costs one product with the matrix more."""
        return self.inner.cost(rows, columns, lookup)

    def dense(self, x: jax.Array, w: jax.Array, key: jax.Array | None, options: Options) -> jax.Array:
        """`x [..., in] @ v`."""
        return self._dropped("dense", x, w, w, key, options)

    def transposed(self, x: jax.Array, w: jax.Array, key: jax.Array | None, options: Options) -> jax.Array:
        """`x [..., out] @ v.T`."""
        return self._dropped("transposed", x, w, w.T, key, options)

    def _dropped(
        self, use: str, x: jax.Array, w: jax.Array, turned: jax.Array, key: jax.Array | None, options: Options
    ) -> jax.Array:
        product = getattr(self.inner, use)
        if key is None:
            return product(x, w, None, options)
        wide = replace(options, out_dtype=accumulation_dtype(options.out_dtype))
        few = drop(x, self.rate, key)
        change = product(few, w, None, wide) - matmul(few, turned, wide.out_dtype, options.precision)
        return (matmul(x, turned, wide.out_dtype, options.precision) + change).astype(options.out_dtype)
