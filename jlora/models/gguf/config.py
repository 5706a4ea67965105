"""The `config.json` that a GGUF file's metadata stand for; what changes the model and has no place in it is refused."""

from __future__ import annotations

from typing import Any

import numpy as np

from jlora.disk.json_files import shown
from jlora.models.gguf.architectures import ARCHITECTURES, Architecture
from jlora.models.gguf.header import Header

# Keys below the architecture's name that are read elsewhere, or change nothing.
_KNOWN = {
    "vocab_size",
    "rope.dimension_count",
    "attention.key_length",
    "attention.value_length",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "tensor_data_layout",
}
_SPECIAL = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
ROPE_FACTORS = "rope_freqs.weight"
# The settings that Llama 3.1 and 3.2 were trained with: their files hold the factors that follow, and not these.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def architecture(header: Header) -> Architecture:
    """How the file's architecture is read.

    Raises:
        ValueError: it is not known.
    """
    name = header.values.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(
            f"{header.path}: general.architecture {shown(name)} is not supported; supported: {', '.join(ARCHITECTURES)}."
        )
    return ARCHITECTURES[name]


def config(header: Header, rope_factors: np.ndarray | None) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
        header: of the file.
        rope_factors: the tensor `ROPE_FACTORS`, if the file holds it.

    Raises:
        ValueError: for an architecture, or a key of it, that is not known.
    """
    family, values = architecture(header), _own(header)
    for key in values:
        if key not in family.keys and key not in _KNOWN:
            raise ValueError(
                f"{header.path}: {header.values['general.architecture']}.{key} is not supported: {shown(values[key])} may "
                "change what the model computes."
            )
    found = {name: _plain(values[key]) for key, name in family.keys.items() if key in values}
    found |= {
        name: header.values[f"tokenizer.ggml.{key}"]
        for key, name in _SPECIAL.items()
        if f"tokenizer.ggml.{key}" in header.values
    }
    vocabulary = header.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in header.tensors else None
    told = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "vocab_size": vocabulary,
        "head_dim": _head_dim(header, values),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "dtype": "float32",
    }
    if family.scale_of_layers is not None:
        told["query_pre_attn_scalar"] = _scale(family, values, told["head_dim"])
    rope = {**_scaling(header, values), **_factors(header, values, rope_factors)}
    return {**told, **found, **({"rope_scaling": rope} if rope else {}), **family.fixed}


def _own(header: Header) -> dict[str, Any]:
    """The values below the architecture's name."""
    prefix = f"{header.values['general.architecture']}."
    return {key.removeprefix(prefix): value for key, value in header.values.items() if key.startswith(prefix)}


def _plain(value: Any) -> Any:
    """A number as a person would write it: 1e-05 and not its neighbour of 32 bits."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _head_dim(header: Header, values: dict[str, Any]) -> int | None:
    """Width of a head, which the parts of a head that turn, and keys and values, must have."""
    width, heads = (values.get(key) for key in ("embedding_length", "attention.head_count"))
    split = width // heads if type(width) is int and type(heads) is int and heads > 0 else None
    found = values.get("attention.key_length", split)
    for key in ("attention.value_length", "rope.dimension_count"):
        if key in values and values[key] != found:
            raise ValueError(f"{header.path}: {key} is {shown(values[key])}, wanted that of a whole head, {found}.")
    return found


def _scale(family: Architecture, values: dict[str, Any], head_dim: Any) -> Any:
    """What the scores of attention are divided by the root of, which llama.cpp tells from the model's size."""
    if values.get("block_count") != family.scale_of_layers:
        return head_dim
    return values["embedding_length"] // values["attention.head_count"]


def _scaling(header: Header, values: dict[str, Any]) -> dict[str, Any]:
    kind = values.get("rope.scaling.type", "none")
    if kind == "none":
        return {}
    if kind not in ("linear", "yarn"):
        raise ValueError(
            f"{header.path}: rope.scaling.type {shown(kind)} is not supported, wanted none, linear or yarn."
        )
    told = {"rope_type": kind, "factor": _plain(values.get("rope.scaling.factor", 1.0))}
    original = values.get("rope.scaling.original_context_length")
    return told | ({"original_max_position_embeddings": original} if kind == "yarn" and original else {})


def _factors(header: Header, values: dict[str, Any], factors: np.ndarray | None) -> dict[str, Any]:
    """The settings of Llama 3 from which the file's factors follow.

    Raises:
        ValueError: they follow from none.
    """
    if factors is None:
        return {}
    planes = len(factors)
    inverse = values.get("rope.freq_base", 10000.0) ** (-np.arange(planes) / planes)
    turns = _LLAMA3["original_max_position_embeddings"] * inverse / (2 * np.pi)
    for factor in (8.0, 32.0, 16.0, 4.0):
        low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        if np.allclose(factors, 1 / (keep + (1 - keep) / factor), rtol=1e-4):
            return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    raise ValueError(
        f"{header.path}: tensor {ROPE_FACTORS!r} holds factors of positions that are not those of Llama 3."
    )
