"""The kinds of adapter that both PEFT and jlora have: some written by hand, the others as their methods state them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from jlora.core.protocol.method import Method, stated_kind
from jlora.core.protocol.peft import PeftKind
from jlora.disk import catalog
from jlora.interchange.files import parse
from jlora.interchange.files.written import Written
from jlora.interchange.kinds import adalora, leaf_table, lora, read_lora, read_table, shira, table, vera
from jlora.interchange.leaves.forms import Form
from jlora.interchange.leaves.index import Read
from jlora.interchange.leaves.names import Slot
from jlora.interchange.trained.wholes import Parameters

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
        ends: the ends of keys of a module's tensors, and the role of each.
        shared: keys of tensors that all modules share, and the role of each.
        settings: names of the settings that it has beside those of all, where they are stated; None for a format by hand.
    """

    peft_type: str
    kind: str
    own_biases: str
    holds: Callable[[list[tuple[Form | None, list[Slot]]]], bool]
    write: Callable[[Written, Adapters, Parameters, bool], set[str]]
    find: Callable[..., Any]
    read: Callable[..., list[Read]]
    ends: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    settings: frozenset[str] | None = None


def _by_hand(peft_type: str, own_biases: str, holds: Any, write: Any, reader: Any) -> Format:
    kind, shared = peft_type.lower(), parse.SHARED if peft_type == "VERA" else {}

    def written(out: Written, adapters: Adapters, parameters: Parameters, serve: bool) -> set[str]:
        return write(out, adapters, parameters.modules, serve)

    return Format(peft_type, kind, own_biases, holds, written, reader.find, reader.read, parse.ENDS[peft_type], shared)


BY_HAND: dict[str, Format] = {
    "LORA": _by_hand("LORA", "lora_only", lambda adapters: True, lora.write, read_lora),
    "ADALORA": _by_hand("ADALORA", "lora_only", adalora.holds, adalora.write, adalora),
    "VERA": _by_hand("VERA", "vera_only", vera.holds, vera.write, vera),
    "SHIRA": _by_hand("SHIRA", "", shira.holds, shira.write, shira),
}


def stated(kind: PeftKind, cls: type[Method]) -> Format:
    """The format that a method's class states."""
    writer, reader = (table, read_table) if cls.matrix else (leaf_table, leaf_table)
    return Format(
        kind.peft_type,
        kind.peft_type,
        kind.own_biases,
        partial(writer.holds, kind),
        partial(writer.write, kind),
        partial(reader.find, kind, cls),
        partial(reader.read, kind),
        {f".{each.name}": each.name for each in (*kind.tensors, *kind.zeros, *(t for t in kind.shared if t.repeated))},
        {f"base_model.{tensor.name}": tensor.name for tensor in kind.shared},
        kind.names,
    )


def formats(more: Iterable[type[Method]] = ()) -> dict[str, Format]:
    """All formats by PEFT's names: those by hand, those that methods of the catalogue state, and those of `more` classes.

    Raises:
        ValueError: where two methods of the catalogue state one.
    """
    found: dict[str, Format] = dict(BY_HAND)
    owners: dict[str, str] = {}
    for cls in catalog.methods().values():
        if (kind := stated_kind(cls)) is None:
            continue
        if kind.peft_type in found:
            other = owners.get(kind.peft_type, "jlora.interchange")
            raise ValueError(f"PEFT's {kind.peft_type} is stated by {cls.__name__} and by {other}; one must state it")
        found[kind.peft_type], owners[kind.peft_type] = stated(kind, cls), cls.__name__
    for cls in more:
        if (kind := stated_kind(cls)) is not None:
            found[kind.peft_type] = stated(kind, cls)
    return found
