"""Which releases a run stands on."""

from __future__ import annotations

import importlib.metadata


def installed(package: str) -> str:
    """The release of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # jlora itself, when it runs from its source folder
