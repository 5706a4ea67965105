"""Losses as sums, so that parts of a batch add up exactly to the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Forward = Callable[[Any, dict[str, jax.Array]], jax.Array]
"""Params (or an `Adapted`) and a batch to logits."""


class Sums(NamedTuple):
    """Sums over a batch.

    Attributes:
        loss: weighted cross-entropy in nats.
        weight: of the predictions: tokens for language models, rows for classification.
        correct: weight of the right predictions.
        confusion: `[labels, labels]`, weight of the rows of each label (first axis) by the one that was predicted; None for
            language models.
    """

    loss: Any
    weight: Any
    correct: Any
    confusion: Any = None


def sums(forward: Forward, params: Any, batch: dict[str, jax.Array]) -> Sums:
    """`-Σ w log p(target)` with its weights, by a softmax in float32.

    Args:
        forward: the model.
        params: what it is computed with.
        batch: as `jlora.training.data.pipeline.collate` makes it.
    """
    logits = forward(params, batch).astype(jnp.float32)
    targets = batch["labels"] if "labels" in batch else batch["targets"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    chosen, weights = jnp.argmax(logits, axis=-1), batch["weights"]
    right = (chosen == targets).astype(jnp.float32)
    confusion = _confusion(chosen, targets, weights, logits.shape[-1]) if "labels" in batch else None
    return Sums(jnp.sum(losses * weights), jnp.sum(weights), jnp.sum(right * weights), confusion)


def _confusion(chosen: jax.Array, targets: jax.Array, weights: jax.Array, labels: int) -> jax.Array:
    return jnp.zeros((labels, labels), jnp.float32).at[targets, chosen].add(weights)
