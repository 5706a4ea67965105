"""A weight whose own arrays are trained: formed from them, or never formed where it is a product of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import jax

from jlora.core.products.chain import Chain, is_less_work
from jlora.core.products.contraction import Options, accumulation_dtype, in_rows
from jlora.core.products.formed import Formed


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Refactored(Formed):
    """`Formed`, and the same weight as a `Chain`: products of few rows go through it, with no dense gradient.

    In 16 bits the weight is formed, since rounding the chain's matrices would lose small updates of them.

    Attributes:
        chain: the weight as a product, or None where it is none.
    """

    chain: Chain | None = None

    def times(self, number: jax.Array) -> Self:
        """With the number kept beside, and in the chain."""
        found = super().times(number)
        return found if found.chain is None else replace(found, chain=replace(found.chain, number=found.number))

    def dense(self, x: jax.Array, w: Any, key: jax.Array | None, options: Options) -> jax.Array:
        """`x [..., in] @ v`."""
        chain = self._taken(x, options)
        return super().dense(x, w, key, options) if chain is None else _through(chain, x, options)

    def transposed(self, x: jax.Array, w: Any, key: jax.Array | None, options: Options) -> jax.Array:
        """`x [..., out] @ v.T`."""
        chain = self._taken(x, options)
        return super().transposed(x, w, key, options) if chain is None else _through(chain.T, x, options)

    def _taken(self, x: jax.Array, options: Options) -> Chain | None:
        """The chain, where a product with `x` is less work by it."""
        if self.chain is None or options.plan != "auto" or x.dtype != accumulation_dtype(x.dtype):
            return None
        shapes = [(each.shape[0], each.shape[1]) for each in self.chain.matrices]
        return self.chain if is_less_work(math.prod(x.shape[:-1]), shapes) else None


def _through(chain: Chain, x: jax.Array, options: Options) -> jax.Array:
    return in_rows(lambda x: chain.product(x, options.out_dtype, options.precision), x)
