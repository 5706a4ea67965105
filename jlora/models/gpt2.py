"""GPT-2 decoders, as plain Linen modules: learned positions, LayerNorm, biases everywhere, and one product for q, k and v.

Checkpoints keep linear weights as `[in, out]` (transformers' Conv1D). Reference: Radford et al., 2019.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.models import attention
from jlora.models.bert import LayerNorm
from jlora.models.config import MOST_LAYERS, activation, flag, optional, positive, refuse, whole
from jlora.models.decoder import AttentionInputs, Decoder, LayerInputs, dense, embedding
from jlora.models.family import Family


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Shape of a GPT-2; `from_hf` reads it from a Hugging Face `config.json`.

    Args:
        vocab_size: Rows of the token embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the feed-forward layer.
        num_hidden_layers: Layers.
        num_attention_heads: Heads; divides the width.
        max_position_embeddings: Rows of the position embedding.
        layer_norm_eps: Added to the variance in every norm.
        hidden_act: Activation of the feed-forward layer.
        tie_word_embeddings: The head is the embedding, transposed.
        scaled: The scores of attention are divided by `sqrt(head_dim)`.
        scaled_by_layer: They are divided by the layer's number too, counted from 1.
        language_head: Has the head; without it the model returns hidden states.
        scan_layers: One stack of layers under `nn.scan`, else one subtree a layer.
        remat: Recompute each layer in the backward pass rather than keep its activations.
        dtype: Dtype of the computation; norms, softmax and logits are float32.
        param_dtype: Dtype of parameters made by `init`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    layer_norm_eps: float
    hidden_act: str = "gelu_new"
    tie_word_embeddings: bool = True
    scaled: bool = True
    scaled_by_layer: bool = False
    language_head: bool = True
    scan_layers: bool = True
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"n_embd {self.hidden_size} is no multiple of n_head {self.num_attention_heads}.")

    @property
    def num_key_value_heads(self) -> int:
        """Key and value heads: as many as query heads."""
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def windows(self) -> tuple[int | None, ...]:
        """No layer has one."""
        return ()

    @classmethod
    def from_hf(cls, hf: dict[str, Any], **options: Any) -> "GPT2Config":
        """Reads a config of model type `gpt2`.

        Args:
            hf: Content of `config.json`.
            **options: `language_head`, `scan_layers`, `remat`, `dtype`, `param_dtype`.

        Raises:
            ValueError: A key is missing, or asks for what is not supported.
        """
        refuse(hf, "add_cross_attention", "the model reads what an encoder gives it")
        hidden_act = optional(hf, "activation_function", "gelu_new")
        activation(hidden_act)
        return cls(
            vocab_size=whole(hf, "vocab_size"),
            hidden_size=whole(hf, "n_embd"),
            intermediate_size=whole(hf, "n_inner", 4 * whole(hf, "n_embd")),
            num_hidden_layers=whole(hf, "n_layer", most=MOST_LAYERS),
            num_attention_heads=whole(hf, "n_head"),
            max_position_embeddings=whole(hf, "n_positions"),
            layer_norm_eps=positive(hf, "layer_norm_epsilon", 1e-5),
            hidden_act=hidden_act,
            tie_word_embeddings=flag(hf, "tie_word_embeddings", True),
            scaled=flag(hf, "scale_attn_weights", True),
            scaled_by_layer=flag(hf, "scale_attn_by_inverse_layer_idx"),
            **options,
        )


class SelfAttention(nn.Module):
    """Multi-head attention, with queries, keys and values as one product."""

    config: GPT2Config

    @nn.compact
    def __call__(self, x: jax.Array, inputs: AttentionInputs, layer: LayerInputs) -> tuple[jax.Array, LayerInputs]:
        """Mixes `x` `[batch, length, hidden]` over positions; also returns the layer's cache with the new tokens."""
        c = self.config
        every = dense(c, 3 * c.hidden_size, True, "c_attn")(x).reshape(
            *x.shape[:2], 3, c.num_attention_heads, c.head_dim
        )
        query, key, value = (every[:, :, part] for part in range(3))
        key, value, layer = layer.extended(key, value, inputs)
        scale = c.head_dim**-0.5 if c.scaled else 1.0
        scale = scale if layer.own is None else scale / layer.own
        mixed = attention.attend(query, key, value, layer.visible(inputs), scale)
        return dense(c, c.hidden_size, True, "c_proj")(mixed), layer


class FeedForward(nn.Module):
    """`c_proj(act(c_fc(x)))`."""

    config: GPT2Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Transforms every position of `x` `[batch, length, hidden]`."""
        c = self.config
        return dense(c, c.hidden_size, True, "c_proj")(
            activation(c.hidden_act)(dense(c, c.intermediate_size, True, "c_fc")(x))
        )


class Layer(nn.Module):
    """One decoder layer: attention and feed-forward, each behind a norm and added to the stream."""

    config: GPT2Config

    @nn.compact
    def __call__(self, x: jax.Array, inputs: AttentionInputs, layer: LayerInputs) -> tuple[jax.Array, LayerInputs]:
        """`x` `[batch, length, hidden]` after the layer, and the layer's cache."""
        c: Any = self.config
        mixed, layer = SelfAttention(c, name="attn")(LayerNorm(c, name="ln_1")(x), inputs, layer)
        x = x + mixed
        return x + FeedForward(c, name="mlp")(LayerNorm(c, name="ln_2")(x)), layer


class GPT2(Decoder):
    """A GPT-2: `model.apply({"params": params}, tokens) -> logits`; a text longer than its positions is an error."""

    config: GPT2Config

    def layer(self) -> Any:
        return Layer

    @property
    def stack_name(self) -> str:
        """The word that checkpoints have for the layers."""
        return "h"

    def table(self) -> nn.Embed:
        return embedding(self.config, self.config.vocab_size, "wte")

    def embed(self, table: nn.Embed, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """The first hidden states.

        Args:
            table: The embedding of tokens.
            tokens: Token ids `[batch, length]`.
            positions: Position of every token `[batch, length]`.

        Raises:
            ValueError: The text is longer than the position embedding.
        """
        c = self.config
        if tokens.shape[1] > c.max_position_embeddings:
            raise ValueError(
                f"tokens: length {tokens.shape[1]} is more than the {c.max_position_embeddings} positions of the model; cut "
                "the text."
            )
        return table(tokens) + embedding(c, c.max_position_embeddings, "wpe")(positions)

    def last_norm(self, x: jax.Array) -> jax.Array:
        config: Any = self.config
        return LayerNorm(config, name="ln_f")(x)

    def own(self) -> Any:
        c = self.config
        return jnp.arange(1, c.num_hidden_layers + 1, dtype=jnp.float32) if c.scaled_by_layer else None


def sizes(c: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Shapes that the config gives to tensors of every checkpoint."""
    return {
        "wte.weight": (c.vocab_size, c.hidden_size),
        "wpe.weight": (c.max_position_embeddings, c.hidden_size),
        "h.0.attn.c_attn.weight": (c.hidden_size, 3 * c.hidden_size),
        "h.0.mlp.c_fc.weight": (c.hidden_size, c.intermediate_size),
    }


FAMILY = Family(
    GPT2,
    GPT2Config,
    {"gpt2": ("GPT2LMHeadModel", "GPT2Model")},
    prefixes=("transformer.", ""),
    anchor="wte.weight",
    sizes=sizes,
    layer=r"h\.(\d{1,9})\..+",
    unprefixed=("lm_head",),
    buffers=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
    heads=(r"score\.weight",),
    count="n_layer",
    transposed=False,
    embedding=("wte", "embedding"),
)
