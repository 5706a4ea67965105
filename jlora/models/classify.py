"""Classification: an encoder or a decoder with a linear head on its pooled hidden states; a ViT has its head inside."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.models.attention import token_segments
from jlora.models.bert import Bert, mean_pool
from jlora.models.decoder import Decoder
from jlora.models.vit import ViT


class Classifier(nn.Module):
    """`classifier(pool(backbone(tokens)))`; params are `{"backbone": ..., "classifier": {"kernel", "bias"}}`.

    Args:
        backbone: A model that returns hidden states: an encoder, or a decoder without its language head.
        num_labels: Number of classes.
        pooling: `mean` over the tokens, or the `last` token.
    """

    backbone: nn.Module
    num_labels: int
    pooling: str

    @nn.compact
    def __call__(self, tokens: jax.Array, attention_mask: jax.Array | None = None, **inputs: Any) -> jax.Array:
        """Scores texts.

        Args:
            tokens: Token ids `[batch, length]`.
            attention_mask: `[batch, length]`, 0 or False for padding, on any side.
            **inputs: What else the backbone takes, such as `token_types` of an encoder.

        Returns:
            Logits `[batch, num_labels]`, float32.
        """
        hidden = self.backbone(tokens, attention_mask=attention_mask, **inputs)  # pyright: ignore[reportCallIssue]
        mask = token_segments(tokens, None, attention_mask)
        pooled = mean_pool(hidden, mask) if self.pooling == "mean" else last_pool(hidden, mask)
        return nn.Dense(self.num_labels, kernel_init=nn.initializers.normal(0.02), name="classifier")(pooled)


def last_pool(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """The hidden states `[batch, length, hidden]` of the last token where `mask` `[batch, length]` is true."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1].astype(bool), axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def make_classifier(
    model: nn.Module, params: dict[str, Any], num_labels: int, key: jax.Array
) -> tuple[Any, dict[str, Any]]:
    """A classifier on a loaded model, with a new head.

    What the task does not read is left out: the language head of a decoder, the pooler of an encoder. Encoders are
    pooled by the mean over tokens, decoders by the last token. A ViT stays a `ViT`, with its new head in place of its own.

    Args:
        model: As `load` returns it.
        params: Its params; the arrays are shared, not copied.
        num_labels: Number of classes.
        key: Random key of the head.

    Returns:
        The classifier, a `Classifier` or a `ViT`, and its params.

    Raises:
        TypeError: The model is neither an encoder nor a decoder nor a ViT of this package.
        ValueError: There are fewer than two labels.
    """
    if num_labels < 2:
        raise ValueError(f"num_labels: wanted 2 or more, got {num_labels}.")
    if isinstance(model, ViT):
        config = dataclasses.replace(model.config, num_labels=num_labels, classifier=True, pooler=False)
        classifier: nn.Module = ViT(config)
    elif isinstance(model, Bert):
        classifier = Classifier(Bert(dataclasses.replace(model.config, pooler=False)), num_labels, "mean")
    elif isinstance(model, Decoder):
        headless = type(model)(dataclasses.replace(model.config, language_head=False))
        classifier = Classifier(headless, num_labels, "last")
    else:
        raise TypeError(f"model: wanted a Bert, a decoder or a ViT, got a {type(model).__name__}.")
    kept = {name: leaf for name, leaf in params.items() if name not in ("pooler", "lm_head", "classifier")}
    head = {
        "kernel": nn.initializers.normal(0.02)(key, (model.config.hidden_size, num_labels), jnp.float32),
        "bias": jnp.zeros((num_labels,), jnp.float32),
    }
    return classifier, {**kept, "classifier": head} if isinstance(model, ViT) else {
        "backbone": kept,
        "classifier": head,
    }
