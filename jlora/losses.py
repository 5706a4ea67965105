"""Losses that a user adds to any loss of the task: terms of the adapters, terms of the outputs; and losses of preferences.

Each of the terms is a function of arrays that gives one number, to be differentiated with the rest of the loss. The losses of
preferences (`dpo`, `ipo`, `kto`) give one number a row, of what `log_probabilities` makes of the logits.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jlora import paths
from jlora.core.protocol.method import Site
from jlora.core.tree.adapted import Adapted
from jlora.optimize.allocate.orthogonality import excess_norms


def orthogonality(adapted: Adapted, weight: float | jax.Array = 1.0) -> jax.Array:
    """AdaLoRA's penalty on factors that are not orthonormal: `weight * mean of ‖aᵀa - 1‖ and ‖b bᵀ - 1‖` (Frobenius).

    The mean is over all trained factors `a [in, rank]` and `b [rank, out]` of all matrices, those of a stack each for
    itself; the norm is not squared. Nothing is asked of ranks that are zero in both factors, such as those that ElaLoRA
    has out of use. Value and gradient are those of the term that `AdaLoRA(orthogonality=weight)` adds by itself; this
    function has it for any method with such factors. The gradient is finite where the factors are orthonormal.

    Args:
        adapted: what is trained, with the params that are differentiated: `adapted.replace(params=p)`.
        weight: factor of the mean.

    Raises:
        ValueError: where no trained field is such a factor.

    Example:
        >>> penalty = jlora.losses.orthogonality(adapted.replace(params=adapted.params), 0.1)

    Reference:
        Zhang et al. 2023, arXiv:2303.10512; the mean of norms that are not squared is that of its code and of PEFT's.
    """
    found = [norms for site in adapted.plan.sites for norms in _norms(adapted, site)]
    if not found:
        methods = ", ".join(sorted({str(site.method) for site in adapted.plan.sites}))
        raise ValueError(
            "orthogonality is about trained factors a [in, rank] and b [rank, out], and nothing adapted here has any "
            f"({methods or 'no site'}); leave this term away"
        )
    return weight * jnp.mean(jnp.concatenate([norms.ravel() for norms in found]))


def _norms(adapted: Adapted, site: Site) -> list[jax.Array]:
    """`‖aᵀa - 1‖` and `‖b bᵀ - 1‖` of a site's trained factors, `[*batch]` each."""
    roles: dict[tuple[str, ...], Any] = {("in", "rank"): lambda m: m, ("rank", "out"): jnp.matrix_transpose}
    fields = paths.lookup(adapted.params, site.keys)
    columns = [roles[axes](fields[name]) for name, axes in site.method.axes.items() if name in fields and axes in roles]
    if not columns:
        return []
    used = jnp.any(jnp.stack([jnp.any(m != 0, axis=-2) for m in columns]), axis=0)
    return [excess_norms(m, used) for m in columns]


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
    matrix is never factorised, and the gradient is finite where singular values are equal, or zero. (The authors' code
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
    # The root's slope is infinite at zero. So the size of float32's error is added to the eigenvalues, and its root is
    # subtracted again.
    least = jnp.finfo(gram.dtype).eps * jax.lax.stop_gradient(jnp.trace(gram)) + jnp.finfo(gram.dtype).tiny
    sigma = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(gram), 0) + least) - jnp.sqrt(least)
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


