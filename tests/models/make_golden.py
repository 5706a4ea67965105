"""Makes `golden/`: small random models of every architecture, and what transformers computes with them.

    python tests/models/make_golden.py [NAME ...]

Needs PyTorch and transformers (made with torch 2.13, transformers 5.23). Each folder is a Hugging Face directory
(`config.json`, `model.safetensors` in float32) with `expected.npz`: token ids, attention mask, and the logits or hidden
states of the tokens that the mask keeps; or images, with their channels last, and their logits or hidden states.
"""

import json
import pathlib
import shutil
import sys

import numpy as np
import torch
import transformers

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
VOCAB, LENGTH = 60, 24

DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}


def rope(kind: str, **settings: float) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
YARN_TUNED = rope(
    "yarn",
    factor=4.0,
    original_max_position_embeddings=16,
    beta_fast=8.0,
    beta_slow=2.0,
    mscale=0.7,
    mscale_all_dim=0.4,
    truncate=False,
)
BIASES = {"attention_bias": True, "mlp_bias": True}
LATE_WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}

GEMMA = {**DECODER, "head_dim": 6, "pad_token_id": 0, "tie_word_embeddings": True, "query_pre_attn_scalar": 9}
GEMMA3_ROPE = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
}
LOCAL_GLOBAL = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.2],
        "long_factor": [1.5, 2.0, 3.0],
        "original_max_position_embeddings": 16,
    }
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_positions": 64,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True}
IMAGES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": [7, 12],
    "patch_size": [2, 4],
    "num_channels": 3,
    "layer_norm_eps": 1e-5,
}

# Name of the folder -> class of the config, class of the model, settings.
CASES = {
    "llama_llama3_biases": ("LlamaConfig", "LlamaForCausalLM", {**DECODER, **BIASES, **LLAMA3, "head_dim": 6}),
    "llama_linear_tied": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {**DECODER, **rope("linear", factor=2.0), "tie_word_embeddings": True},
    ),
    "llama_dynamic": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {**DECODER, **rope("dynamic", factor=2.0), "max_position_embeddings": 16},
    ),
    "llama_yarn": ("LlamaConfig", "LlamaForCausalLM", {**DECODER, **YARN}),
    "llama_yarn_tuned": ("LlamaConfig", "LlamaForCausalLM", {**DECODER, **YARN_TUNED}),
    "llama_headless": ("LlamaConfig", "LlamaModel", DECODER),
    "mistral_window": ("MistralConfig", "MistralForCausalLM", {**DECODER, "head_dim": 4, "sliding_window": 7}),
    "mistral_full": ("MistralConfig", "MistralForCausalLM", {**DECODER, "head_dim": 4, "sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", DECODER),
    "qwen2_window_tied": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {**DECODER, **LATE_WINDOW, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**DECODER, "head_dim": 8}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**GEMMA, "hidden_act": "gelu"}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**GEMMA, "sliding_window": 7, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**GEMMA, "sliding_window": 7, **GEMMA3_ROPE, **LOCAL_GLOBAL}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**DECODER, "pad_token_id": 0, "sliding_window": 7}),
    "phi3_longrope": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {**DECODER, "hidden_size": 32, "pad_token_id": 0, "original_max_position_embeddings": 16, **LONGROPE},
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "gpt2_scaled": ("GPT2Config", "GPT2LMHeadModel", {**GPT2, "n_inner": 20, "scale_attn_by_inverse_layer_idx": True}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**DECODER, **EXPERTS, "head_dim": 8}),
    "bert": ("BertConfig", "BertModel", {**ENCODER, "type_vocab_size": 2}),
    "bert_gelu_new": ("BertConfig", "BertModel", {**ENCODER, "type_vocab_size": 2, "hidden_act": "gelu_new"}),
    "bert_masked_lm": ("BertConfig", "BertForMaskedLM", {**ENCODER, "type_vocab_size": 2, "hidden_act": "relu"}),
    "roberta": (
        "RobertaConfig",
        "RobertaModel",
        {**ENCODER, "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5},
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", {**IMAGES, "num_labels": 5}),
    "vit_pooled": (
        "ViTConfig",
        "ViTModel",
        {
            **IMAGES,
            "image_size": 8,
            "patch_size": 4,
            "num_channels": 1,
            "hidden_act": "gelu_new",
            "qkv_bias": False,
            "pooler_output_size": 6,
            "pooler_act": "relu",
        },
    ),
}


def randomize(model: torch.nn.Module) -> None:
    """Weights large enough for every part to matter: transformers starts biases at 0 and norms at 1."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        norm = "norm" in name.lower() or ".ln_" in name
        value.data = 1 + 0.3 * noise if norm and name.endswith("weight") else 0.3 * noise


def inputs(pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, mask (the second row is shorter) and token types."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCAB, (2, LENGTH), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, LENGTH - 5 :] = 0
    types = (torch.arange(LENGTH) >= LENGTH // 2).long().expand(2, LENGTH)
    return torch.where(mask == 1, tokens, pad_id), mask, types


def run(model: torch.nn.Module, config: transformers.PretrainedConfig) -> dict[str, np.ndarray]:
    """What the model computes, under the names that the test reads."""
    if config.model_type == "vit":
        return run_on_images(model)
    tokens, mask, types = inputs(config.pad_token_id or 0)
    call = {"input_ids": tokens, "attention_mask": mask}
    encoder = config.model_type in ("bert", "roberta")
    if encoder:
        call["token_type_ids"] = types % config.type_vocab_size
    with torch.no_grad():
        output = (model.base_model if encoder else model)(**call)
    result = {"tokens": tokens, "mask": mask}
    if encoder:
        result["token_types"] = call["token_type_ids"]
        if output.pooler_output is not None:
            result["pooled"] = output.pooler_output
    result["output"] = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return {name: value.numpy() for name, value in result.items()}


def run_on_images(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """What a model computes of two images of noise."""
    patches = model.base_model.embeddings.patch_embeddings
    shape = (2, patches.num_channels, *patches.image_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model(images)
        hidden = model.base_model(images).last_hidden_state
    result = {"images": images.permute(0, 2, 3, 1), "hidden": hidden}
    if hasattr(output, "logits"):
        result["output"] = output.logits
    else:
        result |= {"output": hidden, "pooled": output.pooler_output}
    return {name: value.numpy() for name, value in result.items()}


def make(name: str, config_class: str, model_class: str, settings: dict) -> None:
    config = getattr(transformers, config_class)(**settings, attn_implementation="eager")
    model = getattr(transformers, model_class)(config).eval()
    randomize(model)
    model.tie_weights()
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(folder / "expected.npz", **run(model, config))
    print(
        name,
        json.loads((folder / "config.json").read_text())["architectures"],
        sum(f.stat().st_size for f in folder.iterdir()),
    )


if __name__ == "__main__":
    wanted = sys.argv[1:] or list(CASES)
    for case, (config_class, model_class, settings) in CASES.items():
        if case in wanted:
            make(case, config_class, model_class, settings)
