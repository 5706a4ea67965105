"""SHA-256 of the files of a folder: damage is noticed before another library reads them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path


def checksums(folder: str | os.PathLike[str]) -> dict[str, str]:
    """The digest of every file, by its path in the folder."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def difference(wanted: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """What sets the first file that is not as it was written apart, in words; None where there is none."""
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            return f"{name} " + ("is missing" if name not in found else "is not what was written")
    return None
