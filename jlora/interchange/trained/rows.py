"""Trained rows of an embedding: PEFT's `trainable_token_indices`."""

from __future__ import annotations

from typing import Any

from jlora.interchange.files.config import Settings
from jlora.interchange.files.folder import CONFIG, AdapterFolder
from jlora.interchange.files.parse import TOKENS, Contents
from jlora.interchange.files.written import PREFIX, Written, origin
from jlora.interchange.leaves.forms import Form
from jlora.interchange.leaves.index import Index, Read, trained_dtype
from jlora.interchange.leaves.names import Slot
from jlora.methods.rows import Rows


def write(out: Written, adapters: list[tuple[Form, list[Slot]]]) -> None:
    """Adds trained rows to a folder.

    Raises:
        ValueError: for rows of anything but an embedding that is one torch parameter.
    """
    table = {}
    for form, slots in adapters:
        slot, method = slots[0], form.site.method
        assert isinstance(method, Rows)
        if len(slots) > 1 or slot.kind != "embedding":
            raise ValueError(f"{slot.path}: PEFT trains rows of embeddings only, and of each by itself")
        out.add(f"{PREFIX}{slot.module}{TOKENS}", form.arrays["rows"], [origin(slot, form.fields["rows"])])
        table[slot.module] = list(method.indices)
    if table:
        out.config["trainable_token_indices"] = table


def find(folder: AdapterFolder, settings: Settings, contents: Contents, index: Index) -> dict[str, tuple[str, Rows]]:
    """The key and the method of each embedding whose rows were trained; shapes are checked.

    Raises:
        ValueError: for a tensor whose rows the settings don't tell, or rows without a tensor.
    """
    table = _table(settings, contents)
    found = {}
    for module, key in contents.rows.items():
        name = index.matrix(module, key)
        told = [rows for stem, rows in table.items() if module == stem or module.endswith("." + stem)]
        slot = index.by_name[index.tied.get(name, name)][0]
        if len(told) != 1 or not isinstance(told[0], list) or slot.kind != "embedding":
            raise ValueError(
                f"{folder.file}: which rows {key!r} holds is not told by trainable_token_indices {table!r}"
            )
        try:
            method = Rows(tuple(told[0]))
        except ValueError as error:
            raise ValueError(f"{folder.path / CONFIG}: trainable_token_indices of {module!r}: {error}") from None
        if max(method.indices) >= slot.sizes("in")[0]:
            raise ValueError(
                f"{folder.path / CONFIG}: row {max(method.indices)} of {module!r} is none of {slot.sizes('in')[0]}"
            )
        folder.check(key, (len(method.indices), slot.torch_columns()[2]), f"the rows of {module!r}")
        found[name] = key, method
    if len(found) < len(table):
        raise ValueError(
            f"{folder.file}: trainable_token_indices names {sorted(table)}, but only {sorted(found)} are there"
        )
    return found


def _table(settings: Settings, contents: Contents) -> dict[str, Any]:
    """The trained rows by module; a bare list in the settings is for the embedding of tokens, the only one with a tensor."""
    bare = settings.bare_list("trainable_token_indices")
    if bare is None:
        return settings.table("trainable_token_indices")
    return dict.fromkeys(contents.rows, bare)


def read(folder: AdapterFolder, found: dict[str, tuple[str, Rows]], index: Index) -> list[Read]:
    """The rows, by leaf.

    Raises:
        ValueError: for rows of tied weights that differ.
    """
    result = []
    for name, (key, method) in found.items():
        if (embedding := index.tied.get(name)) is not None:
            other = found.get(embedding)
            if other is None or other[1] != method or folder.read(key).tobytes() != folder.read(other[0]).tobytes():
                raise ValueError(f"{folder.file}: {key!r} and {embedding!r} are one array (tied weights), but differ")
            continue
        keys = index.by_name[name][0].keys
        dtype = trained_dtype(index.leaves[keys].dtype)
        result.append(Read(index.site(keys, method), {"rows": folder.read_as(key, dtype)}))
    return result
