"""AdaLoRA in PEFT's format, both ways."""

from __future__ import annotations

from typing import Any

import numpy as np

from jlora.interchange.files.config import Settings
from jlora.interchange.files.folder import AdapterFolder
from jlora.interchange.files.parse import Contents
from jlora.interchange.files.recorded import Recorded
from jlora.interchange.files.written import PREFIX, Written, origin
from jlora.interchange.kinds.lora import shortest
from jlora.interchange.leaves import layout
from jlora.interchange.leaves.forms import Form
from jlora.interchange.leaves.index import Index, Read, trained_dtype
from jlora.interchange.leaves.names import Slot
from jlora.methods.adalora import AdaLoRA

# PEFT's scale is alpha / (rank + this).
EPSILON = 1e-5
KINDS = ("linear", "conv1d_gpt2")


def single(slots: list[Slot]) -> bool:
    """Whether each torch parameter is a plain matrix that comes whole from one leaf, not fused from several."""
    return all(slot.kind in KINDS and slot.part is None and slot.entry.columns is None for slot in slots)


def holds(adapters: list[tuple[Form | None, list[Slot]]]) -> bool:
    """Whether all adapters have one method and are on plain matrices: PEFT's AdaLoRA has one set of hyperparameters."""
    methods = {form.site.method for form, _ in adapters if form is not None}
    return len(methods) == 1 and all(single(slots) for _, slots in adapters)


def write(out: Written, adapters: list[tuple[Form, list[Slot]]], modules: set[str], serve: bool) -> set[str]:
    """Adds AdaLoRA adapters to a folder; returns the adapted modules."""
    targets = []
    for form, slots in adapters:
        for slot in slots:
            index, stem = layout.batch_index(slot, form.site), PREFIX + slot.module
            a, e, b = (form.arrays[name][index] for name in ("a", "e", "b"))
            out.add(f"{stem}.lora_A", a.T, [origin(slot, form.fields["a"])])
            out.add(f"{stem}.lora_E", e[:, None], [origin(slot, form.fields["e"])])
            out.add(f"{stem}.lora_B", b.T, [origin(slot, form.fields["b"])])
            targets.append(slot.module)
    out.config.update(_settings(adapters[0][0].site.method, targets, modules))
    out.config["fan_in_fan_out"] = any(slot.kind == "conv1d_gpt2" for _, slots in adapters for slot in slots)
    return set(targets)


def _settings(method: Any, targets: list[str], modules: set[str]) -> dict[str, Any]:
    return {
        "peft_type": "ADALORA",
        "init_r": method.rank,
        "target_r": method.target,
        "lora_alpha": method.alpha * (method.rank + EPSILON) / method.rank,
        "lora_dropout": method.dropout,
        "tinit": method.start_steps,
        "tfinal": method.final_steps,
        "deltaT": method.interval,
        "total_step": method.steps or method.start_steps + method.final_steps + 1,
        "beta1": method.beta1,
        "beta2": method.beta2,
        "orth_reg_weight": method.orthogonality,
        "target_modules": shortest(targets, modules),
        "init_lora_weights": True,
    }


def find(folder: AdapterFolder, settings: Settings, contents: Contents, index: Index) -> dict[str, dict[str, str]]:
    """The keys of each torch parameter's arrays, with their shapes checked.

    Raises:
        ValueError: for a missing tensor, one of another shape, or a parameter that is not one plain matrix here.
    """
    found, most = {}, settings.integer("init_r", 12)
    for module, roles in contents.adapters.items():
        name = plain_matrix(module, key := next(iter(roles.values())), index)
        settings.check_target(module, key)
        if missing := {"a", "e", "b"} - set(roles):
            raise ValueError(f"{folder.file}: {module!r} has no lora_{min(missing).upper()}; the file is not whole")
        slot, rank = index.by_name[name][0], folder.shape(roles["a"])[0]
        if rank > most:
            raise ValueError(f"{folder.file}: {roles['a']!r} has {rank} ranks, more than init_r {most}")
        what = f"{rank} ranks of {name!r}"
        for role, shape in (("a", layout.a_shape(slot, rank)), ("b", layout.b_shape(slot, rank)), ("e", (rank, 1))):
            folder.check(roles[role], shape, what)
        found[name] = roles
    return found


def plain_matrix(module: str, key: str, index: Index) -> str:
    """The parameter that a module's adapter adapts, which must be one leaf, or one layer of a stacked leaf.

    Raises:
        ValueError: for a fused or tied parameter, or one that is no plain matrix.
    """
    name = index.matrix(module, key)
    if name in index.tied or not single(index.by_name[name]):
        raise ValueError(f"{index.where}: {name!r} is fused, tied or no plain matrix here, where only LoRA can be read")
    return name


def read(
    folder: AdapterFolder, settings: Settings, found: dict[str, dict[str, str]], index: Index, recorded: Recorded
) -> list[Read]:
    """The adapters, one for each leaf; ranks that the file lacks of `init_r`, since they were pruned, come back as zeros."""
    rank, alpha = settings.integer("init_r", 12), settings.number("lora_alpha", 8)
    alpha = (alpha if alpha > 0 else rank) * rank / (rank + EPSILON)
    target = min(settings.integer("target_r", 8), rank)
    plain = AdaLoRA(rank, target, alpha, dropout=settings.probability("lora_dropout"))
    result = []
    for keys in index.leaves_of(set(found)):
        slots = [slot for slot in index.slots[keys] if slot.name in found]
        dtype = trained_dtype(index.leaves[keys].dtype)
        arrays = {slot: _padded(folder, slot, found[slot.name], rank, dtype) for slot in slots}
        method = recorded.one(slots, AdaLoRA)
        if method is None or method.rank != rank or abs(method.alpha - alpha) > 1e-9 * alpha:
            method = plain
        site = index.site(keys, method)
        result.append(Read(site, index.stack(site, list(arrays.items()))))
    return result


def _padded(
    folder: AdapterFolder, slot: Slot, roles: dict[str, str], rank: int, dtype: np.dtype
) -> dict[str, np.ndarray]:
    a, e, b = (folder.read_as(roles[role], dtype) for role in ("a", "e", "b"))
    more = (0, rank - len(e))
    return {
        "a": np.pad(a.T, [(0, 0), more]),
        "e": np.pad(e[:, 0], [more]),
        "b": np.pad(b.T, [more, (0, 0)]),
    }
