"""One of several low-rank updates, drawn by a key; without one the product of their mean factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import jax

from jlora.core.products.contraction import Options
from jlora.core.products.low_rank import Factors
from jlora.core.products.update import Linear, Update


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OneOf(Update):
    """`w + a_i @ b_j` with `i` and `j` drawn, each by itself, by the call's key; without a key the mean's update.

    Attributes:
        mean: the update by the mean factors, which every use without a key has.
        a: `[experts, in, r]`.
        b: `[experts or 1, r, out]`.
    """

    mean: Factors
    a: jax.Array
    b: jax.Array
    refuses_forming: ClassVar[bool] = True

    def times(self, number: jax.Array) -> Self:
        """With all `b` times the number."""
        return replace(self, mean=self.mean.times(number), b=self.b * number.astype(self.b.dtype))

    def scaled(self, scale: jax.Array) -> Self:
        """With one scale more, which all have in common."""
        return replace(self, mean=self.mean.scaled(scale))

    def cost(self, rows: int, columns: int, lookup: bool) -> int:
        """That of one of them."""
        return self.mean.cost(rows, columns, lookup)

    def dense(self, x: jax.Array, w: jax.Array, key: jax.Array | None, options: Options) -> jax.Array:
        """`x [..., in] @ v`."""
        return self._drawn(key).dense(x, w, None, options)

    def transposed(self, x: jax.Array, w: jax.Array, key: jax.Array | None, options: Options) -> jax.Array:
        """`x [..., out] @ v.T`."""
        return self._drawn(key).transposed(x, w, None, options)

    @staticmethod
    def together(x: jax.Array, members: Sequence[tuple[jax.Array, OneOf]], options: Options) -> list[jax.Array]:
        """The products with several weights, by the mean factors."""
        return Factors.together(x, [(w, update.mean) for w, update in members], options)

    def lookup(self, base: jax.Array, w: jax.Array, take: Callable[[jax.Array], jax.Array], side: str) -> jax.Array:
        """Rows of `v`, or columns, by the mean factors."""
        return self.mean.lookup(base, w, take, side)

    def convolve(self, x: jax.Array, w: jax.Array, key: jax.Array | None, linear: Linear) -> jax.Array:
        """A convolution of `x` with `v`."""
        return self._drawn(key).convolve(x, w, None, linear)

    def experts(self, x: jax.Array, w: jax.Array, key: jax.Array | None, linear: Linear) -> jax.Array:
        """Each row with its expert's `v`; every expert draws on its own."""
        drawn = self.mean if key is None else jax.vmap(OneOf._drawn)(self, jax.random.split(key, len(self.a)))
        return drawn.experts(x, w, None, linear)

    def norms(self, w: jax.Array) -> jax.Array:
        """Column norms of the mean's weight."""
        return self.mean.norms(w)

    def _drawn(self, key: jax.Array | None) -> Factors:
        if key is None:
            return self.mean
        keys = jax.random.split(key)
        i, j = (jax.random.randint(each, (), 0, bank.shape[0]) for each, bank in zip(keys, (self.a, self.b)))
        return replace(self.mean, a=self.a[i], b=self.b[j])
