"""Reading a Hugging Face `config.json`: every value is checked before it is used."""

import contextlib
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jlora.disk.json_files import shown
from jlora.models import files
from jlora.models.gguf.header import is_gguf

# Sizes are axes of arrays, which JAX counts in 32 bits; no model has more layers than this by far.
LARGEST_SIZE, MOST_LAYERS = 2**31 - 1, 10_000
# One slash after "https:" is enough: pathlib makes one of two.
_HUB_ID = re.compile(r"(https?://?(www\.)?huggingface\.co/)?(?P<id>\w[\w.-]*(/\w[\w.-]*)?)/?")

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "tanh": jnp.tanh,
}


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """The content of `directory/config.json`, or what the metadata of a GGUF file say in its place.

    Raises:
        FileNotFoundError: The directory or the file is missing; a name of the Hugging Face Hub says how to download it.
        ModuleNotFoundError: It is a GGUF file, and the library `gguf` is missing.
        ValueError: The file is not a JSON object; or a GGUF file is damaged, or holds what is not supported.
    """
    if not is_gguf(directory) and not files.has_file(directory, "config.json"):
        path = os.path.join(directory, "config.json")
        raise FileNotFoundError(f"{path}: no such file; {_instead(os.fspath(directory))}")
    return files.read_json(directory, "config.json")


def _instead(directory: str) -> str:
    """What to do about a directory that holds no `config.json`."""
    if os.path.isfile(directory):
        return (
            f"{directory} is a file, wanted the directory of a Hugging Face model, with config.json and safetensors, or a file "
            "whose name ends in .gguf."
        )
    if os.path.isfile(os.path.join(directory, "adapter_config.json")):
        return "the directory holds an adapter of PEFT, not a model: jlora import makes a run of it."
    found = sorted(name for name in os.listdir(directory) if is_gguf(name)) if os.path.isdir(directory) else []
    if found:
        return f"the directory holds GGUF files: give one of them, such as {os.path.join(directory, found[0])}."
    hub = None if os.path.exists(directory) else _HUB_ID.fullmatch(directory)
    if hub is None:
        return "a model is a Hugging Face directory with a config.json."
    name, place = hub["id"], hub["id"].rpartition("/")[2]
    return (
        f"jlora reads directories and downloads nothing: for a model of the Hugging Face Hub run "
        f"`hf download {name} --local-dir {place}` (or huggingface_hub.snapshot_download({name!r}, "
        f"local_dir={place!r})) and give ./{place}."
    )


@contextlib.contextmanager
def of_file(directory: str | os.PathLike) -> Iterator[None]:
    """A context in which errors name the whole path of `config.json`, which the readers below don't know."""
    try:
        yield
    except ValueError as error:
        path = files.place(directory, "config.json")
        raise ValueError(f"{path}: {str(error).removeprefix('config.json: ')}") from error


def required(settings: dict[str, Any], key: str, where: str = "") -> Any:
    """The value of a key that must be there.

    Raises:
        ValueError: The key is missing or null.
    """
    if settings.get(key) is None:
        raise ValueError(f"config.json: key {key!r} is missing{_place(where)}; the model can't be built without it.")
    return settings[key]


def optional(settings: dict[str, Any], key: str, default: Any) -> Any:
    """The value of a key, or the default where it is missing or null."""
    value = settings.get(key)
    return default if value is None else value


def whole(
    settings: dict[str, Any], key: str, default: int | None = None, least: int = 1, most: int = LARGEST_SIZE, where=""
) -> int:
    """The whole number of a key, or the default where it is missing or null.

    Raises:
        ValueError: It is not a whole number from `least` to `most`, or is missing without a default.
    """
    value = required(settings, key, where) if default is None else optional(settings, key, default)
    if type(value) is not int or not least <= value <= most:
        raise ValueError(
            f"config.json: {key!r}{_place(where)} must be a whole number from {least} to {most}, got {shown(value)}."
        )
    return value


def positive(
    settings: dict[str, Any], key: str, default: float | None = None, where: str = "", above: float = 0.0
) -> float:
    """The number of a key, or the default where it is missing or null.

    Raises:
        ValueError: It is no finite number larger than `above`, or is missing without a default.
    """
    value = required(settings, key, where) if default is None else optional(settings, key, default)
    if type(value) not in (int, float) or not above < value <= sys.float_info.max:
        raise ValueError(f"config.json: {key!r}{_place(where)} must be a number above {above:g}, got {shown(value)}.")
    return float(value)


def flag(settings: dict[str, Any], key: str, default: bool = False, where: str = "") -> bool:
    """Whether a key is true, or the default where it is missing or null.

    Raises:
        ValueError: It is neither true nor false.
    """
    value = optional(settings, key, default)
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {key!r}{_place(where)} must be true or false, got {shown(value)}.")
    return value


def refuse(settings: dict[str, Any], key: str, why: str, wanted: Any = False) -> None:
    """Refuses a key that changes what the model computes, in a way that is not built.

    Args:
        settings: Content of the config.
        key: The key.
        why: What it would mean.
        wanted: The value that changes nothing, as a missing or null one.

    Raises:
        ValueError: The key has another value.
    """
    if (value := settings.get(key)) is not None and value != wanted:
        raise ValueError(f"config.json: {key!r} is {shown(value)}, which is not supported ({why}).")


def _place(where: str) -> str:
    return f" in its {where} settings" if where else ""


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation of a `hidden_act` name.

    Raises:
        ValueError: The name is unknown.
    """
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(
            f"config.json: hidden_act {reprlib.repr(name)} is not supported; supported: {', '.join(sorted(ACTIVATIONS))}."
        )
    return ACTIVATIONS[name]
