"""Losses as sums, so that parts of a batch add up exactly to the whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jlora
from jlora.losses import chunked_cross_entropy
from jlora.prompts.prompted import virtual_of

Forward = Callable[[Any, dict[str, jax.Array]], jax.Array]
"""Params (or an `Adapted`) and a batch to logits."""


class Sums(NamedTuple):
    """Sums over a batch.

    Attributes:
        loss: weighted cross-entropy in nats.
        weight: of the predictions: tokens for language models, rows for classification.
        correct: weight of the right predictions.
        more: of what else is told of a batch, by name, `[2]`: its sum, and the weight by which that is a mean.
        confusion: of classes, `[labels, labels]`: weight of the rows of each label (first axis) by the one that was predicted.
    """

    loss: Any
    weight: Any
    correct: Any
    more: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    confusion: Any = None


Objective = Callable[[Forward, Any, dict[str, jax.Array]], Sums]
"""The model, what it is computed with, and a batch to the sums of a loss, as `sums` makes them."""


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model as a `Forward`, tokens to logits for the next token `[rows, length, vocabulary]`.

    Attributes:
        model: one of `jlora.models` with a head.
    """

    model: Any

    def __call__(self, params: Any, batch: dict[str, jax.Array]) -> Any:
        return self._apply(params, batch)

    def hidden(self, params: Any, batch: dict[str, jax.Array]) -> Any:
        """What the head is given, `[rows, length, width]`."""
        return self._apply(params, batch, return_hidden=True)

    def head(self, params: Any, hidden: jax.Array) -> Any:
        """The logits."""
        return self.model.apply({"params": params}, from_hidden=hidden)

    def _apply(self, params: Any, batch: dict[str, jax.Array], **options: Any) -> Any:
        places = {name: batch[name] for name in ("positions", "segment_ids")}
        return self.model.apply({"params": params}, batch["tokens"], **places, **options)


@dataclasses.dataclass(frozen=True)
class Halves:
    """A language model as a lifted `Forward` in two halves, so that its logits need not be there all at once.

    Attributes:
        hidden: what the head is given.
        head: params and that to logits.
    """

    hidden: Forward
    head: Callable[[Any, jax.Array], jax.Array]

    def __call__(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return self.head(params, self.hidden(params, batch))


def lifted_forward(forward: Forward, texts: int = 1, **lifting: Any) -> Forward:
    """The lifted forward pass, with the virtual tokens of the adapters in front of every text where they have any.

    Args:
        forward: the plain model.
        texts: as for `jlora.prompted`.
        **lifting: as for `jlora.lift`.
    """
    if not isinstance(forward, LanguageModel):
        return with_prompts(jlora.lift(forward, **lifting), texts)
    # Neither half reads all of the adapted leaves.
    hidden, head = (jlora.lift(half, unread="allow", **lifting) for half in (forward.hidden, forward.head))
    return Halves(with_prompts(hidden, texts), head)


def with_prompts(lifted: Callable[..., Any], texts: int = 1) -> Callable[..., Any]:
    """The lifted function, with the virtual tokens of the adapters in front of every text where they have any."""
    prompted = jlora.prompted(lifted, texts=texts, pooled=True)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (prompted if virtual_of((args, kwargs)) else lifted)(*args, **kwargs)

    return forward


def sums(forward: Forward, params: Any, batch: dict[str, jax.Array]) -> Sums:
    """`-Σ w log p(target)` with its weights, by a softmax in float32; in chunks where the logits of `Halves` are many.

    Args:
        forward: the model.
        params: what it is computed with.
        batch: as `jlora.training.data.pipeline.collate` makes it.
    """
    if isinstance(forward, Halves):
        hidden = forward.hidden(params, batch)
        return Sums(*chunked_cross_entropy(forward.head, params, hidden, batch["targets"], batch["weights"]))
    logits = forward(params, batch).astype(jnp.float32)
    targets = batch["labels"] if "labels" in batch else batch["targets"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    chosen, weights = jnp.argmax(logits, axis=-1), batch["weights"]
    right = (chosen == targets).astype(jnp.float32)
    confusion = _confusion(chosen, targets, weights, logits.shape[-1]) if "labels" in batch else None
    return Sums(jnp.sum(losses * weights), jnp.sum(weights), jnp.sum(right * weights), confusion=confusion)


def _confusion(chosen: jax.Array, targets: jax.Array, weights: jax.Array, labels: int) -> jax.Array:
    return jnp.zeros((labels, labels), jnp.float32).at[targets, chosen].add(weights)
