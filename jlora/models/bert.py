"""BERT-style encoders: BERT, MiniLM and RoBERTa, as plain Linen modules.

Parameters are named as in Hugging Face checkpoints, kernels are `[in, out]`, and layers are one stack with a leading
layer axis (`scan_layers=True`) or `layer_0`, `layer_1`, ... References: arXiv:1810.04805, arXiv:1907.11692.
"""

import dataclasses
import reprlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.models import attention
from jlora.models.config import MOST_LAYERS, activation, flag, optional, positive, required, whole
from jlora.models.family import Family
from jlora.models.quantized import refuse_codes


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Shape of a BERT-style encoder; `from_hf` reads it from a Hugging Face `config.json`.

    Args:
        vocab_size: Rows of the word embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the feed-forward layer.
        num_hidden_layers: Layers.
        num_attention_heads: Heads; divides the width.
        max_position_embeddings: Rows of the position embedding.
        type_vocab_size: Rows of the token type embedding.
        layer_norm_eps: Added to the variance in every norm.
        hidden_act: Activation of the feed-forward layer.
        position_offset: Row of the position embedding for the first token (RoBERTa: padding id + 1).
        pooler: Has the pooler, a dense layer with tanh on the first token.
        scan_layers: One stack of layers under `nn.scan`, else one subtree a layer.
        remat: Recompute each layer in the backward pass rather than keep its activations.
        dtype: Dtype of the computation; norms and softmax are float32.
        param_dtype: Dtype of parameters made by `init`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    hidden_act: str = "gelu"
    position_offset: int = 0
    pooler: bool = True
    scan_layers: bool = True
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}."
            )

    @classmethod
    def from_hf(cls, hf: dict[str, Any], **options: Any) -> "BertConfig":
        """Reads a config of model type `bert` or `roberta`.

        Args:
            hf: Content of `config.json`.
            **options: `pooler`, `scan_layers`, `remat`, `dtype`, `param_dtype`.

        Raises:
            ValueError: A key is missing, or asks for what is not supported.
        """
        kind = optional(hf, "position_embedding_type", "absolute")
        if kind != "absolute":
            raise ValueError(
                f"config.json: position_embedding_type {reprlib.repr(kind)} is not supported, wanted 'absolute'."
            )
        if flag(hf, "is_decoder") or flag(hf, "add_cross_attention"):
            raise ValueError("config.json: BERT as a decoder (is_decoder, add_cross_attention) is not supported.")
        hidden_act = optional(hf, "hidden_act", "gelu")
        activation(hidden_act)
        roberta = required(hf, "model_type") == "roberta"
        offset = whole(hf, "pad_token_id", least=0) + 1 if roberta else 0
        return cls(
            **{key: whole(hf, key) for key in _SIZES},
            num_hidden_layers=whole(hf, "num_hidden_layers", most=MOST_LAYERS),
            layer_norm_eps=positive(hf, "layer_norm_eps"),
            hidden_act=hidden_act,
            position_offset=offset,
            **options,
        )


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "max_position_embeddings",
    "type_vocab_size",
)


def _dense(config: BertConfig, features: int, name: str) -> nn.Dense:
    return nn.Dense(features, dtype=config.dtype, param_dtype=config.param_dtype, name=name)


def _embed(config: BertConfig, rows: int, name: str) -> nn.Embed:
    return nn.Embed(rows, config.hidden_size, dtype=config.dtype, param_dtype=config.param_dtype, name=name)


class LayerNorm(nn.Module):
    """`(x - mean) / sqrt(variance + eps) * scale + bias`, over the last axis, in float32."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes `x` `[..., features]`; dtype of the computation."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.config.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.config.param_dtype)
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.config.layer_norm_eps)
        scale, bias = (jnp.broadcast_to(vector.astype(jnp.float32), x.shape) for vector in (scale, bias))
        return (x * scale + bias).astype(self.config.dtype)


class Embeddings(nn.Module):
    """Sum of word, position and token type embeddings, normalized."""

    config: BertConfig

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, token_types: jax.Array) -> jax.Array:
        """`[batch, length, hidden]` of three `[batch, length]`; positions count from 0."""
        c = self.config
        x = _embed(c, c.vocab_size, "word_embeddings")(tokens)
        x = x + _embed(c, c.max_position_embeddings, "position_embeddings")(positions + c.position_offset)
        x = x + _embed(c, c.type_vocab_size, "token_type_embeddings")(token_types)
        return LayerNorm(c, name="LayerNorm")(x)


class SelfAttention(nn.Module):
    """Multi-head attention over all positions of a segment, before its output layer."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, visible: attention.Visible) -> jax.Array:
        """Mixes `x` `[batch, length, hidden]` over positions."""
        c = self.config
        heads = (*x.shape[:2], c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        query, key, value = (_dense(c, c.hidden_size, name)(x).reshape(heads) for name in ("query", "key", "value"))
        return attention.attend(query, key, value, visible)


class Output(nn.Module):
    """`LayerNorm(dense(x) + residual)`."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array) -> jax.Array:
        """Projects `x` `[batch, length, any]` to the stream's width and adds it to `residual`."""
        c = self.config
        return LayerNorm(c, name="LayerNorm")(_dense(c, c.hidden_size, "dense")(x) + residual)


class Attention(nn.Module):
    """Self-attention and its output layer."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, visible: attention.Visible) -> jax.Array:
        """The stream `[batch, length, hidden]` after attention."""
        return Output(self.config, name="output")(SelfAttention(self.config, name="self")(x, visible), x)


class Intermediate(nn.Module):
    """`act(dense(x))`."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Widens `x` `[batch, length, hidden]`."""
        c = self.config
        return activation(c.hidden_act)(_dense(c, c.intermediate_size, "dense")(x))


class Layer(nn.Module):
    """One encoder layer."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, visible: attention.Visible) -> tuple[jax.Array, None]:
        """`x` `[batch, length, hidden]` after the layer; the None is what `nn.scan` wants beside it."""
        x = Attention(self.config, name="attention")(x, visible)
        return Output(self.config, name="output")(Intermediate(self.config, name="intermediate")(x), x), None


class Encoder(nn.Module):
    """All layers."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, visible: attention.Visible) -> jax.Array:
        """`x` `[batch, length, hidden]` after all layers."""
        c = self.config
        # Under scan the loop itself keeps XLA from merging the recomputation with the forward pass.
        layer = nn.remat(Layer, prevent_cse=not c.scan_layers) if c.remat else Layer
        if not c.scan_layers:
            for i in range(c.num_hidden_layers):
                x, _ = layer(c, name=f"layer_{i}")(x, visible)
            return x
        stack = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType] (documented)
            length=c.num_hidden_layers,
        )
        return stack(c, name="layer")(x, visible)[0]


