"""The formed weight: what a method gives by `weight` alone, made anew in every pass and never kept for the backward one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jlora.core.products.contraction import Options, accumulation_dtype, in_rows, matmul
from jlora.core.products.update import Update


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Formed(Update):
    """The effective weight as what it is made of.

    In 32 bits a product is `x @ v`. In fewer it is `x @ w + x @ (v - w)`, added up in 32 bits, since `v` rounded to 16 bits
    would lose most of a small update.

    Attributes:
        view: the method's `View` of the matrix.
        number: what the function multiplied the weight with, or None.
    """

    view: Any
    number: jax.Array | None = None
    drops: ClassVar[frozenset[str]] = frozenset()
    sums_matrices: ClassVar[bool] = True

    def times(self, number: jax.Array) -> Self:
        """With the number kept beside."""
        return replace(self, number=number if self.number is None else number * self.number)

    def cost(self, rows: int, columns: int, lookup: bool) -> int:
        """Not counted: the weight is formed once, not for each row."""
        return 0

    def dense(self, x: jax.Array, w: jax.Array, key: jax.Array | None, options: Options) -> jax.Array:
        """`x [..., in] @ v`; `v` is formed again for the gradient."""
        return jax.checkpoint(lambda x, w, update: update._product(x, w, options))(x, w, self)

    def transposed(self, x: jax.Array, w: jax.Array, key: jax.Array | None, options: Options) -> jax.Array:
        """`x [..., out] @ v.T`."""
        return jax.checkpoint(lambda x, w, update: update._product(x, w, options, jnp.transpose))(x, w, self)

    def _product(
        self, x: jax.Array, w: jax.Array, options: Options, turn: Callable[[jax.Array], jax.Array] = lambda m: m
    ) -> jax.Array:
        # Tied to its input: else a compiler is free to form the weights of all layers before the first of them is used.
        x, self = jax.lax.optimization_barrier((x, self))
        v, dtype, precision = self.view.site.method.weight(self.view), options.out_dtype, options.precision
        if x.dtype == accumulation_dtype(x.dtype):
            v = turn(self._times(v)).astype(x.dtype)
            return in_rows(lambda x: matmul(x, v, dtype, precision), x)
        delta = turn(self._times(v - self.view.w.astype(v.dtype))).astype(x.dtype)
        return in_rows(lambda x: _in_two(x, turn(w), delta, dtype, precision), x)

    def _times(self, m: jax.Array) -> jax.Array:
        return m if self.number is None else m * self.number.astype(m.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _in_two(x: jax.Array, w: jax.Array, delta: jax.Array, dtype: Any, precision: Any) -> jax.Array:
    """`x @ w + x @ delta`, rounded once."""
    wide = accumulation_dtype(dtype)
    return (matmul(x, w, wide, precision) + matmul(x, delta, wide, precision)).astype(dtype)


@partial(_in_two.defjvp, symbolic_zeros=True)
def _in_two_jvp(dtype: Any, precision: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """The derivative, with one product for `dx`: rounding `w + delta` there touches the gradient alone."""
    x, w, delta = primals
    dx, *matrices = (None if isinstance(t, SymbolicZero) else t for t in tangents)
    y = _in_two(x, w, delta, dtype, precision)
    terms = [] if dx is None else [matmul(dx, w + delta, dtype, precision)]
    terms += [matmul(x, each, dtype, precision) for each in matrices if each is not None]
    return y, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(y)
