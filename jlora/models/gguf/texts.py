"""The small files of a Hugging Face directory that a GGUF file stands for, as texts by name."""

from __future__ import annotations

import functools
import json
import os
import re

from jlora.disk.json_files import ILL_FORMED
from jlora.models.gguf.checkpoint import raw
from jlora.models.gguf.config import ROPE_FACTORS, config
from jlora.models.gguf.header import Header, read_header
from jlora.models.gguf.tokenizer import tokenizer_files

_TEMPLATE = "tokenizer.chat_template"


def texts(path: str | os.PathLike) -> dict[str, str]:
    """`config.json`, `tokenizer.json`, `tokenizer_config.json`, and chat templates where the file has them.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: as `read_header`; and for what the metadata hold that is not known.
    """
    return dict(_made(read_header(path)))


@functools.lru_cache(maxsize=4)
def _made(header: Header) -> dict[str, str]:
    try:
        place = header.tensors.get(ROPE_FACTORS)
        factors = None if place is None else raw(header, place, ROPE_FACTORS)
        contents = {"config.json": config(header, factors), **tokenizer_files(header)}
    except ILL_FORMED as error:
        if str(error).startswith(header.path):
            raise
        raise ValueError(f"{header.path}: its metadata are not as llama.cpp writes them ({error}).") from error
    found = {name: json.dumps(content, indent=2, ensure_ascii=False) + "\n" for name, content in contents.items()}
    return found | _templates(header)


def _templates(header: Header) -> dict[str, str]:
    """The chat template, and further ones by name, where transformers keeps them."""
    found = {}
    for key, text in header.values.items():
        name = re.fullmatch(rf"{re.escape(_TEMPLATE)}(?:\.([\w-]+))?", key)
        if name and isinstance(text, str):
            found[f"additional_chat_templates/{name[1]}.jinja" if name[1] else "chat_template.jinja"] = text
    return found
