"""What low-rank methods start from: singular vectors of the inputs, the weight seen through them, the gradient, a residual."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp

#: Which singular triplets LoRA-GA takes for `a` and for `b`, and how it scales them.
DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "stable_<gamma>", "weight_svd", "gd_scale", "unit")
_LORA_GA = re.compile(rf"lora_ga(?:_({'|'.join(DIRECTIONS)}))?(?:_(stable(?:_[1-9]\d*)?|weight_svd|gd_scale|unit))?")

Factorisation = tuple[jax.Array, jax.Array]


def randomised_svd(
    key: jax.Array, w: jax.Array, rank: int, iterations: int, width: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`u [in, rank]`, `sigma [rank]`, `vt [rank, out]` of about the best approximation of `w` of that rank.

    Subspace iteration from a Gaussian start of `width` columns, by default a few more than the rank (Halko et al. 2011,
    arXiv:0909.4061).
    """
    width = min(rank + 8 if width is None else width, *w.shape)
    q = jnp.linalg.qr(w @ jax.random.normal(key, (w.shape[1], width), w.dtype))[0]
    for _ in range(iterations):
        q = jnp.linalg.qr(w @ jnp.linalg.qr(w.T @ q)[0])[0]
    u, sigma, vt = jnp.linalg.svd(q.T @ w, full_matrices=False)
    return (q @ u)[:, :rank], sigma[:rank], vt[:rank]


