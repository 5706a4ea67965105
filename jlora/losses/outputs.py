"""Terms of the outputs that a user adds to any loss of the task: BA-LoRA's regularizers, and AdaMix's consistency.

Each is a function of logits that gives one number, to be differentiated with the rest of the loss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def consistency(
    logits: jax.Array, teacher: jax.Array, mask: jax.Array | None = None, *, form: str = "classify"
) -> jax.Array:
    """BA-LoRA's first regularizer: the outputs stay near the frozen model's.

    With `form="classify"` the mean over rows and classes of `(z / ‖z‖ - t / ‖t‖)²`, norms over the classes. With
    `form="generate"` the Kullback-Leibler divergence `Σ p_t log(p_t / p_z)` of the softmaxes, summed over tokens and
    divided by the number of rows, as in its code. Zero, with a zero gradient, where both agree. The teacher gets none.

    The base is the frozen model, whatever the adapters' start, so the teacher needs no second copy of it:
    `teacher = model.apply({"params": adapted.base}, inputs)`, the plain function.

    Args:
        logits: `z [rows, ..., classes]` of the adapted model.
        teacher: `t`, of the base, of the same shape.
        mask: `[rows, ...]`, zero for rows or tokens that do not count, such as padding and prompts.
        form: "classify" or "generate".

    Raises:
        ValueError: for shapes that do not fit together, or another form.

    Example:
        >>> apply = jlora.lift(model.apply)
        >>> teacher = model.apply({"params": adapted.base}, tokens)
        >>> loss = 1e-4 * jlora.losses.consistency(apply({"params": adapted}, tokens), teacher)

    Reference:
        Chang et al. 2024, arXiv:2408.04556, whose weight for it is 1e-4.
    """
    z, weights = _outputs(logits, mask, form)
    if teacher.shape != logits.shape:
        raise ValueError(f"the teacher's logits have shape {teacher.shape}, those of the adapted model {logits.shape}")
    t, _ = _outputs(jax.lax.stop_gradient(teacher), mask, form)
    if form == "classify":
        each = jnp.mean((_unit(z) - _unit(t)) ** 2, axis=-1)
        return _mean(each, weights)
    log_t = jax.nn.log_softmax(t)
    each = jnp.sum(jnp.exp(log_t) * (log_t - jax.nn.log_softmax(z)), axis=-1)
    return jnp.sum(each * weights) / _rows(weights)


def agreement(logits: jax.Array, other: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """AdaMix's consistency of two draws: half of `KL(q ‖ p) + KL(p ‖ q)`, `p` and `q` the softmaxes of the two outputs.

    Each divergence pulls one side alone: the other has no gradient in it. Both are summed over classes (and tokens) and divided
    by the number of rows. The value is zero where both agree, and so is the gradient.

    Args:
        logits: `[rows, ..., classes]` of one draw, such as of `adapted.replace(context={"dropout": key})`.
        other: of another draw, of the same shape.
        mask: `[rows, ...]`, zero for rows or tokens that do not count, such as padding and prompts.

    Raises:
        ValueError: for shapes that do not fit together.

    Example:
        >>> apply, keys = jlora.lift(model.apply), jax.random.split(key)
        >>> drawn = [apply({"params": adapted.replace(context={"dropout": each})}, tokens) for each in keys]
        >>> loss = jlora.losses.agreement(*drawn)

    Reference:
        Wang et al. 2022, arXiv:2205.12410: weight 1 for GLUE, and 100 for GPT-2, with the task's loss on the first draw alone.
    """
    z, weights = _outputs(logits, mask, "generate")
    if other.shape != logits.shape:
        raise ValueError(f"the other draw's logits have shape {other.shape}, those of the first {logits.shape}")
    sides = [jax.nn.log_softmax(each) for each in (z, _outputs(other, mask, "generate")[0])]

    def pulled(by: jax.Array, side: jax.Array) -> jax.Array:
        fixed = jax.lax.stop_gradient(by)
        return jnp.sum(jnp.sum(jnp.exp(fixed) * (fixed - side), axis=-1) * weights)

    return (pulled(sides[1], sides[0]) + pulled(sides[0], sides[1])) / (2 * _rows(weights))


def diversity(logits: jax.Array, mask: jax.Array | None = None, *, form: str = "classify") -> jax.Array:
    """BA-LoRA's second regularizer: the outputs stay different from one another.

    With `form="classify"` `Σ c_ij²` over `i != j`, divided by the number of classes, where `c [classes, classes]` is the
    covariance of the logits over the rows, with the factor `1 / (rows - 1)`. With `form="generate"` minus the mean over tokens
    of the softmax's entropy, in nats: `-log(classes)` for uniform predictions.

    Args:
        logits: `[rows, ..., classes]` of the adapted model; for "classify", all axes but the last are rows.
        mask: `[rows, ...]`, zero for rows or tokens that do not count.
        form: "classify" or "generate".

    Raises:
        ValueError: for shapes that do not fit together, or another form.

    Example:
        >>> apply = jlora.lift(model.apply)
        >>> loss = 3e-4 * jlora.losses.diversity(apply({"params": adapted}, tokens), form="generate")

    Reference:
        Chang et al. 2024, arXiv:2408.04556, whose weight for it is 3e-4.
    """
    z, weights = _outputs(logits, mask, form)
    if form == "generate":
        log_p = jax.nn.log_softmax(z)
        return _mean(jnp.sum(jnp.exp(log_p) * log_p, axis=-1), weights)
    z, weights = z.reshape(-1, z.shape[-1]), weights.reshape(-1)
    centred = (z - jnp.sum(z * weights[:, None], axis=0) / jnp.maximum(jnp.sum(weights), 1)) * weights[:, None]
    covariance = _gram(centred.T) / jnp.maximum(jnp.sum(weights) - 1, 1)
    return jnp.sum(jnp.where(jnp.eye(z.shape[-1], dtype=bool), 0, covariance) ** 2) / z.shape[-1]


def spectrum(logits: jax.Array, mask: jax.Array | None = None, *, count: int = 3) -> jax.Array:
    """BA-LoRA's third regularizer: minus the share of the largest singular values in the sum of all, of the outputs.

    `-(σ_1 + .. + σ_count) / Σ σ` of the logits as a matrix `[rows, everything else]`; -1 for a matrix of that rank or
    less. The singular values are roots of the eigenvalues of the smaller Gram matrix, in float32 at least, so the large
    matrix is never factorised, and the gradient is finite where singular values are equal, or zero. The price: a singular value
    that should be zero is up to some 3e-4 of the norm `‖z‖` in float32, the root of its rounding. (The authors' code
    indexes the singular values as if they were those of a stack of matrices.)

    Args:
        logits: `[rows, ...]` of the adapted model.
        mask: zero for rows or tokens that do not count; leading axes of the logits.
        count: how many of the largest singular values are taken.

    Raises:
        ValueError: for shapes that do not fit together, or a count below 1.

    Example:
        >>> apply = jlora.lift(model.apply)
        >>> loss = 1e-4 * jlora.losses.spectrum(apply({"params": adapted}, tokens))

    Reference:
        Chang et al. 2024, arXiv:2408.04556, whose weight for it is 1e-4, with a count of 3.
    """
    if count < 1:
        raise ValueError(f"spectrum takes the count of the largest singular values, at least 1; got {count}")
    z, weights = _outputs(logits, mask, "classify")
    matrix = (z * weights[..., None]).reshape(z.shape[0], -1)
    gram = _gram(matrix) if matrix.shape[0] <= matrix.shape[1] else _gram(matrix.T)
    # The root's slope is infinite at zero. So an eigenvalue is divided by the root of itself and the size of float32's error:
    # what is far above that error is its root to half the error's share, and the slope at zero is finite.
    least = jnp.finfo(gram.dtype).eps * jax.lax.stop_gradient(jnp.trace(gram)) + jnp.finfo(gram.dtype).tiny
    squares = jnp.maximum(jnp.linalg.eigvalsh(gram), 0)
    sigma = squares / jnp.sqrt(squares + least)
    total = jnp.sum(sigma)
    return -jnp.sum(sigma[-count:]) / jnp.where(total > 0, total, 1)


def _outputs(logits: jax.Array, mask: jax.Array | None, form: str) -> tuple[jax.Array, jax.Array]:
    """The logits in float32 at least, and a weight for each row or token."""
    if form not in ("classify", "generate"):
        raise ValueError(f'form must be "classify" or "generate", got {form!r}')
    if logits.ndim < 2:
        raise ValueError(f"logits must be [rows, ..., classes], got shape {logits.shape}")
    z = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    shape = logits.shape[:-1]
    if mask is None:
        return z, jnp.ones(shape, z.dtype)
    if mask.shape != shape[: mask.ndim] or not mask.ndim:
        raise ValueError(
            f"the mask has shape {mask.shape}, the logits {logits.shape}: wanted {shape}, or its first axes"
        )
    weights = jnp.broadcast_to(mask.reshape(*mask.shape, *[1] * (len(shape) - mask.ndim)), shape)
    # What does not count may hold anything, even what is not finite.
    return jnp.where(weights[..., None] != 0, z, 0), weights.astype(z.dtype)


def _mean(each: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.sum(each * weights) / jnp.maximum(jnp.sum(weights), 1)


def _rows(weights: jax.Array) -> jax.Array:
    """The number of rows in which anything counts."""
    return jnp.maximum(jnp.sum(jnp.any(weights.reshape(weights.shape[0], -1) != 0, axis=1)), 1).astype(weights.dtype)


def _unit(z: jax.Array) -> jax.Array:
    """`z / ‖z‖` along the last axis; zero, with a finite gradient, where `z` is zero."""
    return z * jax.lax.rsqrt(jnp.maximum(jnp.sum(z * z, axis=-1, keepdims=True), 1e-24))


def _gram(matrix: jax.Array) -> jax.Array:
    return jnp.matmul(matrix, matrix.T, precision=jax.lax.Precision.HIGHEST)
