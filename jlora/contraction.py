"""The adapted product: `y = x @ ((w + a @ b) * scale)` without forming the sum.

Every use of a weight is a map that is linear in the matrix: a product, a convolution, a lookup. Each is given here as
`product(x, m)` for a matrix `m [in, k]` of any width, and the adapter's path is that same map with `a`, followed by `b`.
Products accumulate in float32 where the result is a 16-bit float, and the adapter's part is added before rounding, so an
update far below the weight's own resolution still moves the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jlora.method import Factors

Product = Callable[..., jax.Array]  # (x, matrix, out_dtype) -> y


def accumulation_dtype(dtype: Any) -> Any:
    """float32 for 16-bit floats, otherwise the dtype itself."""
    return jnp.float32 if jnp.dtype(dtype).itemsize < 4 else dtype


def drop(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout: entries are zero with probability `rate`, the others divided by `1 - rate`.

    Without a key, or with rate 0, `x` itself (the very object, so that callers can tell).
    """
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


def forward(
    product: Product,
    mix: Product,
    x: jax.Array,
    w: jax.Array,
    f: Factors,
    key: jax.Array | None,
    out_dtype: Any,
    rescale: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """`product(x, (w + a @ b) * scale)` in factored form.

    Args:
        product: the map that is linear in its matrix.
        mix: multiplies the last (feature) axis of `product(x, a)` by `b`.
        x: what is multiplied, any shape that `product` takes.
        w: `[in, out]`.
        f: the factors.
        key: dropout key; None means no dropout.
        out_dtype: dtype of the result.
        rescale: multiplies a result by `scale [out]`; by default along the last axis.

    Returns:
        `product`'s result in `out_dtype`. With dropout, `x` is dropped wherever the adapter acts: in the low-rank path, and
        in the part `scale - 1` of the base (as DoRA's reference does).
    """
    accumulate = accumulation_dtype(out_dtype)
    dropped = drop(x, f.dropout, key)
    base = product(x, w, accumulate)
    low = mix(product(dropped, f.a.astype(x.dtype), x.dtype), f.b.astype(x.dtype), accumulate)
    if f.scale is None:
        return (base + low).astype(out_dtype)
    rescale = rescale or jnp.multiply
    scale = f.scale.astype(accumulate)
    if dropped is x:
        return rescale(base + low, scale).astype(out_dtype)
    again = product(dropped, w, accumulate)
    return (base + rescale(again, scale - 1) + rescale(low, scale)).astype(out_dtype)


def matmul(x: jax.Array, m: jax.Array, out_dtype: Any, precision: Any = None) -> jax.Array:
    """`x [..., in] @ m [in, k]` with the result in `out_dtype`."""
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, m, dims, precision=precision, preferred_element_type=out_dtype)


def matmul_transposed(x: jax.Array, m: jax.Array, out_dtype: Any, precision: Any = None) -> jax.Array:
    """`x [..., k] @ m.T` for `m [in, k]`, with the result in `out_dtype`."""
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, m, dims, precision=precision, preferred_element_type=out_dtype)


def dense(
    x: jax.Array, w: jax.Array, f: Factors, key: jax.Array | None, out_dtype: Any, precision: Any = None
) -> jax.Array:
    """`x [..., in] @ ((w + a @ b) * scale)`."""

    def product(x: jax.Array, m: jax.Array, dtype: Any) -> jax.Array:
        return matmul(x, m, dtype, precision)

    return forward(product, product, x, w, f, key, out_dtype)


def dense_transposed(
    x: jax.Array, w: jax.Array, f: Factors, key: jax.Array | None, out_dtype: Any, precision: Any = None
) -> jax.Array:
    """`x [..., out] @ ((w + a @ b) * scale).T`: the use of a tied embedding as the head."""

    def product(x: jax.Array, m: jax.Array, dtype: Any) -> jax.Array:
        return matmul_transposed(x, m, dtype, precision)

    accumulate = accumulation_dtype(out_dtype)
    scaled = x if f.scale is None else x * f.scale.astype(x.dtype)
    dropped = drop(scaled, f.dropout, key)
    base = product(scaled, w, accumulate)
    low = product(product(dropped, f.b.astype(x.dtype), x.dtype), f.a.astype(x.dtype), accumulate)
    return (base + low).astype(out_dtype)
