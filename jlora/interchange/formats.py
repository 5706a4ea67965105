"""The kinds of adapter that both PEFT and jlora have."""

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
        own_biases: the value of its setting `bias` for training the biases of adapted modules alone; "" where it has none.
        holds: whether one folder of this type can hold all these forms exactly.
        write: adds adapters to a folder and returns the names of the adapted modules; its last argument says whether the folder
            is for a server, which reads plain LoRA only.
        find: finds the tensors of each adapter in a folder and checks their shapes, without reading them.
        read: reads the adapters, one for each leaf.
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