def principal_axes(covariance: jax.Array, mean: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
    """The directions of an input's largest variances, and each one's share of the whole variance.

    Args:
        covariance: `[in, in]`, the mean of `x xᵀ`.
        mean: `[in]`, that of `x`; the directions are of the input around it, as in EVA's incremental PCA.
        number: how many.

    Returns:
        `[in, number]`, orthonormal, each with its largest entry positive; and `[number]`, in falling order.
    """
    values, vectors = jnp.linalg.eigh(covariance - jnp.outer(mean, mean))
    first = vectors[:, ::-1][:, :number]
    shares = jnp.maximum(values[::-1], 0) / jnp.maximum(jnp.sum(jnp.maximum(values, 0)), jnp.finfo(values.dtype).tiny)
    return first * _signs(first), shares[:number]


def through_covariance(covariance: jax.Array, w: jax.Array, rank: int, scale: float, least: bool) -> Factorisation:
    """CorDA's factors: with `c w = u S vᵀ`, `a = c⁻¹ u sqrt(S / s)` and `b = sqrt(S / s) vᵀ` of some triplets.

    `c` is the covariance with a multiple of its mean diagonal added to the diagonal: 0.01, doubled until the inverse is exact
    to `|c c⁻¹ - 1| < 0.05`.

    Args:
        covariance: `[in, in]`.
        w: `[in, out]`.
        rank: number of triplets.
        scale: `s`.
        least: the last triplets, which keep what the inputs use ("kpm"), and not the first ("ipm").
    """
    eye = jnp.eye(len(covariance), dtype=covariance.dtype)
    unit = eye * jnp.mean(jnp.diagonal(covariance))

    def inverted(damping: jax.Array) -> tuple[jax.Array, jax.Array]:
        damped = covariance + damping * unit
        return damping, jnp.linalg.inv(damped)

    def inexact(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        damping, inverse = state
        error = jnp.linalg.norm((covariance + damping * unit) @ inverse - eye)
        # Where the covariance is zero or not finite no damping helps, and what comes out is not finite either.
        return (error >= 0.05) | (jnp.isnan(error) & (damping < 1))

    start = inverted(jnp.asarray(0.01, covariance.dtype))
    damping, inverse = jax.lax.while_loop(inexact, lambda state: inverted(2 * state[0]), start)
    u, sigma, vt = jnp.linalg.svd((covariance + damping * unit) @ w, full_matrices=False)
    chosen = slice(len(sigma) - rank, None) if least else slice(rank)
    root = jnp.sqrt(sigma[chosen] / scale)
    return inverse @ u[:, chosen] * root, root[:, None] * vt[chosen]


def lora_ga_options(init: str) -> tuple[str, str, int] | None:
    """Direction, scale and gamma of an init named `lora_ga[_<direction>][_<scale>]`; None for any other name."""
    found = _LORA_GA.fullmatch(init)
    if found is None:
        return None
    name, _, gamma = (found[2] or "stable").partition("stable_")
    return found[1] or DIRECTIONS[0], name or "stable", int(gamma or 16)


def of_gradient(
    key: jax.Array, gradient: jax.Array, w: jax.Array, rank: int, scale: float, options: tuple[str, str, int]
) -> Factorisation:
    """LoRA-GA's factors: singular vectors of the gradient `u S vᵀ`, some for `a`, others with their values for `b`.

    The decomposition is a randomised one of 4 iterations and `4 rank` columns. Each `u` has its largest entry positive:
    `a` and `b` are of different triplets, so that without a rule the signs in `a @ b` would be left to chance.

    Args:
        key: of the decomposition, and of the direction "random".
        gradient: `[in, out]`.
        w: `[in, out]`, for the scale "weight_svd".
        rank: columns of `a`.
        scale: `s`.
        options: direction, scale and gamma, of `lora_ga_options`.
    """
    direction, scaling, gamma = options
    u, sigma, vt = randomised_svd(key, gradient, 2 * rank, 4, 4 * rank)
    a_of, b_of = _triplets(direction, rank, key)
    signs = _signs(u)
    a, b = (u * signs)[:, a_of], (vt * (sigma * signs)[:, None])[b_of]
    if scaling == "stable":
        b *= w.shape[1] ** 0.25 / gamma**0.5
    elif scaling == "weight_svd":
        first = sigma[b_of][0]
        largest = randomised_svd(jax.random.fold_in(key, 1), w, 1, 4)[1][0]
        b *= jnp.where(first > 0, largest / jnp.where(first > 0, first, 1), 1)
    elif scaling == "gd_scale":
        a, b = a / scale, b / scale
    return a, b


def of_residual(
    residual: jax.Array, rank: int, scale: float, key: jax.Array | None = None, iterations: int = 0
) -> Factorisation:
    """LoftQ's factors: `s * a @ b` is the truncated SVD `u S vᵀ` of the residual, `a = u sqrt(S / s)`, `b = sqrt(S / s) vᵀ`.

    Of a triplet whose singular value is zero `a` has the vector `u`, and `b` zeros: were both zero, neither would ever learn.

    Args:
        residual: `[in, out]`.
        rank: number of triplets.
        scale: `s`.
        key: for a randomised SVD; None for an exact one.
        iterations: of subspaces, of a randomised one.
    """
    if key is None:
        u, sigma, vt = jnp.linalg.svd(residual, full_matrices=False)
    else:
        u, sigma, vt = randomised_svd(key, residual, rank, iterations)
    # Zero is what rounding leaves of a zero, as in the rank of a matrix by numpy.
    found = sigma[:rank] > sigma[0] * max(residual.shape) * jnp.finfo(sigma.dtype).eps
    root = jnp.sqrt(sigma[:rank] / scale)
    return u[:, :rank] * jnp.where(found, root, 1), jnp.where(found, root, 0)[:, None] * vt[:rank]


def _triplets(direction: str, rank: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The numbers of the triplets that give `a` and `b`, out of `2 rank`."""
    every = jnp.arange(2 * rank)
    if direction == "random":
        every = jax.random.permutation(jax.random.fold_in(key, 2), every)[:rank]
        return every, every
    if direction == "ArBr":
        return every[1::2], every[0::2]
    return (every[:rank], every[rank:]) if direction == "ArB2r" else (every[rank:], every[:rank])


def _signs(columns: jax.Array) -> jax.Array:
    """The sign of the entry of the largest magnitude of each column."""
    at = jnp.argmax(jnp.abs(columns), axis=0, keepdims=True)
    return jnp.where(jnp.take_along_axis(columns, at, axis=0)[0] < 0, -1, 1).astype(columns.dtype)
