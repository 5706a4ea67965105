"""The Llama family of decoders: Llama, Mistral, Qwen2 and Qwen3, as plain Linen modules.

Parameters are named as in Hugging Face checkpoints, kernels are `[in, out]`, and layers are one stack with a leading
layer axis (`scan_layers=True`) or `layers_0`, `layers_1`, ...
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jlora.disk.json_files import shown
from jlora.models import attention
from jlora.models.config import MOST_LAYERS, activation, flag, optional, positive, required, whole
from jlora.models.quantized import refuse_codes
from jlora.models.rope import RopeConfig, rotate, rotation
from jlora.models.s2 import s2_attention

# The window of a layer that has none, beside layers that have one: wider than any text.
NO_WINDOW = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape of a model of the Llama family; `from_hf` reads it from a Hugging Face `config.json`.

    Args:
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the feed-forward layer.
        num_hidden_layers: Layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads; divides the query heads.
        head_dim: Width of a head.
        max_position_embeddings: Longest text, in tokens, that the model is meant for.
        rms_norm_eps: Added to the mean square in every norm.
        rope: Rotary positions.
        hidden_act: Activation of the gate.
        tie_word_embeddings: The head is the embedding, transposed.
        qkv_bias: Biases on the q, k and v projections.
        output_bias: Bias on the o projection.
        mlp_bias: Biases in the feed-forward layer.
        language_head: Has the head; without it the model returns hidden states.
        qk_norm: RMS norm on every head's query and key (Qwen3).
        windows: For every layer how many tokens back it sees, itself included; None sees all. Empty: all see all.
        attention: "full", or "s2": attention inside groups (`s2_attention`), for training on long texts.
        group: Tokens of such a group; None for a quarter of the text.
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
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    language_head: bool = True
    windows: tuple[int | None, ...] = ()
    attention: str = "full"
    group: int | None = None
    scan_layers: bool = True
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions want an even one.")
        if self.rope.rope_type == "dynamic" and self.head_dim < 4:
            raise ValueError(f"head_dim {self.head_dim} is too small for rope type 'dynamic', which wants 4 or more.")
        if self.windows and len(self.windows) != self.num_hidden_layers:
            raise ValueError(
                f"windows has {len(self.windows)} entries, wanted one for each of {self.num_hidden_layers} layers."
            )

        if self.attention not in ("full", "s2"):
            raise ValueError(f'attention must be "full" or "s2", got {self.attention!r}.')
        if self.attention == "s2" and self.windows:
            raise ValueError('attention "s2" has groups in place of windows, and this model has windows.')

    @classmethod
    def from_hf(cls, hf: dict[str, Any], **options: Any) -> "LlamaConfig":
        """Reads a config of model type `llama`, `mistral`, `qwen2` or `qwen3`.

        Args:
            hf: Content of `config.json`.
            **options: `language_head`, `scan_layers`, `remat`, `dtype`, `param_dtype`.

        Raises:
            ValueError: A key is missing, or asks for what is not supported.
        """
        family, heads = required(hf, "model_type"), whole(hf, "num_attention_heads")
        biased = family in ("llama", "qwen3") and flag(hf, "attention_bias")
        if family != "llama":
            required(hf, "head_dim" if family == "qwen3" else "num_key_value_heads")
        hidden_act = optional(hf, "hidden_act", "silu")
        activation(hidden_act)
        sizes = {key: whole(hf, key) for key in _SIZES}
        return cls(
            **sizes,
            num_hidden_layers=whole(hf, "num_hidden_layers", most=MOST_LAYERS),
            num_attention_heads=heads,
            num_key_value_heads=whole(hf, "num_key_value_heads", heads),
            head_dim=whole(hf, "head_dim", sizes["hidden_size"] // heads, most=_WIDEST_HEAD),
            rms_norm_eps=positive(hf, "rms_norm_eps"),
            rope=RopeConfig.from_hf(hf),
            hidden_act=hidden_act,
            tie_word_embeddings=flag(hf, "tie_word_embeddings"),
            qkv_bias=biased or family == "qwen2",
            output_bias=biased,
            mlp_bias=family == "llama" and flag(hf, "mlp_bias"),
            qk_norm=family == "qwen3",
            windows=_windows(hf, family),
            **options,
        )


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")
# A bound, since the frequencies of a head's planes are constants in the compiled program.
_WIDEST_HEAD = 2**16
# Kinds of `layer_types`, and whether they have a window.
_KINDS = {"full_attention": False, "sliding_attention": True}


def _windows(hf: dict[str, Any], family: str) -> tuple[int | None, ...]:
    """Window of every layer, () where all layers see everything: `layer_types` rules where the config has it."""
    switched_off = family in ("qwen2", "qwen3") and not flag(hf, "use_sliding_window")
    if family == "llama" or hf.get("sliding_window") is None or switched_off:
        return ()
    layers, window = whole(hf, "num_hidden_layers", most=MOST_LAYERS), whole(hf, "sliding_window")
    if (kinds := hf.get("layer_types")) is not None:
        if not isinstance(kinds, list) or not all(isinstance(kind, str) and kind in _KINDS for kind in kinds):
            raise ValueError(
                f"config.json: 'layer_types' must be a list of {' and '.join(_KINDS)}, got {shown(kinds)}."
            )
        return tuple(window if _KINDS[kind] else None for kind in kinds)
    first = whole(hf, "max_window_layers", least=0) if family in ("qwen2", "qwen3") else 0
    return tuple(window if layer >= first else None for layer in range(layers))


class AttentionInputs(NamedTuple):
    """What every layer's attention reads besides the hidden states.

    Attributes:
        cosine: `rotation` of the tokens' positions.
        sine: As cosine.
        mask: bool `[batch, 1, queries, keys]`: causal, and within the segment.
        distance: int32 `[batch, 1, queries, keys]`, query position minus key position; None if no layer has a window.
        index: First free slot of the cache; None without one.
        segments: With attention "s2", which makes its masks group by group, segment of every token; else None.
    """

    cosine: jax.Array
    sine: jax.Array
    mask: jax.Array | None
    distance: jax.Array | None
    index: jax.Array | None
    segments: jax.Array | None = None


class LayerInputs(NamedTuple):
    """What is one layer's own: its part of the cache and its window, each None where the model has none."""

    keys: Any
    values: Any
    window: Any


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * scale`, over the last axis, in float32."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes `x` `[..., features]`; dtype of the computation."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.config.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.config.rms_norm_eps)
        return (x * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)).astype(self.config.dtype)


def _dense(config: LlamaConfig, features: int, bias: bool, name: str) -> nn.Dense:
    return nn.Dense(features, use_bias=bias, dtype=config.dtype, param_dtype=config.param_dtype, name=name)


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, inputs: AttentionInputs, layer: LayerInputs) -> tuple[jax.Array, LayerInputs]:
        """Mixes `x` `[batch, length, hidden]` over positions; also returns the layer's cache with the new tokens."""
        c = self.config
        query = self._heads(x, c.num_attention_heads, "q")
        key = self._heads(x, c.num_key_value_heads, "k")
        value = self._heads(x, c.num_key_value_heads, "v")
        if c.qk_norm:
            query, key = RMSNorm(c, name="q_norm")(query), RMSNorm(c, name="k_norm")(key)
        query, key = rotate(query, inputs.cosine, inputs.sine), rotate(key, inputs.cosine, inputs.sine)
        if inputs.index is not None:
            start = (0, inputs.index, 0, 0)
            key = jax.lax.dynamic_update_slice(layer.keys, key.astype(layer.keys.dtype), start)
            value = jax.lax.dynamic_update_slice(layer.values, value.astype(layer.values.dtype), start)
            layer = layer._replace(keys=key, values=value)
        if inputs.segments is not None:
            mixed = s2_attention(query, key, value, group=c.group, segments=inputs.segments).reshape(*x.shape[:2], -1)
        else:
            assert inputs.mask is not None
            mask = inputs.mask if inputs.distance is None else inputs.mask & (inputs.distance < layer.window)
            mixed = attention.attend(query, key, value, mask)
        return _dense(c, c.hidden_size, c.output_bias, "o_proj")(mixed), layer

    def _heads(self, x: jax.Array, heads: int, name: str) -> jax.Array:
        c = self.config
        return _dense(c, heads * c.head_dim, c.qkv_bias, f"{name}_proj")(x).reshape(*x.shape[:2], heads, c.head_dim)


class FeedForward(nn.Module):
    """`down(act(gate(x)) * up(x))` (SwiGLU)."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Transforms every position of `x` `[batch, length, hidden]`."""
        c = self.config
        gate = _dense(c, c.intermediate_size, c.mlp_bias, "gate_proj")(x)
        up = _dense(c, c.intermediate_size, c.mlp_bias, "up_proj")(x)
        return _dense(c, c.hidden_size, c.mlp_bias, "down_proj")(activation(c.hidden_act)(gate) * up)


class Layer(nn.Module):
    """One decoder layer: attention and feed-forward, each behind a norm and added to the stream."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, inputs: AttentionInputs, layer: LayerInputs) -> tuple[jax.Array, LayerInputs]:
        """`x` `[batch, length, hidden]` after the layer, and the layer's cache."""
        c = self.config
        mixed, layer = SelfAttention(c, name="self_attn")(RMSNorm(c, name="input_layernorm")(x), inputs, layer)
        x = x + mixed
        return x + FeedForward(c, name="mlp")(RMSNorm(c, name="post_attention_layernorm")(x)), layer


class Llama(nn.Module):
    """A decoder of the Llama family: `model.apply({"params": params}, tokens) -> logits`."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        cache: attention.KVCache | None = None,
        return_hidden: bool = False,
    ) -> Any:
        """Reads tokens and scores what follows each.

        Args:
            tokens: Token ids `[batch, length]`.
            positions: Position of every token; None counts the tokens of each segment, on from those in the cache.
            segment_ids: `[batch, length]`: packed texts, each sees itself alone; 0 is padding.
            attention_mask: `[batch, length]`, 0 or False for padding, on any side.
            cache: Keys and values of the tokens before (`empty_cache` at first); asks for a pair as the result.
            return_hidden: Return the last hidden states, after the final norm, in place of the logits; so does a model
                without a head.

        Returns:
            Logits `[batch, length, vocab_size]` (or hidden states `[batch, length, hidden_size]`), float32; with a
            cache, the pair of these and the cache with the new tokens.

        Raises:
            TypeError: Params are kept in the form of a code: run the model by `jlora.lift(model.apply)`.
        """
        refuse_codes(self.variables)
        c = self.config
        embed = nn.Embed(c.vocab_size, c.hidden_size, dtype=c.dtype, param_dtype=c.param_dtype, name="embed_tokens")
        inputs, cache = self._attention_inputs(tokens, positions, segment_ids, attention_mask, cache)
        x, cache = self._run_layers(embed(tokens), inputs, cache)
        x = RMSNorm(c, name="norm")(x)
        if c.language_head and not return_hidden:
            x = embed.attend(x) if c.tie_word_embeddings else _dense(c, c.vocab_size, False, "lm_head")(x)
        x = x.astype(jnp.float32)
        return x if cache is None else (x, cache)

    def _attention_inputs(self, tokens, positions, segment_ids, attention_mask, cache):
        c = self.config
        segments = attention.token_segments(tokens, segment_ids, attention_mask)
        positions = attention.token_positions(segments, cache) if positions is None else positions
        positions = jnp.broadcast_to(positions, tokens.shape).astype(jnp.int32)
        cosine, sine = rotation(c.rope, c.head_dim, positions)
        if c.attention == "s2":
            if cache is not None:
                raise ValueError('attention "s2" is for training; generate with "full", on the same params.')
            return AttentionInputs(cosine, sine, None, None, None, segments), None
        key_positions, key_segments, index = positions, segments, None
        if cache is not None:
            index, cache = cache.index, attention.extend(self._allocate(cache), positions, segments)
            key_positions, key_segments = cache.positions, cache.segments
        distance = attention.distances(positions, key_positions)
        mask = attention.segment_mask(segments, key_segments) & (distance >= 0)
        return AttentionInputs(cosine, sine, mask, distance if c.windows else None, index), cache

    def _allocate(self, cache: attention.KVCache) -> attention.KVCache:
        if cache.keys is not None:
            return cache
        c = self.config
        blank = jnp.zeros((c.num_hidden_layers, *cache.positions.shape, c.num_key_value_heads, c.head_dim), c.dtype)
        return cache.replace(keys=blank, values=blank)

    def _run_layers(self, x, inputs, cache):
        c = self.config
        window = jnp.array([NO_WINDOW if w is None else w for w in c.windows], jnp.int32) if c.windows else None
        own = LayerInputs(None if cache is None else cache.keys, None if cache is None else cache.values, window)
        # Under scan the loop itself keeps XLA from merging the recomputation with the forward pass.
        layer = nn.remat(Layer, prevent_cse=not c.scan_layers) if c.remat else Layer
        if c.scan_layers:
            stack = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType] (a tuple is documented)
                length=c.num_hidden_layers,
            )
            x, own = stack(c, name="layers")(x, inputs, own)
        else:
            x, own = self._unrolled(layer, x, inputs, own)
        return x, None if cache is None else cache.replace(keys=own.keys, values=own.values)

    def _unrolled(self, layer, x, inputs, own):
        after = []
        for i in range(self.config.num_hidden_layers):
            x, one = layer(self.config, name=f"layers_{i}")(x, inputs, jax.tree.map(lambda leaf, i=i: leaf[i], own))
            after.append(one)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *after)
