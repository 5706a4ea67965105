"""The Llama family of decoders: Llama, Mistral, Qwen2 and Qwen3, as plain Linen modules.

Parameters are named as in Hugging Face checkpoints, kernels are `[in, out]`, and layers are one stack with a leading
layer axis (`scan_layers=True`) or `layers_0`, `layers_1`, ...
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.disk.json_files import shown
from jlora.models import attention
from jlora.models.config import MOST_LAYERS, activation, flag, optional, positive, required, whole
from jlora.models.decoder import AttentionInputs, Decoder, LayerInputs, dense
from jlora.models.family import Family
from jlora.models.rope import RopeConfig, rotate, rotation
from jlora.models.s2 import s2_attention


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
        sizes = {key: whole(hf, key) for key in SIZES}
        return cls(
            **sizes,
            num_hidden_layers=whole(hf, "num_hidden_layers", most=MOST_LAYERS),
            num_attention_heads=heads,
            num_key_value_heads=whole(hf, "num_key_value_heads", heads),
            head_dim=whole(hf, "head_dim", sizes["hidden_size"] // heads, most=WIDEST_HEAD),
            rms_norm_eps=positive(hf, "rms_norm_eps"),
            rope=RopeConfig.from_hf(hf),
            hidden_act=hidden_act,
            tie_word_embeddings=flag(hf, "tie_word_embeddings"),
            qkv_bias=biased or family == "qwen2",
            output_bias=biased,
            mlp_bias=family == "llama" and flag(hf, "mlp_bias"),
            qk_norm=family == "qwen3",
            windows=windows_of(hf, family),
            **options,
        )


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")
# A bound, since the frequencies of a head's planes are constants in the compiled program.
WIDEST_HEAD = 2**16
# Kinds of `layer_types`, and whether they have a window.
_KINDS = {"full_attention": False, "sliding_attention": True}


def windows_of(hf: dict[str, Any], family: str) -> tuple[int | None, ...]:
    """Window of every layer, () where all layers see everything: `layer_types` rules where the config has it."""
    switched_off = family in ("qwen2", "qwen3") and not flag(hf, "use_sliding_window")
    if family == "llama" or hf.get("sliding_window") is None or switched_off:
        return ()
    layers, window = whole(hf, "num_hidden_layers", most=MOST_LAYERS), whole(hf, "sliding_window")
    if (local := kinds_of(hf, layers)) is not None:
        return tuple(window if each else None for each in local)
    first = whole(hf, "max_window_layers", least=0) if family in ("qwen2", "qwen3") else 0
    return tuple(window if layer >= first else None for layer in range(layers))


def kinds_of(hf: dict[str, Any], layers: int) -> tuple[bool, ...] | None:
    """Whether each layer is a local one, by `layer_types`; None where the config has none.

    Raises:
        ValueError: It is no list of the kinds that there are, one for each layer.
    """
    if (kinds := hf.get("layer_types")) is None:
        return None
    if not isinstance(kinds, list) or not all(isinstance(kind, str) and kind in _KINDS for kind in kinds):
        raise ValueError(f"config.json: 'layer_types' must be a list of {' and '.join(_KINDS)}, got {shown(kinds)}.")
    if len(kinds) != layers:
        raise ValueError(
            f"config.json: 'layer_types' has {len(kinds)} entries, wanted one for each of {layers} layers."
        )
    return tuple(_KINDS[kind] for kind in kinds)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * scale`, over the last axis, in float32."""

    config: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes `x` `[..., features]`; dtype of the computation."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.config.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.config.rms_norm_eps)
        return (x * jnp.broadcast_to(scale.astype(jnp.float32), x.shape)).astype(self.config.dtype)


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: Any

    @nn.compact
    def __call__(self, x: jax.Array, inputs: AttentionInputs, layer: LayerInputs) -> tuple[jax.Array, LayerInputs]:
        """Mixes `x` `[batch, length, hidden]` over positions; also returns the layer's cache with the new tokens."""
        c = self.config
        query, key, value = self.project(x)
        if c.qk_norm:
            query, key = self.norm("q_norm")(query), self.norm("k_norm")(key)
        query, key = (rotate(each, *self.angles(inputs, layer)) for each in (query, key))
        key, value, layer = layer.extended(key, value, inputs)
        mixed = self._mix(query, key, value, inputs, layer)
        return dense(c, c.hidden_size, c.output_bias, "o_proj")(mixed), layer

    def _mix(self, query, key, value, inputs: AttentionInputs, layer: LayerInputs) -> jax.Array:
        if self.config.attention == "full":
            return attention.attend(query, key, value, layer.visible(inputs), **self.scaling())
        if inputs.index is not None:
            raise ValueError('attention "s2" is for training; generate with "full", on the same params.')
        if self.scaling():
            raise ValueError(
                f'attention "s2" knows no {" and no ".join(self.scaling())} of scores; this model has them.'
            )
        segments = inputs.visible.query_segments
        return s2_attention(query, key, value, group=self.config.group, segments=segments).reshape(*query.shape[:2], -1)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values, `[batch, length, heads, head_dim]` each."""
        c = self.config
        counts = {"q": c.num_attention_heads, "k": c.num_key_value_heads, "v": c.num_key_value_heads}
        query, key, value = (
            dense(c, count * c.head_dim, c.qkv_bias, f"{name}_proj")(x).reshape(*x.shape[:2], count, c.head_dim)
            for name, count in counts.items()
        )
        return query, key, value

    def norm(self, name: str) -> nn.Module:
        """The norm of every head's query or key."""
        return RMSNorm(self.config, name=name)

    def angles(self, inputs: AttentionInputs, layer: LayerInputs) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines of this layer's rotation."""
        return inputs.rotary

    def scaling(self) -> dict[str, Any]:
        """Arguments of `attend`: the scale and the cap of scores, where they are not the usual ones."""
        return {}


