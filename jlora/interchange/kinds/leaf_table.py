"""Kinds of `PeftKind` that hold whole parameters of a module, such as those of a norm, both ways."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jlora.core.protocol.method import Method
from jlora.core.protocol.peft import PeftKind
from jlora.interchange.files.config import Settings
from jlora.interchange.files.folder import AdapterFolder
from jlora.interchange.files.parse import Contents
from jlora.interchange.files.recorded import Recorded
from jlora.interchange.files.written import PREFIX, Written, origin
from jlora.interchange.kinds import table_settings
from jlora.interchange.kinds.lora import shortest
from jlora.interchange.leaves import layout
from jlora.interchange.leaves.forms import Form
from jlora.interchange.leaves.index import Index, Read, trained_dtype
from jlora.interchange.leaves.names import Slot
from jlora.interchange.trained import read_wholes
from jlora.interchange.trained.wholes import Parameters


@dataclass(frozen=True)
class Whole:
    """A parameter of an adapted module as a file has it: its key, and the method by the settings."""

    key: str
    method: Method


def _words(kind: PeftKind) -> dict[str, str]:
    """For the last word of a parameter, such as "bias", the name of its tensor."""
    return {tensor.name.rpartition(".")[2]: tensor.name for tensor in kind.tensors}


def holds(kind: PeftKind, adapters: list[tuple[Form | None, list[Slot]]]) -> bool:
    """Whether one folder can hold these leaves: whole parameters of modules, of one method."""
    forms = [(form, slots) for form, slots in adapters if form is not None]
    whole = all(_whole(kind, slot) for _, slots in forms for slot in slots)
    methods = {slot.module: form.site.method for form, slots in forms for slot in slots}
    return len(forms) == len(adapters) and whole and table_settings.agree(kind, methods)


def _whole(kind: PeftKind, slot: Slot) -> bool:
    alone = slot.part is None and slot.entry.columns is None and not slot.entry.also and not slot.by_parameter
    return alone and bool(slot.module) and slot.parameter in _words(kind)


def write(
    kind: PeftKind, out: Written, adapters: list[tuple[Form, list[Slot]]], parameters: Parameters, serve: bool
) -> set[str]:
    """Adds trained leaves to a folder, and copies of the base for the other parameters of their modules.

    Raises:
        ValueError: for another parameter of such a module that PEFT has no tensor for.
    """
    words, methods = _words(kind), {slot.module: form.site.method for form, slots in adapters for slot in slots}
    for form, slots in adapters:
        field = next(iter(form.arrays))
        for slot in slots:
            key = f"{PREFIX}{slot.module}.{words[slot.parameter]}"
            out.add(key, layout.whole_to_torch(slot, form.arrays[field]), [origin(slot, form.fields[field])])
    for name in (name for module in methods for name in parameters.of_module(module)):
        module, _, last = name.rpartition(".")
        if last not in words:
            raise ValueError(
                f"{name!r}: PEFT's {kind.peft_type} trains {', '.join(words)} of a module, and no {last!r}"
            )
        if (key := f"{PREFIX}{module}.{words[last]}") not in out.tensors:
            out.add(key, parameters.value(name), parameters.origins(name))
    out.config.update(peft_type=kind.peft_type, target_modules=shortest(list(methods), parameters.modules), **kind.only)
    out.config.update(table_settings.written(kind, methods))
    return set(methods)


def find(
    kind: PeftKind, cls: type[Method], folder: AdapterFolder, settings: Settings, contents: Contents, index: Index
) -> dict[str, Whole]:
    """The key of each parameter, with its shape checked.

    Raises:
        ValueError: for a parameter that no leaf is, a missing one, or another shape.
    """
    table_settings.check(kind, settings)
    words, found = _words(kind), {}
    for module, keys in contents.adapters.items():
        first = next(iter(keys.values()))
        settings.check_target(module, first)
        method = settings.build(cls, table_settings.read(kind, settings, module))
        for last, tensor in words.items():
            name = f"{module}.{last}"
            if tensor not in keys:
                if name in index.by_name:
                    raise ValueError(f"{folder.file}: {module!r} has no {tensor}; the file is not whole")
                continue
            slot = index.by_name[index.tied.get(index.parameter(name, keys[tensor]), name)][0]
            if not _whole(kind, slot):
                raise ValueError(f"{folder.file}: {name!r} is fused or tied here, where {kind.peft_type} can't be read")
            folder.check(keys[tensor], layout.torch_shape(slot), f"{name!r}")
            found[name] = Whole(keys[tensor], method)
    if not found:
        raise ValueError(f"{folder.file}: has no {kind.tensors[0].name}; the file is not whole")
    return found


def read(
    kind: PeftKind,
    folder: AdapterFolder,
    settings: Settings,
    found: dict[str, Whole],
    index: Index,
    recorded: Recorded,
) -> list[Read]:
    """The trained leaves; those that jlora wrote as copies of the base stay as they are.

    Raises:
        ValueError: for a copy of another base, or a stack of which some layers are missing.
    """
    result = []
    for keys in index.leaves_of(set(found)):
        slots, path = index.slots[keys], "/".join(keys)
        stored = [(slot, found[slot.name]) for slot in slots if slot.name in found]
        if len(stored) < len(slots):
            raise ValueError(
                f"{folder.file}: only {len(stored)} of the {len(slots)} layers of {path} are there; load the model with "
                "scan_layers=False"
            )
        if all(recorded.is_copy(one.key, slot) for slot, one in stored):
            for slot, one in stored:
                read_wholes.check_copy(folder, one.key, slot, index)
            continue
        dtype = trained_dtype(index.leaves[keys].dtype)
        w = np.array(index.leaves[keys], dtype)
        for slot, one in stored:
            layout.whole_from_torch(slot, folder.read_as(one.key, dtype), w)
        method = recorded.one(slots, type(stored[0][1].method)) or stored[0][1].method
        result.append(Read(index.site(keys, method), {kind.tensors[0].field: w}))
    return result
