"""Methods that act: a product computed by `Method.apply`, which has the base's product to use as often as it wants."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from jlora.core.products.contraction import Options, accumulation_dtype, matmul
from jlora.core.products.update import Update


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Acting(Update):
    """What a matrix does to its input, as a function of it.

    Attributes:
        view: the method's `View` of the matrix.
        number: what the function multiplied the weight with, or None.
    """

    view: Any
    number: jax.Array | None = None
    drops: ClassVar[frozenset[str]] = frozenset({"dense"})
    draws: ClassVar[bool] = True

    def times(self, number: jax.Array) -> Self:
        """With the number for the result, since what acts need not be proportional to the matrix."""
        return replace(self, number=number if self.number is None else number * self.number)

    def cost(self, rows: int, columns: int, lookup: bool) -> int:
        """What `apply` multiplies for one more row of input, beside one product with the matrix."""
        return self._counted(2, rows) - self._counted(1, rows) - rows * columns

    def _counted(self, number: int, rows: int) -> int:
        """Multiplications for a number of rows of input."""
        x, options = jax.ShapeDtypeStruct((number, rows), self.view.w.dtype), Options(self.view.w.dtype)
        program = jax.make_jaxpr(lambda x, update: Acting.dense(update, x, update.view.w, None, options))(x, self)
        return _multiplications(program.jaxpr)

    def dense(self, x: jax.Array, w: jax.Array, key: jax.Array | None, options: Options) -> jax.Array:
        """`apply(x [..., in])`; its result is rounded once."""
        return self._applied(x, key, options, split_product)[0]

    def spoken(self, x: jax.Array, w: jax.Array, key: jax.Array | None, options: Options) -> tuple[jax.Array, Any]:
        """`apply(x [..., in])`, and what it says."""
        return self._applied(x, key, options, split_product)

    def transposed(self, x: jax.Array, w: jax.Array, key: jax.Array | None, options: Options) -> jax.Array:
        """`x [..., out] @ v.T`, the transpose of what `apply` does, for a method that is linear in its input."""
        shape, wide = jax.ShapeDtypeStruct((*x.shape[:-1], w.shape[0]), x.dtype), accumulation_dtype(options.out_dtype)
        forward = lambda z: self._applied(z, None, replace(options, out_dtype=wide), plain_product)[0]  # noqa: E731
        (y,) = jax.linear_transpose(forward, shape)(x.astype(wide))
        return y.astype(options.out_dtype)

    def _applied(
        self, x: jax.Array, key: jax.Array | None, options: Options, product: Callable[..., jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The result, and what the method says beside it."""
        wide = accumulation_dtype(options.out_dtype)

        def base(z: jax.Array) -> jax.Array:
            return product(z, self.view.w, x.dtype, wide, options.precision)

        method = self.view.site.method
        # Where the method has a weight the function gets the leaf beside as `merge` makes it: see `jlora.core.tree.merge`.
        beside = self.view.beside if key is not None or not method.mergeable else {}
        found = method.apply(x, base, replace(self.view, key=key, beside=beside))
        y, said = found if isinstance(found, tuple) else (found, {})
        if not isinstance(said, dict):
            raise TypeError(
                f"{self.view.site.path}: {method} says a {type(said).__name__}; what apply says is a dict of arrays"
            )
        return (y if self.number is None else y * self.number.astype(y.dtype)).astype(options.out_dtype), said


def plain_product(z: jax.Array, w: jax.Array, dtype: Any, wide: Any, precision: Any) -> jax.Array:
    """`z @ w` in `wide`, with `z` as `dtype`."""
    return matmul(z.astype(dtype), w, wide, precision)


def split_product(z: jax.Array, w: jax.Array, dtype: Any, wide: Any, precision: Any) -> jax.Array:
    """`z @ w` in `wide`; a `z` of more bits than `dtype` in two parts, so that a small change of the input arrives."""
    y = plain_product(z, w, dtype, wide, precision)
    if z.dtype.itemsize <= jnp.dtype(dtype).itemsize:
        return y
    rest = jax.lax.stop_gradient(z - z.astype(dtype).astype(z.dtype))
    return y + plain_product(rest, w, dtype, wide, precision)


def _multiplications(jaxpr: Any) -> int:
    """Multiplications of a program without loops: of its products of matrices, and element by element."""
    total = 0
    for eqn in jaxpr.eqns:
        inner = [value for value in eqn.params.values() if hasattr(value, "jaxpr") or hasattr(value, "eqns")]
        if inner:
            total += sum(_multiplications(getattr(each, "jaxpr", each)) for each in inner)
        elif eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            shape, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval
            total += out.size * math.prod(shape[axis] for axis in contract)
        elif eqn.primitive.name in ("mul", "div"):
            total += eqn.outvars[0].aval.size
    return total
