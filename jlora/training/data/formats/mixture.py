"""Several files as one: all of their rows, or shares of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jlora.training.data.rows import Row, iter_rows, read_rows
from jlora.training.data.streaming.sources import StreamedRows
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
        drawn = _drawn([len(part) for part in parts], wanted, seed)
        parts = [[part[index] for index in chosen] for part, chosen in zip(parts, drawn)]
    return [row for part in parts for row in part]


def stream_files(data: str, format: str | None, shares: str | None = None, seed: int = 0) -> StreamedRows:
    """The rows of `read_files`, read from the files each time that they are gone through.

    Raises:
        DataError, SettingError, OSError: as `read_files`, the first also while rows are read.
    """
    files = files_of(data)
    wanted = None if shares is None else shares_of(shares, len(files))
    rows = StreamedRows([functools.partial(iter_rows, path, format) for path in files])
    if wanted is None:
        return rows
    starts = np.cumsum([0, *rows.counts[:-1]])
    return rows.chosen(np.concatenate([start + own for start, own in zip(starts, _drawn(rows.counts, wanted, seed))]))


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


def _drawn(counts: Sequence[int], shares: Sequence[float], seed: int) -> list[np.ndarray]:
    """Of files of so many rows the numbers of those that make up the shares."""
    whole = min(count / share for count, share in zip(counts, shares))
    rng, found = np.random.default_rng(seed), []
    for count, share in zip(counts, shares):
        wanted = max(1, round(share * whole))
        found.append(np.sort(rng.choice(count, min(wanted, count), replace=False)))
    return found