class Pooler(nn.Module):
    """`tanh(dense(x))` of the first token."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """`[batch, hidden]` of the last hidden states `[batch, length, hidden]`."""
        return jnp.tanh(_dense(self.config, self.config.hidden_size, "dense")(hidden[:, 0]))


class Bert(nn.Module):
    """A BERT-style encoder: `model.apply({"params": params}, tokens, attention_mask=mask) -> hidden`."""

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        token_types: jax.Array | None = None,
        return_pooled: bool = False,
    ) -> Any:
        """Encodes tokens.

        Args:
            tokens: Token ids `[batch, length]`.
            positions: Position of every token, from 0; None counts the tokens of each segment.
            segment_ids: `[batch, length]`: packed texts, each sees itself alone; 0 is padding.
            attention_mask: `[batch, length]`, 0 or False for padding.
            token_types: `[batch, length]` (Hugging Face: `token_type_ids`); None is all 0.
            return_pooled: Also return the pooler's output, of the first token of each row.

        Returns:
            Last hidden states `[batch, length, hidden_size]`, float32, or the pair of these and the pooled `[batch,
            hidden_size]`.

        Raises:
            ValueError: The text is longer than the position embedding, or the checkpoint has no pooler.
            TypeError: Params are kept in the form of a code: run the model by `jlora.lift(model.apply)`.
        """
        refuse_codes(self.variables)
        c = self.config
        longest = c.max_position_embeddings - c.position_offset
        if tokens.shape[1] > longest and segment_ids is None and positions is None:
            raise ValueError(
                f"tokens: length {tokens.shape[1]} is more than the {longest} positions of the model; cut the text."
            )
        if return_pooled and not c.pooler:
            raise ValueError(
                "return_pooled: this checkpoint has no pooler; pool the hidden states, for example by mean_pool."
            )
        segments = attention.token_segments(tokens, segment_ids, attention_mask)
        positions = attention.token_positions(segments) if positions is None else positions
        token_types = jnp.zeros_like(tokens) if token_types is None else token_types
        x = Embeddings(c, name="embeddings")(tokens, jnp.broadcast_to(positions, tokens.shape), token_types)
        x = Encoder(c, name="encoder")(x, attention.Visible(segments, segments))
        pooled = (
            Pooler(c, name="pooler")(x).astype(jnp.float32)
            if c.pooler and (return_pooled or self.is_initializing())
            else None
        )
        hidden = x.astype(jnp.float32)
        return (hidden, pooled) if return_pooled else hidden


def mean_pool(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of the hidden states `[batch, length, hidden]` over the tokens where `mask` `[batch, length]` is true."""
    weight = mask.astype(hidden.dtype)[..., None]
    return jnp.sum(hidden * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1)


def sizes(c: BertConfig) -> dict[str, tuple[int, ...]]:
    """Shapes that the config gives to tensors of every checkpoint."""
    return {
        "embeddings.word_embeddings.weight": (c.vocab_size, c.hidden_size),
        "embeddings.position_embeddings.weight": (c.max_position_embeddings, c.hidden_size),
        "embeddings.token_type_embeddings.weight": (c.type_vocab_size, c.hidden_size),
        "encoder.layer.0.intermediate.dense.weight": (c.intermediate_size, c.hidden_size),
    }


BERT = Family(
    Bert,
    BertConfig,
    {"bert": ("BertForMaskedLM", "BertModel")},
    prefixes=("bert.", ""),
    anchor="embeddings.word_embeddings.weight",
    sizes=sizes,
    layer=r"encoder\.layer\.(\d{1,9})\..+",
    buffers=(r"(bert\.)?embeddings\.(position_ids|token_type_ids)",),
    heads=(
        r"cls\.predictions\.(bias|decoder\.(weight|bias)|transform\.(dense|LayerNorm)\.(weight|bias))",
        r"cls\.seq_relationship\.(weight|bias)",
        r"(classifier|qa_outputs)\.(weight|bias)",
    ),
    encoder=True,
    head="",
    embedding=("embeddings", "word_embeddings", "embedding"),
)
ROBERTA = dataclasses.replace(
    BERT,
    model_types={"roberta": ("RobertaForMaskedLM", "RobertaModel")},
    prefixes=("roberta.", ""),
    buffers=(r"(roberta\.)?embeddings\.(position_ids|token_type_ids)",),
    heads=(
        r"lm_head\.(bias|decoder\.(weight|bias)|(dense|layer_norm)\.(weight|bias))",
        r"classifier\.((dense|out_proj)\.)?(weight|bias)",
        r"qa_outputs\.(weight|bias)",
    ),
)
