"""Reading a Hugging Face `config.json`."""

import json
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "tanh": jnp.tanh,
}


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """The content of `directory/config.json`.

    Raises:
        FileNotFoundError: The directory or the file is missing.
        ValueError: The file is not a JSON object, or asks for quantized weights.
    """
    path = os.path.join(directory, "config.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; a model is a Hugging Face directory with a config.json.")
    return read_json(path, quantized_is_error=True)


def read_json(path: str, quantized_is_error: bool = False) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: It is not JSON, not an object, or holds `quantization_config` where that is an error.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: wanted a JSON object, got a {type(content).__name__}.")
    if quantized_is_error and content.get("quantization_config"):
        raise ValueError(
            f"{path}: the checkpoint is quantized (quantization_config), wanted plain weights; dequantize it first."
        )
    return content


def required(settings: dict[str, Any], key: str, where: str = "") -> Any:
    """The value of a key that must be there.

    Raises:
        ValueError: The key is missing or null.
    """
    if settings.get(key) is None:
        place = f" in its {where} settings" if where else ""
        raise ValueError(f"config.json: key {key!r} is missing{place}; the model can't be built without it.")
    return settings[key]


def optional(settings: dict[str, Any], key: str, default: Any) -> Any:
    """The value of a key, or the default where it is missing or null."""
    value = settings.get(key)
    return default if value is None else value


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation of a `hidden_act` name.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in ACTIVATIONS:
        raise ValueError(
            f"config.json: hidden_act {name!r} is not supported; supported: {', '.join(sorted(ACTIVATIONS))}."
        )
    return ACTIVATIONS[name]
