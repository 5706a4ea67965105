"""How each architecture's GGUF files differ from Hugging Face checkpoints: names of keys and tensors, and a few values.

A new architecture is one entry of `ARCHITECTURES`. Source: the converter of llama.cpp (convert_hf_to_gguf.py) and the names
of the library `gguf`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

# Key below the architecture's name -> key of config.json.
_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
# Start of a tensor's name -> that of the checkpoint; `{}` is the layer.
_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One architecture.

    Args:
        model_type: of `config.json`.
        class_name: of transformers, for `architectures`.
        keys: which key of `config.json` a key below the architecture's name is.
        tensors: which tensor of a checkpoint a tensor is, without its last word.
        fixed: what `config.json` holds beside.
        scale_of_layers: number of layers of the sizes whose scores are divided by `sqrt(width / heads)`, and not by that of a
            head's width, which files don't say.
        turned: the rows of q and k lie in another order: the two numbers of a rotary plane beside one another.
        raised: 1 was added to the scale of every norm.
    """

    model_type: str
    class_name: str
    keys: Mapping[str, str] = dataclasses.field(default_factory=lambda: _SIZES)
    tensors: Mapping[str, str] = dataclasses.field(default_factory=lambda: _TENSORS)
    fixed: Mapping[str, object] = dataclasses.field(default_factory=dict)
    scale_of_layers: int | None = None
    turned: bool = False
    raised: bool = False

    def tensor(self, name: str) -> str | None:
        """The checkpoint's name of a tensor, or None."""
        stem, _, end = name.rpartition(".")
        layer = re.match(r"blk\.(\d{1,9})\.", stem)
        found = self.tensors.get(re.sub(r"^blk\.\d{1,9}\.", "blk.{}.", stem))
        if found is None or end not in ("weight", "bias"):
            return None
        return f"{found.format(*layer.groups() if layer else ())}.{end}"


# Gemma's files hold 1 + scale, and Gemma 2 and 3 have norms behind attention and feed-forward too.
_BETWEEN = {
    **_TENSORS,
    "blk.{}.post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    "blk.{}.post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}
_GEMMA2 = {
    **_SIZES,
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GEMMA3 = {
    **_SIZES,
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "rope.freq_base_swa": "rope_local_base_freq",
    "final_logit_softcapping": "final_logit_softcapping",
}

ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", turned=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _GEMMA2, _BETWEEN, scale_of_layers=46, raised=True),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", _GEMMA3, _BETWEEN, scale_of_layers=62, raised=True),
}
