"""Losses as sums, so that parts of a batch add up exactly to the whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jlora
from jlora.losses import TokenSums as Sums
from jlora.losses import chunked_cross_entropy
from jlora.prompts.prompted import virtual_of

Forward = Callable[[Any, dict[str, jax.Array]], jax.Array]
"""Params (or an `Adapted`) and a batch to logits."""


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model as a `Forward`, tokens to logits for the next token `[rows, length, vocabulary]`; and its two halves.

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


def lifted_sums(forward: Forward, texts: int = 1, **lifting: Any) -> Callable[[Any, dict[str, jax.Array]], Sums]:
    """`sums` of the lifted function; a language model's by chunks where its logits are many.

    Args:
        forward: the plain model.
        texts: as for `jlora.prompted`.
        **lifting: as for `jlora.lift`.
    """
    if not isinstance(forward, LanguageModel):
        lifted = with_prompts(jlora.lift(forward, **lifting), texts)
        return lambda adapted, batch: sums(lifted, adapted, batch)
    # Neither half reads all of the adapted leaves.
    hidden, head = (jlora.lift(half, unread="allow", **lifting) for half in (forward.hidden, forward.head))
    hidden = with_prompts(hidden, texts)
    return lambda adapted, batch: chunked_cross_entropy(
        head, adapted, hidden(adapted, batch), batch["targets"], batch["weights"]
    )


def with_prompts(lifted: Forward, texts: int = 1) -> Forward:
    """A lifted forward pass, with the virtual tokens of the adapters in front of every text where they have any."""
    prompted = jlora.prompted(lifted, texts=texts, pooled=True)

    def forward(params: Any, batch: dict[str, jax.Array]) -> Any:
        return (prompted if virtual_of(params) else lifted)(params, batch)

    return forward


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
