"""`jlora_manifest.json`: which leaf went where, and what each adapter was."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from jlora.core.protocol.method import Method
from jlora.disk.json_files import read_object
from jlora.disk.serialize import UnknownClass, method_from_dict, method_to_dict
from jlora.interchange.files.folder import CONFIG, LARGEST_CONFIG, brief
from jlora.interchange.files.written import Written
from jlora.interchange.leaves.forms import Form
from jlora.interchange.leaves.names import Slot

FILE = "jlora_manifest.json"
FORMAT = 1
# Settings that a user may edit: they say where the adapter came from and what it is for, not what it computes.
FREE = {"base_model_name_or_path", "inference_mode", "target_modules", "task_type"}


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
        "settings": {name: value for name, value in out.config.items() if name not in FREE},
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


def read(directory: Path, tensors: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a folder, with its methods as objects; None for a folder without a manifest.

    Raises:
        ValueError: where it can't be read, or describes other tensors or settings than those beside it.
    """
    path = directory / FILE
    advice = "delete it to read the folder as PEFT's own"
    if not path.is_file():
        if path.is_symlink() or path.exists():
            raise ValueError(f"{path} is a folder, or a link to no file; {advice}")
        return None
    found = read_object(path, LARGEST_CONFIG)
    try:
        _check(found)
        for leaf in found["leaves"] if found["profile"] == "peft" else ():
            leaf["method"] = _method(leaf["method"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is damaged or from another version ({reason}); {advice}") from None
    if found["sha256"] != sha256(tensors):
        raise ValueError(f"{path} describes other tensors than {tensors.name} holds; {advice}")
    for name, value in found.get("settings", {}).items():
        if config.get(name) != value:
            raise ValueError(
                f"{directory / CONFIG}: {name} is {brief(config.get(name))}, but {FILE} says that it was written as "
                f"{brief(value)}; set it back, or delete {FILE} to read the folder by its settings"
            )
    return found


def _method(table: Any) -> Method | None:
    """The method of a leaf; None for a class that is not imported: PEFT's files tell enough to read the adapter without it."""
    try:
        return method_from_dict(table)
    except UnknownClass:
        return None


def _check(found: dict[str, Any]) -> None:
    """Refuses a manifest in which a value that is used later is missing or has another type."""
    if found["format"] != FORMAT:
        raise ValueError(f"format {brief(found['format'])}, wanted {FORMAT}")
    _wanted(found["profile"] in ("peft", "serving"), "profile", found["profile"])
    _wanted(isinstance(found["sha256"], str), "sha256", found["sha256"])
    _wanted(isinstance(found.get("settings", {}), dict), "settings", found.get("settings"))
    for name in ("leaves", "tensors"):
        _wanted(_is_list(found[name], dict), name, found[name])
    for leaf in found["leaves"]:
        _wanted(isinstance(leaf["leaf"], str), "leaf", leaf["leaf"])
        _wanted(isinstance(leaf["form"], str), "form", leaf["form"])
        _wanted(_is_list(leaf["parameters"], str), "parameters", leaf["parameters"])
    for line in found["tensors"]:
        _wanted(isinstance(line["key"], str), "key", line["key"])
        _wanted(_is_list(line["from"], dict), "from", line["from"])
        for origin in line["from"]:
            _check_origin(origin)


def _check_origin(origin: dict[str, Any]) -> None:
    ranks = origin.get("ranks", [0, 1])
    _wanted(_is_list(ranks, int) and len(ranks) == 2 and 0 <= ranks[0] < ranks[1], "ranks", ranks)
    _wanted(_is_list(origin.get("index", []), int), "index", origin.get("index"))


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(each, kind) for each in value)


def _wanted(holds: bool, name: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{name} is {brief(value)}")
