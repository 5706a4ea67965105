"""Mixtures of experts in Llama's frame, as plain Linen modules: Mixtral and Qwen3-MoE.

Each token goes through the experts that its router scores highest, and their results are added up by weight. Tokens are sorted
by expert, so that every expert is one product with its rows (`jax.lax.ragged_dot`), and no token is dropped. References:
arXiv:2401.04088, arXiv:2505.09388.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora.models.config import MOST_LAYERS, activation, flag, optional, positive, required, whole
from jlora.models.decoder import dense
from jlora.models.llama import FAMILY as LLAMA
from jlora.models.llama import SIZES, WIDEST_HEAD, Layer, Llama, LlamaConfig
from jlora.models.names import Merged
from jlora.models.rope import RopeConfig


@dataclasses.dataclass(frozen=True)
class MoEConfig(LlamaConfig):
    """Shape of a mixture of experts; `intermediate_size` is that of one expert.

    Args:
        num_experts: Experts of each layer.
        num_experts_per_token: Experts that a token goes through.
        normalized: The weights of a token's experts are divided by their sum.
    """

    num_experts: int = 8
    num_experts_per_token: int = 2
    normalized: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.num_experts_per_token > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_token} is more than the {self.num_experts} experts."
            )

    @classmethod
    def _shared(cls, hf: dict[str, Any], **own: Any) -> Any:
        heads = whole(hf, "num_attention_heads")
        hidden_act = optional(hf, "hidden_act", "silu")
        activation(hidden_act)
        sizes = {key: whole(hf, key) for key in SIZES}
        return cls(
            **{
                **sizes,
                "num_hidden_layers": whole(hf, "num_hidden_layers", most=MOST_LAYERS),
                "num_attention_heads": heads,
                "num_key_value_heads": whole(hf, "num_key_value_heads"),
                "head_dim": whole(hf, "head_dim", sizes["hidden_size"] // heads, most=WIDEST_HEAD),
                "rms_norm_eps": positive(hf, "rms_norm_eps"),
                "rope": RopeConfig.from_hf(hf),
                "hidden_act": hidden_act,
                "tie_word_embeddings": flag(hf, "tie_word_embeddings"),
                "num_experts_per_token": whole(hf, "num_experts_per_tok"),
                **own,
            }
        )


class MixtralConfig(MoEConfig):
    """Shape of a Mixtral."""

    @classmethod
    def from_hf(cls, hf: dict[str, Any], **options: Any) -> "MixtralConfig":
        """Reads a config of model type `mixtral`.

        Args:
            hf: Content of `config.json`.
            **options: `language_head`, `scan_layers`, `remat`, `dtype`, `param_dtype`.

        Raises:
            ValueError: A key is missing, or asks for what is not supported.
        """
        layers = whole(hf, "num_hidden_layers", most=MOST_LAYERS)
        window = None if hf.get("sliding_window") is None else whole(hf, "sliding_window")
        windows = () if window is None else (window,) * layers
        return cls._shared(hf, num_experts=whole(hf, "num_local_experts"), windows=windows, **options)


class Qwen3MoeConfig(MoEConfig):
    """Shape of a Qwen3-MoE."""

    @classmethod
    def from_hf(cls, hf: dict[str, Any], **options: Any) -> "Qwen3MoeConfig":
        """Reads a config of model type `qwen3_moe`.

        Args:
            hf: Content of `config.json`.
            **options: `language_head`, `scan_layers`, `remat`, `dtype`, `param_dtype`.

        Raises:
            ValueError: A key is missing, or asks for what is not supported, such as layers without experts.
        """
        for key, usual in (("decoder_sparse_step", 1), ("mlp_only_layers", [])):
            if optional(hf, key, usual) != usual:
                raise ValueError(f"config.json: {key} {hf[key]!r:.80} is not supported: every layer must have experts.")
        layers = whole(hf, "num_hidden_layers", most=MOST_LAYERS)
        windowed = flag(hf, "use_sliding_window") and hf.get("sliding_window") is not None
        biased = flag(hf, "attention_bias")
        required(hf, "head_dim")
        return cls._shared(
            hf,
            intermediate_size=whole(hf, "moe_intermediate_size"),
            num_experts=whole(hf, "num_local_experts" if hf.get("num_experts") is None else "num_experts"),
            normalized=flag(hf, "norm_topk_prob"),
            windows=(whole(hf, "sliding_window"),) * layers if windowed else (),
            qk_norm=True,
            qkv_bias=biased,
            output_bias=biased,
            **options,
        )


class Experts(nn.Module):
    """`down(act(gate(x)) * up(x))` by the expert of each row; gate and up are one product."""

    config: Any

    @nn.compact
    def __call__(self, x: jax.Array, counts: jax.Array) -> jax.Array:
        """Transforms rows.

        Args:
            x: `[rows, hidden]`, sorted by expert.
            counts: int32 `[experts]`: how many rows are each expert's.
        """
        c = self.config

        def weight(name: str, inputs: int, outputs: int) -> jax.Array:
            start = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=2, batch_axis=(0,))
            return self.param(name, start, (c.num_experts, inputs, outputs), c.param_dtype).astype(c.dtype)

        gate_up = jax.lax.ragged_dot(x, weight("gate_up_proj", c.hidden_size, 2 * c.intermediate_size), counts)
        gate, up = jnp.split(gate_up, 2, axis=-1)
        middle = activation(c.hidden_act)(gate) * up
        return jax.lax.ragged_dot(middle, weight("down_proj", c.intermediate_size, c.hidden_size), counts)


class FeedForward(nn.Module):
    """A token's experts, by the weights that its router gives them."""

    config: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Transforms every position of `x` `[batch, length, hidden]`."""
        c, rows = self.config, x.reshape(-1, x.shape[-1])
        chance = jax.nn.softmax(dense(c, c.num_experts, False, "gate")(rows).astype(jnp.float32), axis=-1)
        weight, chosen = jax.lax.top_k(chance, c.num_experts_per_token)
        weight = weight / weight.sum(-1, keepdims=True) if c.normalized else weight
        # Each token once for each of its experts, in the order of experts.
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        token = order // c.num_experts_per_token
        counts = jnp.bincount(chosen.reshape(-1), length=c.num_experts).astype(jnp.int32)
        mixed = Experts(c, name="experts")(rows[token], counts)
        weighted = mixed * weight.reshape(-1)[order][:, None].astype(mixed.dtype)
        return jnp.zeros_like(rows).at[token].add(weighted.astype(rows.dtype)).reshape(x.shape)


class MoELayer(Layer):
    """One decoder layer, whose feed-forward part is experts."""

    def feed_forward(self, name: str) -> nn.Module:
        return FeedForward(self.config, name=name)


class Mixtral(Llama):
    """A Mixtral: `model.apply({"params": params}, tokens) -> logits`."""

    config: Any

    def layer(self) -> Any:
        return MoELayer


class Qwen3Moe(Mixtral):
    """A Qwen3-MoE: `model.apply({"params": params}, tokens) -> logits`."""


def _sizes(c: Any, gate: str, up: str) -> dict[str, tuple[int, ...]]:
    return {
        "embed_tokens.weight": (c.vocab_size, c.hidden_size),
        "layers.0.self_attn.q_proj.weight": (c.num_attention_heads * c.head_dim, c.hidden_size),
        f"layers.0.{gate}": (c.num_experts, c.hidden_size),
        f"layers.0.{up}": (c.intermediate_size, c.hidden_size),
    }


MIXTRAL = dataclasses.replace(
    LLAMA,
    module=Mixtral,
    config=MixtralConfig,
    model_types={"mixtral": ("MixtralForCausalLM", "MixtralModel")},
    sizes=lambda c: _sizes(c, "block_sparse_moe.gate.weight", "block_sparse_moe.experts.0.w1.weight"),
    merged={
        "gate_up_proj": Merged(("{}.w1.weight", "{}.w3.weight"), "num_experts"),
        "down_proj": Merged(("{}.w2.weight",), "num_experts"),
    },
    bare=("mlp.gate",),
    renamed={"mlp": "block_sparse_moe"},
)
QWEN3_MOE = dataclasses.replace(
    LLAMA,
    module=Qwen3Moe,
    config=Qwen3MoeConfig,
    model_types={"qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeModel")},
    sizes=lambda c: _sizes(c, "mlp.gate.weight", "mlp.experts.0.gate_proj.weight"),
    merged={
        "gate_up_proj": Merged(("{}.gate_proj.weight", "{}.up_proj.weight"), "num_experts"),
        "down_proj": Merged(("{}.down_proj.weight",), "num_experts"),
    },
    bare=("mlp.gate",),
)
