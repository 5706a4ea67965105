"""Factors with orthonormal columns: the penalty that keeps them so, and new columns at right angles to the old."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jlora import _compat
from jlora.optimize.allocate.triplets import Triplet

# By default a TPU multiplies float32 matrices in bfloat16, whose rounding error would hide small departures from
# orthogonality.
_EXACT = jax.lax.Precision.HIGHEST
# Added to ‖M‖² under the root, so that the gradient exists at 0.
_TINY = 1e-12
#: A column counts as dependent if less than this part of its length lies outside the span of the others.
_DEPENDENT = 5e-7


def penalty(factors: list[Triplet], active: list[jax.Array], weight: float) -> jax.Array:
    """`weight` times the mean, over all factor matrices of all modules, of `‖aᵀa - 1‖` and `‖b bᵀ - 1‖` (Frobenius).

    The norm is not squared, and a mean is taken where the paper has a sum, as in AdaLoRA's and PEFT's code.

    Args:
        factors: of every site.
        active: mask of the ranks in use, `[*batch, r]`; the penalty ignores the others, which must be zero.
        weight: factor of the mean.
    """
    norms = [
        excess_norms(m, on)
        for factor, on in zip(factors, active, strict=True)
        for m in (factor.a, jnp.matrix_transpose(factor.b))
    ]
    return weight * jnp.mean(jnp.concatenate([norm.ravel() for norm in norms]))


def penalty_gradient(factors: list[Triplet], active: list[jax.Array], weight: float) -> list[Triplet]:
    """The gradient of `penalty`, 0 where the factors are orthonormal; None for `e`, which has none."""
    share = 2 * weight / sum(2 * on[..., 0].size for on in active)

    def direction(m: jax.Array, on: jax.Array) -> jax.Array:
        excess = _excess(m, on)
        return jnp.matmul(m, excess / _norm(excess)[..., None, None], precision=_EXACT)

    found = []
    for factor, on in zip(factors, active, strict=True):
        b = jnp.matrix_transpose(direction(jnp.matrix_transpose(factor.b), on))
        found.append(Triplet(share * direction(factor.a, on), None, share * b))
    return found


def excess_norms(m: jax.Array, active: jax.Array) -> jax.Array:
    """`‖mᵀm - 1‖` of every matrix of `m [*batch, n, r]`, with ones only where a rank is in use; differentiable anywhere."""
    return _norm(_excess(m, active))


def _excess(m: jax.Array, active: jax.Array) -> jax.Array:
    """`mᵀm - 1` for `m [*batch, n, r]`, with ones only where a rank is in use."""
    eye = jnp.eye(m.shape[-1], dtype=m.dtype)
    return _gram(m) - eye * active[..., None, :].astype(m.dtype)


def _norm(m: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(m * m, axis=(-2, -1)) + _TINY)


def _gram(m: jax.Array) -> jax.Array:
    sharding = _compat.explicit_sharding(jax.typeof(m))
    options: dict[str, Any] = {}
    if sharding is not None:
        # The contracted rows may be cut; the small product is whole.
        options["out_sharding"] = PartitionSpec(*sharding.spec[: m.ndim - 2], None, None)
    return jnp.einsum("...ir,...is->...rs", m, m, precision=_EXACT, **options)


def with_new_columns(m: jax.Array, old: jax.Array, new: jax.Array, noise: jax.Array) -> jax.Array:
    """`m [*batch, n, r]` with the columns `new` replaced by unit vectors at right angles to the columns `old`.

    Each is a random vector less its projection on the span of the old columns and of the new ones before it, found by
    Gram-Schmidt, since the old ones need not be orthonormal. Every projection is made twice: once leaves rounding errors
    of the size of what was taken away.

    Args:
        m: columns; those neither old nor new are left as they are.
        old: mask `[*batch, r]` of the columns to stay clear of.
        new: mask `[*batch, r]` of the columns to write.
        noise: normal random numbers of `m`'s shape.
    """
    count = m.shape[-1]
    sources = jnp.where(new[..., None, :], noise, m)
    index = jnp.arange(count)

    def orthonormalise(n: jax.Array, basis: jax.Array) -> jax.Array:
        column = n % count
        used = jnp.where(n < count, old, new)
        take = (index == column).astype(m.dtype)
        vector = start = jnp.sum(sources * take, axis=-1, keepdims=True)
        for _ in range(2):
            along = jnp.sum(basis * vector, axis=-2, keepdims=True)
            vector = vector - jnp.sum(basis * along, axis=-1, keepdims=True)
        length = _length(vector)
        unit = jnp.where(length > _DEPENDENT * _length(start), vector / jnp.maximum(length, _TINY), 0)
        return jnp.where((index == column) & used[..., None, :], unit, basis)

    # The old columns first, then the new ones.
    basis = jax.lax.fori_loop(0, 2 * count, orthonormalise, m * 0)
    return jnp.where(new[..., None, :], basis, m)


def _length(column: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(column * column, axis=-2, keepdims=True))
