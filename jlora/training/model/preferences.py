"""Losses of preferences over batches of pairs; the reference is the base, without its adapters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import jlora
from jlora.training.model.losses import Forward, Objective, Sums, sums
from jlora.training.settings.fields import Settings


def objective_of(settings: Settings, forward: Forward) -> Objective:
    """What the (resolved) settings' task minimizes.

    Args:
        settings: resolved.
        forward: the plain model, which the reference is computed with.
    """
    if settings.task != "preference":
        return sums
    # Lifted for bases that are kept as codes; on arrays alone it is the plain function.
    plain = jlora.lift(forward)

    def preferences(run: Forward, params: Any, batch: dict[str, jax.Array]) -> Sums:
        base = params.base if isinstance(params, jlora.Adapted) else params
        rows = flat(batch)
        answers = _answers(run(params, rows), rows)
        reference = jax.lax.stop_gradient(_answers(plain(base, rows), rows))
        return (_judged if settings.preference_loss == "kto" else _paired)(settings, answers, reference, batch)

    return preferences


def flat(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The rows of a batch as the model takes them, `[rows, length]`: of pairs those of both answers, one after the other."""
    if "mask" not in batch:
        return batch
    return {name: x.reshape(-1, x.shape[-1]) for name, x in batch.items() if x.ndim > 1}


def _answers(logits: jax.Array, rows: dict[str, jax.Array]) -> jax.Array:
    """Log probabilities of the answers, `[pairs, 2]`."""
    return jlora.losses.log_probabilities(logits, rows["targets"], rows["mask"]).reshape(-1, 2)


def _paired(settings: Settings, answers: jax.Array, reference: jax.Array, batch: dict[str, jax.Array]) -> Sums:
    """DPO and IPO."""
    assert settings.beta is not None and settings.label_smoothing is not None
    given = (answers[:, 0], answers[:, 1], reference[:, 0], reference[:, 1])
    if settings.preference_loss == "ipo":
        lengths = jnp.sum(batch["mask"], axis=-1)
        losses = jlora.losses.ipo(*given, lengths=(lengths[:, 0], lengths[:, 1]), beta=settings.beta)
    else:
        losses = jlora.losses.dpo(*given, beta=settings.beta, label_smoothing=settings.label_smoothing)
    weights, rewards = batch["weights"], settings.beta * jax.lax.stop_gradient(answers - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    # Of two that are equal, as they are before the first step, neither is preferred.
    right = (1 + jnp.sign(margin)) / 2
    more = {"rewards/chosen": rewards[:, 0], "rewards/rejected": rewards[:, 1], "margin": margin, "accuracy": right}
    told = {name: jnp.stack([jnp.sum(each * weights), jnp.sum(weights)]) for name, each in more.items()}
    return Sums(jnp.sum(losses * weights), jnp.sum(weights), jnp.sum(right * weights), told)


def _judged(settings: Settings, answers: jax.Array, reference: jax.Array, batch: dict[str, jax.Array]) -> Sums:
    """KTO; the rows of a batch that are computed at once tell together how far the model is from its base."""
    assert settings.beta is not None
    weights, good = batch["weights"], batch["desirable"] > 0
    ratios = jax.lax.stop_gradient(answers - reference)
    divergence = jnp.sum(ratios[:, 1] * weights) / jnp.maximum(jnp.sum(weights), 1)
    losses = jlora.losses.kto(answers[:, 0], reference[:, 0], good, divergence, beta=settings.beta)
    rewards = settings.beta * ratios[:, 0]
    sides = {"rewards/chosen": weights * good, "rewards/rejected": weights * ~good}
    told = {name: jnp.stack([jnp.sum(rewards * each), jnp.sum(each)]) for name, each in sides.items()}
    told["kl"] = jnp.stack([jnp.maximum(divergence, 0) * jnp.sum(weights), jnp.sum(weights)])
    right = jnp.where(good, 1 + jnp.sign(rewards), 1 - jnp.sign(rewards)) / 2
    return Sums(jnp.sum(losses * weights), jnp.sum(weights), jnp.sum(right * weights), told)


def told(more: dict[str, Any]) -> dict[str, float]:
    """The means of `Sums.more`, of one batch or added up over several; what nothing was of is left out.

    With rewards on both sides their `margin` is among them.
    """
    found = {name: float(value[0]) / float(value[1]) for name, value in more.items() if float(value[1]) > 0}
    if "margin" not in found and {"rewards/chosen", "rewards/rejected"} <= set(found):
        found["margin"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found