class FeedForward(nn.Module):
    """`down(act(gate(x)) * up(x))` (SwiGLU)."""

    config: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Transforms every position of `x` `[batch, length, hidden]`."""
        c = self.config
        gate = dense(c, c.intermediate_size, c.mlp_bias, "gate_proj")(x)
        up = dense(c, c.intermediate_size, c.mlp_bias, "up_proj")(x)
        return dense(c, c.hidden_size, c.mlp_bias, "down_proj")(activation(c.hidden_act)(gate) * up)


class Layer(nn.Module):
    """One decoder layer: attention and feed-forward, each behind a norm and added to the stream.

    Families whose parts differ say so by `attention` and `feed_forward`.
    """

    config: Any

    @nn.compact
    def __call__(self, x: jax.Array, inputs: AttentionInputs, layer: LayerInputs) -> tuple[jax.Array, LayerInputs]:
        """`x` `[batch, length, hidden]` after the layer, and the layer's cache."""
        c = self.config
        mixed, layer = self.attention(name="self_attn")(RMSNorm(c, name="input_layernorm")(x), inputs, layer)
        x = x + mixed
        return x + self.feed_forward(name="mlp")(RMSNorm(c, name="post_attention_layernorm")(x)), layer

    def attention(self, name: str) -> nn.Module:
        """The layer's attention."""
        return SelfAttention(self.config, name=name)

    def feed_forward(self, name: str) -> nn.Module:
        """The layer's feed-forward part."""
        return FeedForward(self.config, name=name)


class Llama(Decoder):
    """A decoder of the Llama family: `model.apply({"params": params}, tokens) -> logits`."""

    config: LlamaConfig

    def layer(self) -> Any:
        return Layer

    def last_norm(self, x: jax.Array) -> jax.Array:
        return RMSNorm(self.config, name="norm")(x)

    def rotary(self, positions: jax.Array) -> Any:
        return rotation(self.config.rope, self.config.head_dim, positions)


def sizes(c: Any) -> dict[str, tuple[int, ...]]:
    """Shapes that the config gives to tensors of every checkpoint."""
    return {
        "embed_tokens.weight": (c.vocab_size, c.hidden_size),
        "layers.0.self_attn.q_proj.weight": (c.num_attention_heads * c.head_dim, c.hidden_size),
        "layers.0.mlp.gate_proj.weight": (c.intermediate_size, c.hidden_size),
    }


FAMILY = Family(
    Llama,
    LlamaConfig,
    {
        "llama": ("LlamaForCausalLM", "LlamaModel"),
        "mistral": ("MistralForCausalLM", "MistralModel"),
        "qwen2": ("Qwen2ForCausalLM", "Qwen2Model"),
        "qwen3": ("Qwen3ForCausalLM", "Qwen3Model"),
    },
    prefixes=("model.", ""),
    anchor="embed_tokens.weight",
    sizes=sizes,
    layer=r"layers\.(\d{1,9})\..+",
    unprefixed=("lm_head",),
    buffers=(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
    heads=(r"score\.weight",),
)
