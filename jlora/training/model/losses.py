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
        more: of what else is told of a batch, by name, `[2]`: its sum, and the weight by which that is a mean.
    """

    loss: Any
    weight: Any
    correct: Any
    more: dict[str, Any] = {}  # noqa: RUF012  (never changed)


Objective = Callable[[Forward, Any, dict[str, jax.Array]], Sums]
"""The model, what it is computed with, and a batch to the sums of a loss, as `sums` makes them."""


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
    right = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    weights = batch["weights"]
    return Sums(jnp.sum(losses * weights), jnp.sum(weights), jnp.sum(right * weights))