def log_probabilities(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """The log probability of each row's answer: `Σ mask log softmax(logits)[target]` over its tokens, in nats, `[rows]`.

    The softmax is taken in float32 at least.

    Args:
        logits: `[rows, length, vocabulary]`.
        targets: int `[rows, length]`, the token that comes after each.
        mask: `[rows, length]`, 1 where the target is a token of the answer, and 0 in the prompt and in padding.

    Raises:
        ValueError: for shapes that do not fit together.

    Example:
        >>> targets, mask = jnp.roll(tokens, -1, axis=1), jnp.ones(tokens.shape)
        >>> answers = jlora.losses.log_probabilities(jlora.lift(model.apply)({"params": adapted}, tokens), targets, mask)
        >>> reference = jlora.losses.log_probabilities(model.apply({"params": adapted.base}, tokens), targets, mask)
    """
    if logits.ndim != 3 or not targets.shape == mask.shape == logits.shape[:-1]:
        raise ValueError(
            f"wanted logits [rows, length, vocabulary] with targets and mask [rows, length], got {logits.shape}, "
            f"{targets.shape} and {mask.shape}"
        )
    z = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    each = jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(z, axis=-1)
    # What does not count may hold anything, even what is not finite.
    return jnp.sum(jnp.where(mask != 0, each * mask, 0), axis=-1)


def dpo(
    chosen: jax.Array,
    rejected: jax.Array,
    reference_chosen: jax.Array,
    reference_rejected: jax.Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Direct preference optimization: `-log σ(β h)`, with `h = (chosen - reference_chosen) - (rejected - reference_rejected)`.

    With a `label_smoothing` ε it is robust DPO, unbiased where ε is the share of pairs whose answers are the wrong way round:
    `(-(1 - ε) log σ(β h) + ε log σ(-β h)) / (1 - 2 ε)`. The reference gets no gradient. It is the base itself, whatever
    the adapters' start: the plain function on `adapted.base`, so there is no second copy of a model.

    Args:
        chosen: `[pairs]`, log probabilities of the better answers by the adapted model, see `log_probabilities`.
        rejected: `[pairs]`, of the worse answers.
        reference_chosen: `[pairs]`, of the better answers by the base.
        reference_rejected: `[pairs]`, of the worse answers by the base.
        beta: how strongly the model is held near the base.
        label_smoothing: ε, from 0 to below 0.5.

    Returns:
        `[pairs]`; their mean is the loss.

    Raises:
        ValueError: for shapes that do not fit together, a beta that is not positive, a label smoothing of 0.5 or more.

    Example:
        >>> chosen, rejected = jnp.array([-11.0, -14.0]), jnp.array([-15.0, -13.0])
        >>> base_chosen, base_rejected = jnp.array([-12.0, -14.0]), jnp.array([-14.0, -13.5])
        >>> loss = jnp.mean(jlora.losses.dpo(chosen, rejected, base_chosen, base_rejected, beta=0.1))

    Reference:
        Rafailov et al. 2023, arXiv:2305.18290; Chowdhury et al. 2024, arXiv:2403.00409; TRL's `sigmoid` and `robust`.
    """
    better, worse = _ratios(beta, (chosen, reference_chosen), (rejected, reference_rejected))
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be at least 0 and below 0.5, got {label_smoothing}")
    h = beta * (better - worse)
    right, wrong = jax.nn.log_sigmoid(h), jax.nn.log_sigmoid(-h)
    return (label_smoothing * wrong - (1 - label_smoothing) * right) / (1 - 2 * label_smoothing)


def ipo(
    chosen: jax.Array,
    rejected: jax.Array,
    reference_chosen: jax.Array,
    reference_rejected: jax.Array,
    *,
    lengths: tuple[jax.Array, jax.Array],
    beta: float = 0.1,
) -> jax.Array:
    """Identity preference optimization: `(h - 1 / (2 β))²`, with `h` the difference of the two log ratios a token.

    `h = (chosen - reference_chosen) / n_chosen - (rejected - reference_rejected) / n_rejected`: means over an answer's
    tokens, not sums, as the authors compute it.

    Args:
        chosen: `[pairs]`, log probabilities of the better answers by the adapted model, see `log_probabilities`.
        rejected: `[pairs]`, of the worse answers.
        reference_chosen: `[pairs]`, of the better answers by the base.
        reference_rejected: `[pairs]`, of the worse answers by the base.
        lengths: `n_chosen` and `n_rejected` `[pairs]`, the numbers of tokens of the answers.
        beta: the paper's τ.

    Returns:
        `[pairs]`; their mean is the loss.

    Raises:
        ValueError: for shapes that do not fit together, and a beta that is not positive.

    Example:
        >>> chosen, rejected = jnp.array([-11.0, -14.0]), jnp.array([-15.0, -13.0])
        >>> base_chosen, base_rejected = jnp.array([-12.0, -14.0]), jnp.array([-14.0, -13.5])
        >>> counts = jnp.array([5, 4]), jnp.array([7, 4])
        >>> loss = jnp.mean(jlora.losses.ipo(chosen, rejected, base_chosen, base_rejected, lengths=counts))

    Reference:
        Azar et al. 2023, arXiv:2310.12036, equation 17; the means are those of TRL's `ipo`.
    """
    better, worse = _ratios(beta, (chosen, reference_chosen), (rejected, reference_rejected))
    tokens = [jnp.maximum(each, 1).astype(better.dtype) for each in lengths]
    return (better / tokens[0] - worse / tokens[1] - 1 / (2 * beta)) ** 2


def kto(
    answers: jax.Array,
    reference: jax.Array,
    desirable: jax.Array,
    divergence: jax.Array | float,
    *,
    beta: float = 0.1,
) -> jax.Array:
    """Kahneman-Tversky optimization, of answers that are good or bad each by itself, without pairs.

    `1 - σ(β (r - z))` for a desirable answer and `1 - σ(β (z - r))` for another, with `r = answers - reference`. `z` is an
    estimate of how far the model is from the base: the mean of `r` over answers that belong to other prompts, 0 at least,
    without a gradient.

    Args:
        answers: `[rows]`, log probabilities by the adapted model, see `log_probabilities`.
        reference: `[rows]`, by the base.
        desirable: bool `[rows]`.
        divergence: the mean over a batch of the log ratios of prompts with the answers of other prompts; what is negative
            counts as 0.
        beta: how strongly the model is held near the base.

    Returns:
        `[rows]`; their mean is the loss.

    Raises:
        ValueError: for shapes that do not fit together, and a beta that is not positive.

    Example:
        >>> answers, base, good = jnp.array([-11.0, -14.0]), jnp.array([-12.0, -14.5]), jnp.array([True, False])
        >>> loss = jnp.mean(jlora.losses.kto(answers, base, good, divergence=0.2))

    Reference:
        Ethayarajh et al. 2024, arXiv:2402.01306, equation 7, with weights of 1; TRL's `kto`.
    """
    (ratio,) = _ratios(beta, (answers, reference))
    if desirable.shape != ratio.shape:
        raise ValueError(f"desirable has shape {desirable.shape}, the answers {ratio.shape}")
    z = jnp.maximum(jax.lax.stop_gradient(divergence), 0)
    return 1 - jax.nn.sigmoid(beta * jnp.where(desirable, ratio - z, z - ratio))


def _ratios(beta: float, *answers: tuple[jax.Array, jax.Array]) -> list[jax.Array]:
    """The log ratios of answers to their references, which have no gradient."""
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    shapes = {array.shape for pair in answers for array in pair}
    if len(shapes) > 1 or len(answers[0][0].shape) != 1:
        raise ValueError(f"wanted log probabilities [rows], all of one shape, got {sorted(shapes)}")
    return [answer - jax.lax.stop_gradient(reference) for answer, reference in answers]
