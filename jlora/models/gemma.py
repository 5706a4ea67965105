"""The Gemma family of decoders: Gemma, Gemma 2 and the text models of Gemma 3, as plain Linen modules.

What differs from Llama: norms multiply by `1 + scale`, embeddings by `sqrt(hidden_size)`; Gemma 2 and 3 have norms behind
attention and feed-forward too, and local layers with a window among the global ones; Gemma 2 caps the scores of attention and
the logits; Gemma 3 norms queries and keys, and turns those of local layers by angles of their own. References:
arXiv:2403.08295, arXiv:2408.00118, arXiv:2503.19786.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.models.config import MOST_LAYERS, activation, flag, optional, positive, refuse, required, whole
from jlora.models.decoder import AttentionInputs, LayerInputs, soft_cap
from jlora.models.llama import FAMILY as LLAMA
from jlora.models.llama import SIZES, WIDEST_HEAD, FeedForward, Llama, LlamaConfig, SelfAttention, kinds_of
from jlora.models.rope import RopeConfig, rotation


@dataclasses.dataclass(frozen=True)
class GemmaConfig(LlamaConfig):
    """Shape of a model of the Gemma family; `from_hf` reads it from a Hugging Face `config.json`.

    Args:
        attention_scale: Multiplies the scores of attention; None is `1 / sqrt(head_dim)`.
        attention_cap: Scores are kept within ±this, by `cap * tanh(score / cap)`; None leaves them.
        logit_cap: As `attention_cap`, of the logits.
        outer_norms: Norms behind attention and feed-forward too (Gemma 2 and 3).
        local_rope: Rotary positions of layers that have a window; None where they have those of all (Gemma 3 has two).
    """

    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    outer_norms: bool = False
    local_rope: RopeConfig | None = None

    @property
    def embedding_factor(self) -> float:
        """By what embeddings are multiplied."""
        return self.hidden_size**0.5

    @classmethod
    def from_hf(cls, hf: dict[str, Any], **options: Any) -> "GemmaConfig":
        """Reads a config of model type `gemma`, `gemma2` or `gemma3_text`.

        Args:
            hf: Content of `config.json`.
            **options: `language_head`, `scan_layers`, `remat`, `dtype`, `param_dtype`.

        Raises:
            ValueError: A key is missing, or asks for what is not supported.
        """
        kind = required(hf, "model_type")
        refuse(hf, "use_bidirectional_attention", "the model sees what follows a token")
        biased = flag(hf, "attention_bias")
        later = {} if kind == "gemma" else _later(hf, kind)
        ropes = _two_ropes(hf) if kind == "gemma3_text" else {"rope": RopeConfig.from_hf(hf)}
        return cls(
            **{key: whole(hf, key) for key in SIZES},
            num_hidden_layers=whole(hf, "num_hidden_layers", most=MOST_LAYERS),
            num_attention_heads=whole(hf, "num_attention_heads"),
            num_key_value_heads=whole(hf, "num_key_value_heads"),
            head_dim=whole(hf, "head_dim", most=WIDEST_HEAD),
            rms_norm_eps=positive(hf, "rms_norm_eps"),
            hidden_act=_activation(hf, kind),
            tie_word_embeddings=flag(hf, "tie_word_embeddings", True),
            qkv_bias=biased,
            output_bias=biased,
            **later,
            **ropes,
            **options,
        )


def _later(hf: dict[str, Any], kind: str) -> dict[str, Any]:
    """The fields of Gemma 2 and 3."""
    third, layers = kind == "gemma3_text", whole(hf, "num_hidden_layers", most=MOST_LAYERS)
    every = whole(hf, "sliding_window_pattern", 6) if third else 2
    window = whole(hf, "sliding_window")
    local = kinds_of(hf, layers) or tuple((layer + 1) % every > 0 for layer in range(layers))
    caps = {"attention_cap": "attn_logit_softcapping", "logit_cap": "final_logit_softcapping"}
    found: dict[str, Any] = {name: None if hf.get(key) is None else positive(hf, key) for name, key in caps.items()}
    if third and found["attention_cap"] is not None:
        raise ValueError("config.json: attn_logit_softcapping is not supported with model_type 'gemma3_text'.")
    return found | {
        "attention_scale": positive(hf, "query_pre_attn_scalar") ** -0.5,
        "outer_norms": True,
        "windows": tuple(window if each else None for each in local),
        "qk_norm": third,
    }


def _two_ropes(hf: dict[str, Any]) -> dict[str, RopeConfig]:
    """The rotary positions of global and of local layers: in one table by kind of layer, or under the older names."""
    both = optional(hf, "rope_parameters", {})
    if not isinstance(both, dict):
        raise ValueError("config.json: 'rope_parameters' must be an object.")
    plain = {name: value for name, value in hf.items() if name not in ("rope_parameters", "rope_scaling", "rope_theta")}
    of_all = {
        "rope_theta": positive(hf, "rope_theta", 1e6),
        **optional(both, "full_attention", optional(hf, "rope_scaling", {})),
    }
    local = {"rope_theta": positive(hf, "rope_local_base_freq", 1e4), **optional(both, "sliding_attention", {})}
    return {
        "rope": RopeConfig.from_hf({**plain, "rope_parameters": of_all}),
        "local_rope": RopeConfig.from_hf({**plain, "rope_parameters": local}),
    }


def _activation(hf: dict[str, Any], kind: str) -> str:
    """The first Gemma's configs say gelu, and mean its approximation by tanh, as their authors' code has it."""
    if kind == "gemma":
        name = optional(hf, "hidden_activation", optional(hf, "hidden_act", "gelu_pytorch_tanh"))
        name = "gelu_pytorch_tanh" if name == "gelu" else name
    else:
        name = optional(hf, "hidden_activation", "gelu_pytorch_tanh")
    activation(name)
    return name


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * (1 + scale)`, over the last axis, in float32."""

    config: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes `x` `[..., features]`; dtype of the computation."""
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],), self.config.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.config.rms_norm_eps)
        return (x * (1 + jnp.broadcast_to(scale.astype(jnp.float32), x.shape))).astype(self.config.dtype)


class Attention(SelfAttention):
    """Grouped-query attention; angles, scale and cap as the config has them."""

    def norm(self, name: str) -> nn.Module:
        return RMSNorm(self.config, name=name)

    def angles(self, inputs: AttentionInputs, layer: LayerInputs) -> tuple[jax.Array, jax.Array]:
        if self.config.local_rope is None:
            return inputs.rotary
        of_all, local = inputs.rotary
        return jax.tree.map(lambda a, b: jnp.where(layer.own, b, a), of_all, local)

    def scaling(self) -> dict[str, Any]:
        return {"scale": self.config.attention_scale, "cap": self.config.attention_cap}


class Layer(nn.Module):
    """One decoder layer: attention and feed-forward, each between two norms (the first Gemma: behind one)."""

    config: Any

    @nn.compact
    def __call__(self, x: jax.Array, inputs: AttentionInputs, layer: LayerInputs) -> tuple[jax.Array, LayerInputs]:
        """`x` `[batch, length, hidden]` after the layer, and the layer's cache."""
        c = self.config
        before = RMSNorm(c, name="pre_feedforward_layernorm" if c.outer_norms else "post_attention_layernorm")
        mixed, layer = Attention(c, name="self_attn")(RMSNorm(c, name="input_layernorm")(x), inputs, layer)
        if c.outer_norms:
            mixed = RMSNorm(c, name="post_attention_layernorm")(mixed)
        x = x + mixed
        fed = FeedForward(c, name="mlp")(before(x))
        if c.outer_norms:
            fed = RMSNorm(c, name="post_feedforward_layernorm")(fed)
        return x + fed, layer


