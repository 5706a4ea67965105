"""Writes adapters of a kind that a method states as a table (`PeftKind`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from jlora.core.protocol.method import Method
from jlora.core.protocol.peft import Layout, PeftKind
from jlora.interchange.files.written import PREFIX, Written, origin
from jlora.interchange.kinds import table_settings
from jlora.interchange.kinds.lora import shortest
from jlora.interchange.leaves import layout
from jlora.interchange.leaves.forms import Form
from jlora.interchange.leaves.names import Slot
from jlora.interchange.trained.wholes import Parameters

_LAYOUTS: dict[str, Any] = {
    "same": (lambda x: x, lambda x: x),
    "transposed": (lambda x: np.swapaxes(x, -1, -2), lambda x: np.swapaxes(x, -1, -2)),
    "column": (lambda x: x[:, None], lambda x: x[:, 0]),
    "row": (lambda x: x[None, :], lambda x: x[0]),
}


def to_file(how: Layout, array: np.ndarray) -> np.ndarray:
    """A field of one matrix as PEFT's file has it."""
    return (_LAYOUTS[how] if isinstance(how, str) else how)[0](array)


def from_file(how: Layout, tensor: np.ndarray) -> np.ndarray:
    """The inverse of `to_file`."""
    return (_LAYOUTS[how] if isinstance(how, str) else how)[1](tensor)


def holds(kind: PeftKind, adapters: list[tuple[Form | None, list[Slot]]]) -> bool:
    """Whether one folder can hold these adapters: plain matrices with settings that agree."""
    forms = [(form, slots) for form, slots in adapters if form is not None]
    if len(forms) < len(adapters) or not all(plain(kind, slot) for _, slots in forms for slot in slots):
        return False
    if kind.shared and len({form.site.method for form, _ in forms}) > 1:
        return False
    return table_settings.agree(kind, methods_of(forms))


def plain(kind: PeftKind, slot: Slot) -> bool:
    """Whether a slot is the weight of a module that PEFT adapts so: a whole matrix, not a part of a fused or tied one."""
    kinds = ("linear", "conv1d_gpt2") if kind.fan_in_fan_out else ("linear",)
    whole = slot.part is None and slot.entry.columns is None and not slot.entry.also
    return slot.kind in kinds and whole and slot.parameter == "weight"


def methods_of(forms: list[tuple[Form, list[Slot]]]) -> dict[str, Method]:
    """The method of each adapted module."""
    return {slot.module: form.site.method for form, slots in forms for slot in slots}


def write(
    kind: PeftKind, out: Written, adapters: list[tuple[Form, list[Slot]]], parameters: Parameters, serve: bool
) -> set[str]:
    """Adds adapters and their settings to a folder; returns the adapted modules."""
    methods = methods_of(adapters)
    for form, slots in adapters:
        for slot in slots:
            index, stem = layout.batch_index(slot, form.site), PREFIX + slot.module
            for tensor in kind.of(form.site.method):
                if tensor.field in form.arrays:
                    array = to_file(tensor.layout, form.arrays[tensor.field][index])
                    out.add(f"{stem}.{tensor.name}", array, [origin(slot, form.fields[tensor.field])])
            for name, shape in kind.zeros_of(form.site.method, form.site).items():
                dtype = next(iter(form.arrays.values())).dtype
                out.add(f"{stem}.{name}", np.zeros(shape, dtype), [origin(slot, ())])
    _write_shared(kind, out, adapters[0][0], methods)
    targets, listed = table_settings.targets(kind, methods, parameters.modules, shortest)
    out.config.update(peft_type=kind.peft_type, target_modules=targets, **kind.only, **listed)
    out.config.update(table_settings.written(kind, methods))
    if kind.changed is not None and out.config[kind.changed[0]]:
        out.config["peft_version"] = kind.changed[1]
    if kind.fan_in_fan_out:
        out.config["fan_in_fan_out"] = any(slot.kind == "conv1d_gpt2" for _, slots in adapters for slot in slots)
    return set(methods)


def _write_shared(kind: PeftKind, out: Written, first: Form, methods: dict[str, Method]) -> None:
    """Adds the tensors of the whole model, and their copies beside modules where PEFT has these."""
    for tensor in kind.shared:
        array = to_file(tensor.layout, first.shared[tensor.field])
        line = {"leaf": "", "fields": [tensor.field], "shared": type(first.site.method).__name__}
        for stem in ("base_model", *(PREFIX + module for module in methods if tensor.repeated)):
            out.add(f"{stem}.{tensor.name}", array, [line])
