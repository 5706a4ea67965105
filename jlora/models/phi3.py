"""Phi-3 decoders (Phi-3, Phi-3.5 and Phi-4 mini), as plain Linen modules.

What differs from Llama: queries, keys and values are the columns of one product, and so are gate and up; a part of each head
may turn, by LongRoPE. Reference: arXiv:2404.14219.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.models.config import MOST_LAYERS, activation, flag, optional, positive, whole
from jlora.models.decoder import dense
from jlora.models.llama import FAMILY as LLAMA
from jlora.models.llama import SIZES, Layer, Llama, LlamaConfig, SelfAttention
from jlora.models.rope import RopeConfig


@dataclasses.dataclass(frozen=True)
class Phi3Config(LlamaConfig):
    """Shape of a Phi-3 model; `from_hf` reads it from a Hugging Face `config.json`. Fields as of `LlamaConfig`."""

    def __post_init__(self):
        super().__post_init__()
        if (turned := self.rope.turned(self.head_dim)) % 2 or turned > self.head_dim:
            raise ValueError(f"{turned} of {self.head_dim} numbers of a head turn, wanted an even number of them.")
        for factors in (self.rope.short_factors, self.rope.long_factors):
            if factors and len(factors) != turned // 2:
                raise ValueError(f"longrope has {len(factors)} factors, wanted one for each of {turned // 2} planes.")

    @classmethod
    def from_hf(cls, hf: dict[str, Any], **options: Any) -> "Phi3Config":
        """Reads a config of model type `phi3`.

        Args:
            hf: Content of `config.json`.
            **options: `language_head`, `scan_layers`, `remat`, `dtype`, `param_dtype`.

        Raises:
            ValueError: A key is missing, or asks for what is not supported.
        """
        heads, layers = whole(hf, "num_attention_heads"), whole(hf, "num_hidden_layers", most=MOST_LAYERS)
        hidden_act = optional(hf, "hidden_act", "silu")
        activation(hidden_act)
        sizes = {key: whole(hf, key) for key in SIZES}
        window = None if hf.get("sliding_window") is None else whole(hf, "sliding_window")
        return cls(
            **sizes,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=whole(hf, "num_key_value_heads", heads),
            head_dim=sizes["hidden_size"] // heads,
            rms_norm_eps=positive(hf, "rms_norm_eps"),
            rope=RopeConfig.from_hf(_with_longrope(hf), partial=True),
            hidden_act=hidden_act,
            tie_word_embeddings=flag(hf, "tie_word_embeddings"),
            windows=() if window is None else (window,) * layers,
            **options,
        )


def _with_longrope(hf: dict[str, Any]) -> dict[str, Any]:
    """The config with today's name of its rope, which older ones call su or yarn."""
    key = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    rope = hf.get(key)
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) not in ("su", "yarn"):
        return hf
    return {**hf, key: {**rope, "rope_type": "longrope"}}


class Attention(SelfAttention):
    """Grouped-query attention whose queries, keys and values are one product."""

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        c = self.config
        counts = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
        every = dense(c, sum(counts) * c.head_dim, False, "qkv_proj")(x)
        every = every.reshape(*x.shape[:2], sum(counts), c.head_dim)
        query, key, value = jnp.split(every, [counts[0], counts[0] + counts[1]], axis=2)
        return query, key, value


class FeedForward(nn.Module):
    """`down(act(gate(x)) * up(x))`, with gate and up as one product."""

    config: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Transforms every position of `x` `[batch, length, hidden]`."""
        c = self.config
        gate, up = jnp.split(dense(c, 2 * c.intermediate_size, False, "gate_up_proj")(x), 2, axis=-1)
        return dense(c, c.hidden_size, False, "down_proj")(activation(c.hidden_act)(gate) * up)


class Phi3Layer(Layer):
    """One decoder layer: attention and feed-forward, each behind a norm and added to the stream."""

    def attention(self, name: str) -> nn.Module:
        return Attention(self.config, name=name)

    def feed_forward(self, name: str) -> nn.Module:
        return FeedForward(self.config, name=name)


class Phi3(Llama):
    """A Phi-3 decoder: `model.apply({"params": params}, tokens) -> logits`."""

    config: Phi3Config

    def layer(self) -> Any:
        return Phi3Layer


def sizes(c: Any) -> dict[str, tuple[int, ...]]:
    """Shapes that the config gives to tensors of every checkpoint."""
    every = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    return {
        "embed_tokens.weight": (c.vocab_size, c.hidden_size),
        "layers.0.self_attn.qkv_proj.weight": (every, c.hidden_size),
        "layers.0.mlp.gate_up_proj.weight": (2 * c.intermediate_size, c.hidden_size),
    }


FAMILY = dataclasses.replace(
    LLAMA, module=Phi3, config=Phi3Config, model_types={"phi3": ("Phi3ForCausalLM", "Phi3Model")}, sizes=sizes
)
