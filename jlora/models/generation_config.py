"""How a model is to be sampled, by the `generation_config.json` of its directory."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

from jlora.disk.json_files import shown
from jlora.models import files

FILE = "generation_config.json"
# What changes the texts, and is not done here, with the value that changes nothing.
_UNKNOWN = {
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_p": None, "typical_p": 1.0, "num_beams": 1,
    "penalty_alpha": None, "encoder_repetition_penalty": 1.0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How a model is to be sampled.

    Attributes:
        ends: ids of the tokens that end a text.
        stop: texts that end it too.
        temperature: None where the file says nothing of drawing; 0 where it says not to draw.
        top_k: None for all tokens.
        top_p: None for all tokens.
        unknown: settings of the file that are not followed, as `name=value`.
    """

    ends: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    unknown: tuple[str, ...] = ()


def read_generation_config(directory: str | os.PathLike) -> GenerationConfig:
    """The directory's `generation_config.json`, as transformers understands it; nothing where there is none.

    Drawing is asked for by `do_sample`; then what the file leaves out is a temperature of 1 and the 50 likeliest tokens.

    Raises:
        ValueError: a value has no meaning.
    """
    source = files.located(directory)
    if not files.has_file(source, FILE):
        return GenerationConfig()
    path = files.place(source, FILE)
    given = {name: value for name, value in files.read_json(source, FILE).items() if value is not None}
    unknown = (f"{name}={given[name]}" for name, usual in _UNKNOWN.items() if given.get(name, usual) != usual)
    found: dict[str, Any] = {"ends": _ends(path, given), "stop": _stop(path, given), "unknown": tuple(unknown)}
    if "do_sample" not in given:
        return GenerationConfig(**found)
    if given["do_sample"] is not True:
        return GenerationConfig(**found, temperature=0.0)
    # As `Sampling` takes it: a temperature that is refused there would be refused at every call.
    temperature = _number(
        path,
        given,
        "temperature",
        1.0,
        lambda value: 2.0**-100 <= value < 2.0**127,
        "a number from 2^-100 and below 2^127",
    )
    top_p = _number(path, given, "top_p", 1.0, lambda value: 0 < value <= 1, "above 0 and at most 1")
    top_k = _number(
        path, given, "top_k", 50, lambda value: value >= 0 and value == int(value), "a whole number, 0 or more"
    )
    return GenerationConfig(
        **found, temperature=temperature, top_k=int(top_k) or None, top_p=None if top_p == 1 else top_p
    )


def _number(path: str, given: dict[str, Any], name: str, default: float, holds: Any, wanted: str) -> float:
    value = given.get(name, default)
    if type(value) not in (int, float) or not math.isfinite(value) or not holds(value):
        raise ValueError(f"{path}: {name} must be {wanted}, got {shown(value)}.")
    return value


def _ends(path: str, given: dict[str, Any]) -> tuple[int, ...]:
    value = given.get("eos_token_id", [])
    ends = value if isinstance(value, list) else [value]
    if not all(type(each) is int and 0 <= each < 2**31 for each in ends):
        raise ValueError(f"{path}: eos_token_id must be the id of a token, or a list of them, got {shown(value)}.")
    return tuple(ends)


def _stop(path: str, given: dict[str, Any]) -> tuple[str, ...]:
    value = given.get("stop_strings", [])
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str) and each for each in texts):
        raise ValueError(f"{path}: stop_strings must be a text, or a list of them, got {shown(value)}.")
    return tuple(texts)
