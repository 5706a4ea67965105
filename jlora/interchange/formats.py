"""The kinds of adapter that PEFT has and jlora too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jlora.interchange import adalora, lora, read_lora, shira, vera
from jlora.interchange.forms import Form
from jlora.interchange.index import Read
from jlora.interchange.names import Slot
from jlora.interchange.written import Written

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
    holds: Callable[[list[tuple[Form | None, list[Slot]]]], bool]
    write: Callable[[Written, Adapters, set[str], bool], set[str]]
    find: Callable[..., Any]
    read: Callable[..., list[Read]]


FORMATS: dict[str, Format] = {
    "LORA": Format("LORA", "lora", "lora_only", lambda adapters: True, lora.write, read_lora.find, read_lora.read),
    "ADALORA": Format("ADALORA", "adalora", "lora_only", adalora.holds, adalora.write, adalora.find, adalora.read),
    "VERA": Format("VERA", "vera", "vera_only", vera.holds, vera.write, vera.find, vera.read),
    "SHIRA": Format("SHIRA", "shira", "", shira.holds, shira.write, shira.find, shira.read),
}
