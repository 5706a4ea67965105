"""`jlora_manifest.json`: which leaf went where, and what each adapter was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from jlora.interchange.forms import Form
from jlora.interchange.names import Slot
from jlora.interchange.written import Written
from jlora.serialize import method_to_dict

FILE = "jlora_manifest.json"
FORMAT = 1


def describe(out: Written, forms: list[tuple[Form, list[Slot]]], profile: str, digest: str) -> dict[str, Any]:
    """The manifest of a folder.

    Args:
        out: the folder.
        forms: what was written for each leaf, with its slots.
        profile: "peft" or "serving".
        digest: SHA-256 of the file of tensors.
    """
    return {
        "format": FORMAT,
        "profile": profile,
        "sha256": digest,
        "leaves": [_leaf(form, slots) for form, slots in forms],
        "tensors": [
            {"key": key, "shape": list(tensor.shape), "dtype": str(tensor.dtype), "from": out.origins[key]}
            for key, tensor in out.tensors.items()
        ],
        "notes": out.notes,
    }


def _leaf(form: Form, slots: list[Slot]) -> dict[str, Any]:
    residual = {} if form.residual is None else {"residual": form.residual.tolist()}
    return {
        "leaf": form.site.path,
        "method": method_to_dict(form.site.method),
        "form": form.kind,
        "parameters": [slot.name for slot in slots],
        **residual,
    }


def sha256(path: Path) -> str:
    """The digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(directory: Path, tensors: Path) -> dict[str, Any] | None:
    """The manifest of a folder, or None where it has none.

    Raises:
        ValueError: where it can't be read, or describes other tensors than those beside it.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}, wanted {FORMAT}")
        for leaf in found["leaves"]:
            assert isinstance(leaf["method"], dict) and isinstance(leaf["form"], str)
            assert all(isinstance(name, str) for name in leaf["parameters"])
        digest, lines = found["sha256"], found["tensors"]
        assert all(isinstance(line["key"], str) for line in lines)
        for origin in (origin for line in lines for origin in line["from"]):
            start, stop = origin.get("ranks", (0, 1))
            assert isinstance(start, int) and isinstance(stop, int) and 0 <= start < stop
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{path} is damaged or from another version ({error!r}); delete it to read the folder as PEFT's "
                         "own") from None  # fmt: skip
    if digest != sha256(tensors):
        raise ValueError(
            f"{path} describes other tensors than {tensors.name} holds; delete it to read the folder as PEFT's own"
        )
    return found
