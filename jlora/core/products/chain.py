"""A base matrix that is a product of others, for forms that need no more of it than its products with activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from jlora.core.products.contraction import at_most, matmul


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chain:
    """`w = number * m_1 @ m_2 @ ..`, which is never formed.

    Attributes:
        matrices: `[in, k_1]`, `[k_1, k_2]`, .., `[k_n, out]`; two or more.
        number: what the product is multiplied with, or None.
    """

    matrices: tuple[jax.Array, ...]
    number: jax.Array | None = None

    @property
    def T(self) -> Chain:
        """The transposed matrix."""
        return replace(self, matrices=tuple(m.T for m in reversed(self.matrices)))

    def product(self, x: jax.Array, dtype: Any, precision: Any) -> jax.Array:
        """`x [..., in] @ w` in the dtype, through one matrix after another; what is between them is in that of `x`."""
        *first, last = (m.astype(x.dtype) for m in self.matrices)
        for each in first:
            x = matmul(x, each, x.dtype, precision)
        y = matmul(x, last, dtype, precision)
        return y if self.number is None else y * self.number.astype(y.dtype)


def is_less_work(rows: Any, shapes: Sequence[tuple[int, int]]) -> bool:
    """Whether a product of so many rows takes no more multiply-adds through matrices of these shapes than with their product.

    That one is formed in each pass, from the right: through the matrices `rows * sum(size)`, else `rows * in * out` and what
    forming takes. Of a number of rows that `jax.export` leaves open, whether it holds for all.
    """
    inputs, outputs = shapes[0][0], shapes[-1][1]
    forming = sum(math.prod(shape) * outputs for shape in shapes[:-1])
    return at_most(rows * sum(map(math.prod, shapes)), rows * inputs * outputs + forming)
