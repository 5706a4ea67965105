"""Several files as one: all of their rows, or shares of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jlora.training.data.rows import Row, read_rows
from jlora.training.errors import SettingError


def files_of(data: str) -> list[str]:
    """The files that `--data` names, with commas between; one whose own name has commas is one file."""
    return [data] if Path(data).exists() else [part.strip() for part in data.split(",") if part.strip()]


def read_files(data: str, format: str | None, shares: str | None = None, seed: int = 0) -> list[Row]:
    """The rows of the files, one file after another.

    Args:
        data: the files, see `files_of`.
        format: of all of them, where their names do not tell.
        shares: for each file its share of the rows, as numbers with commas between; by default all rows are taken. So many
            rows are taken as there can be without one twice.
        seed: of the drawing, where of a file only some are taken.

    Raises:
        DataError: for a malformed row, or a file without rows.
        SettingError: for shares that are no positive numbers, or not one for each file.
        OSError: if a file cannot be read.
    """
    files = files_of(data)
    wanted = None if shares is None else shares_of(shares, len(files))
    parts = [read_rows(path, format) for path in files]
    if wanted is not None:
        whole = min(len(part) / share for part, share in zip(parts, wanted))
        rng = np.random.default_rng(seed)
        parts = [_drawn(part, max(1, round(share * whole)), rng) for part, share in zip(parts, wanted)]
    return [row for part in parts for row in part]


def shares_of(text: str, count: int) -> list[float]:
    """`"7,3"` as `[0.7, 0.3]`.

    Raises:
        SettingError: for what is no positive number, or another count of them.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < share < float("inf") for share in found):
        raise SettingError("weights", f"must be numbers above 0 with commas between, such as 0.7,0.3, got {text!r}")
    if len(found) != count:
        raise SettingError(
            "weights", f"has {len(found)} numbers for {count} {'file' if count == 1 else 'files'} of data"
        )
    return [share / sum(found) for share in found]


def _drawn(rows: Sequence[Row], count: int, rng: np.random.Generator) -> list[Row]:
    chosen = rng.choice(len(rows), min(count, len(rows)), replace=False)
    return [rows[index] for index in sorted(chosen)]
