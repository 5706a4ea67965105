"""The kinds of adapter that PEFT has and jlora too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jlora.interchange import lora, read_lora
from jlora.interchange.forms import Form
from jlora.interchange.names import Slot
from jlora.interchange.written import Written
from jlora.method import Site, Start

Adapters = list[tuple[Form, list[Slot]]]


@dataclass(frozen=True)
class Format:
    """One of PEFT's `peft_type`s.

    Attributes:
        peft_type: its name.
        kind: the kind of `Form` that it holds.
        own_biases: what it calls training the biases of adapted modules alone.
        holds: whether it can hold these forms exactly, all together.
        write: adds adapters to a folder (plainly, if it is to be served) and returns the adapted modules.
        find: which tensors of a folder are which adapter's, with their shapes checked; nothing is read.
        read: the adapters by leaf.
    """

    peft_type: str
    kind: str
    own_biases: str
    holds: Callable[[list[Form | None]], bool]
    write: Callable[[Written, Adapters, set[str], bool], set[str]]
    find: Callable[..., Any]
    read: Callable[..., list[tuple[Site, Start]]]


FORMATS: dict[str, Format] = {
    "LORA": Format("LORA", "lora", "lora_only", lambda forms: True, lora.write, read_lora.find, read_lora.read),
}
