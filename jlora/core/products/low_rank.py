"""The low-rank form: `(w + a @ b) * scale`, and its uses.

Every use of a weight is a map that is linear in the matrix: a product, a convolution, a lookup. The adapter's path is that
same map with `a [in, r]`, followed by `b [r, out]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from jlora.core.products import contraction
from jlora.core.products.chain import Chain
from jlora.core.products.contraction import Options, accumulation_dtype, drop, in_rows, matmul
from jlora.core.products.update import Linear, Update


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factors(Update):
    """The effective weight as data: `(w + a @ b) * scale`.

    Attributes:
        a: `[in, r]`.
        b: `[r, out]`.
        scale: `[out]`, or None for one.
        dropout: probability with which an entry of the adapter path's input is dropped; static.
        constants: how many of the last columns of `a` and rows of `b` are constants, without a gradient; static.
    """

    a: jax.Array
    b: jax.Array
    scale: jax.Array | None = None
    dropout: float = field(default=0.0, metadata={"static": True})
    constants: int = field(default=0, metadata={"static": True})
    refuses_forming: ClassVar[bool] = True
    chains: ClassVar[bool] = True

    def weight(self, w: jax.Array) -> jax.Array:
        """The effective weight `[in, out]`, for methods that give theirs by these factors alone; in the factors' dtype."""
        v = w.astype(self.a.dtype) + self.a @ self.b
        return v if self.scale is None else v * self.scale

    def times(self, number: jax.Array) -> Self:
        """With `b` times the number."""
        return replace(self, b=self.b * number.astype(self.b.dtype))

    def scaled(self, scale: jax.Array) -> Self:
        """With one scale more."""
        return replace(self, scale=scale if self.scale is None else scale * self.scale)

    def cost(self, rows: int, columns: int, lookup: bool) -> int:
        """`r * (in + out)`; a lookup of a row of `a` leaves `r * out`."""
        scale = 0 if self.scale is None else columns
        return self.a.shape[1] * (columns if lookup else rows + columns) + scale

    def dense(self, x: jax.Array, w: Any, key: jax.Array | None, options: Options) -> jax.Array:
        """`x [..., in] @ ((w + a @ b) * scale)`."""
        chained = isinstance(w, Chain)
        if not chained and (key is None or self.dropout == 0):
            return self.together(x, [(w, self)], options)[0]

        def product(x: jax.Array, m: jax.Array, dtype: Any) -> jax.Array:
            return matmul(x, m, dtype, options.precision)

        def base(x: jax.Array, dtype: Any) -> jax.Array:
            return w.product(x, dtype, options.precision) if chained else product(x, w, dtype)

        linear = Linear(base, product, product, jnp.multiply, options.out_dtype)
        return in_rows(lambda x: self._apart(x, key, linear), x)

    def transposed(self, x: jax.Array, w: Any, key: jax.Array | None, options: Options) -> jax.Array:
        """`x [..., out] @ ((w + a @ b) * scale).T`."""
        scaled = x if self.scale is None else x * self.scale.astype(x.dtype)
        return Factors(self.b.T, self.a.T, None, self.dropout, self.constants).dense(scaled, w.T, key, options)

    @staticmethod
    def together(x: jax.Array, members: Sequence[tuple[jax.Array, Factors]], options: Options) -> list[jax.Array]:
        """The products of `x` with several weights: it meets all their `a` in one thin product.

        The same holds in the backward pass, where one product gives the gradients of all `a`.
        """
        a, b = ([m.astype(x.dtype) for m in side] for side in ([f.a for _, f in members], [f.b for _, f in members]))
        weights, constants = [w for w, _ in members], [f.constants for _, f in members]
        scales = [f.scale for _, f in members]
        return contraction.products(x, weights, a, b, scales, constants, options)

    def lookup(self, base: jax.Array, w: jax.Array, take: Callable[[jax.Array], jax.Array], side: str) -> jax.Array:
        """Rows of the base, plus rows of `a` times `b`; columns are rows of the transposed matrix."""
        accumulate = accumulation_dtype(base.dtype)
        table, other = (self.a, self.b) if side == "in" else (self.b.T, self.a.T)
        total = base + matmul(take(table).astype(base.dtype), other.astype(base.dtype), accumulate)
        if self.scale is not None:
            scale = self.scale.astype(accumulate)
            total = total * (scale if side == "in" else take(scale[:, None]))
        return total.astype(base.dtype)

    def convolve(self, x: jax.Array, w: jax.Array, key: jax.Array | None, linear: Linear) -> jax.Array:
        """A convolution with kernel `a`, then `b` on the features; with feature groups, `a` serves every group."""
        return self._apart(x, key, linear)

    def experts(self, x: jax.Array, w: jax.Array, key: jax.Array | None, linear: Linear) -> jax.Array:
        """Each row with its expert's `a`, then with its `b`."""
        return self._apart(x, key, linear)

    def _apart(self, x: jax.Array, key: jax.Array | None, linear: Linear) -> jax.Array:
        """The base's part and the adapter's, added before rounding.

        With dropout, `x` is dropped wherever the adapter acts: in the low-rank path, and in the part `scale - 1` of the
        base (as DoRA's reference does).
        """
        accumulate = accumulation_dtype(linear.out_dtype)
        dropped = drop(x, self.dropout, key)
        base = linear.base(x, accumulate)
        thin = linear.product(dropped, self.a.astype(x.dtype), x.dtype)
        low = linear.mix(thin, self.b.astype(x.dtype), accumulate)
        if self.scale is None:
            return (base + low).astype(linear.out_dtype)
        scale = self.scale.astype(accumulate)
        if dropped is x:
            return linear.rescale(base + low, scale).astype(linear.out_dtype)
        again = linear.base(dropped, accumulate)
        return (base + linear.rescale(again, scale - 1) + linear.rescale(low, scale)).astype(linear.out_dtype)

    def norms(self, w: jax.Array) -> jax.Array:
        """Column norms from `|w|² + 2 b·(aᵀw) + b·((aᵀa) b)`, with no `[in, out]` array formed."""
        w, a, b = w.astype(self.a.dtype), self.a, self.b
        square = jnp.sum(w * w, axis=0) + jnp.sum(b * (2 * (a.T @ w) + (a.T @ a) @ b), axis=0)
        norms = jnp.sqrt(jnp.maximum(square, 0))
        return norms if self.scale is None else norms * jnp.abs(self.scale)
