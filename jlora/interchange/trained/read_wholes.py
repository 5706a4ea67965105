"""Reads trained leaves from PEFT's format: `modules_to_save` and biases; and checks copies of the base beside them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from jlora.interchange.files.config import Settings
from jlora.interchange.files.folder import AdapterFolder
from jlora.interchange.files.parse import Contents
from jlora.interchange.files.recorded import Recorded
from jlora.interchange.leaves import layout
from jlora.interchange.leaves.index import Index, Keys, Read, trained_dtype
from jlora.interchange.leaves.names import Slot
from jlora.methods import Full


def check(folder: AdapterFolder, settings: Settings, contents: Contents, index: Index) -> None:
    """Checks the shapes of all parameters that are stored whole, without reading them.

    Raises:
        ValueError: for a parameter that no leaf is, another shape, or a module in `modules_to_save` without tensors.
    """
    for where in (contents.parameters, contents.copies):
        for name, key in where.items():
            slot = index.by_name[index.tied.get(index.parameter(name, key), name)][0]
            folder.check(key, layout.torch_shape(slot), f"{name!r}")
    for module in settings.names("modules_to_save"):
        # PEFT's classes for a task name modules that only some models have.
        if _has(index.by_name, module) and not _has(contents.parameters, module):
            raise ValueError(f"{folder.file}: modules_to_save names {module!r}, of which there is no tensor")


def _has(parameters: Iterable[str], module: str) -> bool:
    """Whether any of the parameters belongs to a module of that name, or to one inside it."""
    return any(f"{module}." in name for name in parameters)


def read(folder: AdapterFolder, contents: Contents, index: Index, recorded: Recorded, adapted: set[Keys]) -> list[Read]:
    """The trained leaves.

    Raises:
        ValueError: for a copy of the base that differs from it, or a leaf that is adapted too.
    """
    _check_copies(folder, contents, index)
    stored = _without_tied(folder, contents.parameters, index)
    found = []
    for keys in index.leaves_of(set(stored)):
        slots = [slot for slot in index.slots[keys] if slot.name in stored]
        copies = [slot for slot in slots if recorded.is_copy(stored[slot.name], slot)]
        for slot in copies:
            check_copy(folder, stored[slot.name], slot, index)
        if len(copies) == len(slots):
            continue
        if keys in adapted:
            raise ValueError(
                f"{folder.file}: {'/'.join(keys)} would be adapted and trained itself; jlora holds one of the two"
            )
        leaf = index.leaves[keys]
        dtype = trained_dtype(leaf.dtype)
        w = np.array(leaf, dtype)
        for slot in slots:
            layout.whole_from_torch(slot, layout.take_columns(slot, folder.read_as(stored[slot.name], dtype)), w)
        found.append(Read(index.site(keys, Full()), {"w": w}))
    return found


def _without_tied(folder: AdapterFolder, parameters: dict[str, str], index: Index) -> dict[str, str]:
    """The parameters, with tied weights under one name only.

    Raises:
        ValueError: where tied weights are stored with different values.
    """
    found = dict(parameters)
    for head, embedding in index.tied.items():
        if head not in found and embedding not in found:
            continue
        pair = found.pop(head, None), found.get(embedding)
        if None in pair or folder.read(str(pair[0])).tobytes() != folder.read(str(pair[1])).tobytes():
            raise ValueError(
                f"{folder.file}: {embedding!r} and {head!r} are one array in this model (tied weights), but the adapter "
                "trains them apart; load the model with tie_word_embeddings: false"
            )
    return found


def _check_copies(folder: AdapterFolder, contents: Contents, index: Index) -> None:
    for name, key in contents.copies.items():
        for slot in index.by_name[index.tied.get(name, name)]:
            check_copy(folder, key, slot, index)


def check_copy(folder: AdapterFolder, key: str, slot: Slot, index: Index) -> None:
    """Refuses a tensor that is said to be a copy of the base's, and differs from it."""
    base = layout.whole_to_torch(slot, np.asarray(index.leaves[slot.keys]))
    stored = layout.take_columns(slot, folder.read(key))
    if index.valued and not np.array_equal(stored.astype(base.dtype), base):
        raise ValueError(
            f"{folder.file}: {key!r} is a copy of {slot.path}, but not of the one in these params; the adapter was made for "
            "another base"
        )
