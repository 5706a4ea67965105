"""SHiRA in PEFT's format, both ways."""

from __future__ import annotations

import numpy as np

from jlora.interchange.files.config import Settings
from jlora.interchange.files.folder import FLOATS, INTEGERS, AdapterFolder
from jlora.interchange.files.parse import Contents
from jlora.interchange.files.recorded import Recorded
from jlora.interchange.files.written import PREFIX, Written, origin
from jlora.interchange.kinds.adalora import plain_matrix, single
from jlora.interchange.kinds.lora import shortest
from jlora.interchange.leaves import layout
from jlora.interchange.leaves.forms import Form
from jlora.interchange.leaves.index import Index, Read, trained_dtype
from jlora.interchange.leaves.names import Slot
from jlora.methods.shira import SHiRA


def _rank(form: Form) -> int:
    """PEFT's `r`, by which it trains `r * (in + out)` entries; 0 where the number of entries is no such multiple."""
    entries, sides = form.arrays["values"].shape[-1], form.site.in_size + form.site.out_size
    return entries // sides if entries % sides == 0 else 0


def holds(adapters: list[tuple[Form | None, list[Slot]]]) -> bool:
    """Whether all are plain matrices with the number of entries that one `r` gives."""
    ranks = {_rank(form) for form, _ in adapters if form is not None}
    linear = all(slot.kind == "linear" for _, slots in adapters for slot in slots)
    return len(ranks) == 1 and 0 not in ranks and linear and all(single(slots) for _, slots in adapters)


def write(out: Written, adapters: list[tuple[Form, list[Slot]]], modules: set[str], serve: bool) -> set[str]:
    """Adds SHiRA adapters to a folder, entries in torch's order; returns the adapted modules."""
    targets = []
    for form, slots in adapters:
        for slot in slots:
            index, stem = layout.batch_index(slot, form.site), PREFIX + slot.module
            values, flat = form.arrays["values"][index], form.arrays["index"][index]
            row, column = np.divmod(flat, form.site.out_size)
            order = np.lexsort((row, column))
            pairs = np.stack([column[order], row[order]]).astype(np.int32)
            out.add(f"{stem}.shira_weight", values[order], [origin(slot, form.fields["values"])])
            out.add(f"{stem}.shira_indices", pairs, [origin(slot, form.fields["index"])])
            targets.append(slot.module)
    out.config.update(
        peft_type="SHIRA",
        r=_rank(adapters[0][0]),
        target_modules=shortest(targets, modules),
        fan_in_fan_out=False,
        mask_type="random",
        init_weights=True,
    )
    return set(targets)


def find(folder: AdapterFolder, settings: Settings, contents: Contents, index: Index) -> dict[str, dict[str, str]]:
    """The keys of each torch parameter's entries, with their shapes checked.

    Raises:
        ValueError: for a missing tensor, one of another shape, or another kind of weight.
    """
    found, rank = {}, settings.integer("r", 32)
    for module, roles in contents.adapters.items():
        name = plain_matrix(module, key := next(iter(roles.values())), index)
        settings.check_target(module, key)
        if missing := {"values", "index"} - set(roles):
            word = {"values": "shira_weight", "index": "shira_indices"}[min(missing)]
            raise ValueError(f"{folder.file}: {module!r} has no {word}; the file is not whole")
        slot = index.by_name[name][0]
        entries = rank * (layout.b_shape(slot, 1)[0] + layout.a_shape(slot, 1)[1])
        folder.check(roles["values"], (entries,), f"r {rank} of {name!r}")
        # PEFT on Windows writes the positions as floats.
        folder.check(roles["index"], (2, entries), f"r {rank} of {name!r}", {**INTEGERS, **FLOATS})
        found[name] = roles
    return found


def read(
    folder: AdapterFolder, settings: Settings, found: dict[str, dict[str, str]], index: Index, recorded: Recorded
) -> list[Read]:
    """The adapters, by leaf.

    Raises:
        ValueError: for a stack of which some layers have no adapter, or positions outside of the matrix.
    """
    result = []
    for keys in index.leaves_of(set(found)):
        slots = [slot for slot in index.slots[keys] if slot.name in found]
        if len(slots) < len(index.slots[keys]):
            raise ValueError(
                f"{folder.file}: only {len(slots)} of the {len(index.slots[keys])} layers of {'/'.join(keys)} have a SHiRA; "
                "load the model with scan_layers=False"
            )
        method = recorded.one(slots, SHiRA)
        if method is None or method.scale != 1:
            method = SHiRA("random", rank=settings.integer("r", 32))
        site = index.site(keys, method)
        dtype = trained_dtype(index.leaves[keys].dtype)
        pieces = [(slot, _entries(folder, found[slot.name], (site.in_size, site.out_size), dtype)) for slot in slots]
        arrays = index.stack(site, pieces)
        result.append(Read(site, {"values": arrays["values"]}, {"index": arrays["index"]}))
    return result


def _entries(
    folder: AdapterFolder, roles: dict[str, str], shape: tuple[int, int], dtype: np.dtype
) -> dict[str, np.ndarray]:
    """Values and flat positions, in the matrix's order."""
    column, row = folder.read(roles["index"]).astype(np.int64)
    inside = np.all((row >= 0) & (row < shape[0]) & (column >= 0) & (column < shape[1]))
    flat = row * shape[1] + column
    if not inside or len(np.unique(flat)) < len(flat):
        raise ValueError(f"{folder.file}: {roles['index']!r} holds positions twice, or outside of the matrix")
    order = np.argsort(flat)
    return {"values": folder.read_as(roles["values"], dtype)[order], "index": flat[order].astype(np.int32)}
