"""Adapters from a folder of any format that is known: each has a file by which a folder is told to be of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jlora.core.tree.adapted import Adapted
from jlora.disk.adapters import MANIFEST, load

Reader = Callable[[Path, Any, Any, Any], Adapted]
#: What reads a folder, by the file that tells its format: `(path, params, names, prefix) -> Adapted`.
READERS: dict[str, Reader] = {}

#: Where a run of the training job keeps its adapters.
OF_A_RUN = "adapters"


def reads(file: str) -> Callable[[Reader], Reader]:
    """Registers a function `(path, params, names, prefix) -> Adapted` for the folders that hold a file."""

    def register(function: Reader) -> Reader:
        READERS[file] = function
        return function

    return register


def read(path: str | os.PathLike[str], params: Any, names: Any = None, prefix: Any = None) -> Adapted:
    """The adapters of a folder on their base: one that `save` wrote, a training run's, or one in PEFT's format.

    Args:
        path: the folder.
        params: the base.
        names: which torch parameter a leaf is, where the folder is in PEFT's format (see `jlora.load_peft`).
        prefix: the model's layout, where it is PEFT's folder of a prefix (likewise).

    Raises:
        FileNotFoundError: where there is no such folder.
        ValueError: for a folder of no known format, and as its reader.
    """
    place, reader = find(path)
    return reader(place, params, names, prefix)


def find(path: str | os.PathLike[str]) -> tuple[Path, Reader]:
    """The folder that holds the adapters, `path` or the one of a run in it, and what reads it.

    Raises:
        FileNotFoundError: where there is no such folder.
        ValueError: for a folder of no known format.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    for place in (folder, folder / OF_A_RUN):
        for file, reader in READERS.items():
            if (place / file).is_file():
                return place, reader
    raise ValueError(f"{folder} holds no adapters: wanted one of the files {', '.join(READERS)}")


@reads(MANIFEST)
def _saved(path: Path, params: Any, names: Any, prefix: Any) -> Adapted:
    return load(path, params)
