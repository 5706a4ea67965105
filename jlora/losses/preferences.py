"""Losses of preferences: one number a row, of what `log_probabilities` makes of the logits of the model and of its base."""

from __future__ import annotations

import jax
import jax.numpy as jnp


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