class Gemma(Llama):
    """A decoder of the Gemma family: `model.apply({"params": params}, tokens) -> logits`."""

    config: GemmaConfig

    def layer(self) -> Any:
        return Layer

    def embed(self, table: nn.Embed, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        # Rounded as the authors' code does it, which computes in the embedding's dtype.
        return table(tokens) * jnp.asarray(self.config.embedding_factor, self.config.dtype)

    def last_norm(self, x: jax.Array) -> jax.Array:
        return RMSNorm(self.config, name="norm")(x)

    def rotary(self, positions: jax.Array) -> Any:
        c = self.config
        if c.local_rope is None:
            return rotation(c.rope, c.head_dim, positions)
        return tuple(rotation(rope, c.head_dim, positions) for rope in (c.rope, c.local_rope))

    def own(self) -> Any:
        c = self.config
        return None if c.local_rope is None else jnp.array([window is not None for window in c.windows])

    def logits(self, x: jax.Array) -> jax.Array:
        return soft_cap(x, self.config.logit_cap)


FAMILY = dataclasses.replace(
    LLAMA,
    module=Gemma,
    config=GemmaConfig,
    model_types={
        "gemma": ("GemmaForCausalLM", "GemmaModel"),
        "gemma2": ("Gemma2ForCausalLM", "Gemma2Model"),
        "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextModel"),
    },
)
