"""The rows that settings name: in memory, or streamed, and why."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jlora.training.data.formats.mixture import files_of, read_files, stream_files
from jlora.training.data.rows import file_format, given_rows, iter_given
from jlora.training.data.streaming.sources import DataRows, StreamedRows
from jlora.training.errors import SettingError
from jlora.training.settings.fields import Settings

#: From so many bytes of files on data are streamed where `--stream` is not given.
LARGE = 2**26


def open_rows(settings: Settings, given: Mapping[str, Any], stream: bool) -> DataRows:
    """The rows of `settings.data`, or those that are `given` in its place.

    Raises:
        DataError: for a malformed row, or a source without rows; of streamed ones when they are read.
        SettingError: for wrong shares.
        OSError: if a file cannot be read.
    """
    assert settings.data is not None
    if "data" in given:
        return StreamedRows([functools.partial(iter_given, given["data"])]) if stream else given_rows(given["data"])
    read = stream_files if stream else read_files
    return read(settings.data, settings.format, settings.weights, settings.seed)


def streams(settings: Settings, given: Mapping[str, Any], say: Callable[[str], None]) -> bool:
    """Whether the data are streamed: as `--stream` says, or if the files are large; with a line about it.

    Raises:
        SettingError: where `--stream` asks for what can't be.
    """
    if settings.data is None:
        if settings.stream:
            raise SettingError("stream", "needs a data file: the documentation of Python is in memory anyway")
        return False
    if settings.stream is False:
        return False
    files = [
        path
        for name in ("data", "validation")
        if name not in given and (named := getattr(settings, name)) is not None
        for path in files_of(named)
        if Path(path).is_file()  # what is none is refused where it is read
    ]
    total = sum(Path(path).stat().st_size for path in files)
    if not settings.stream and total < LARGE:
        return False
    texts = [path for path in files if file_format(path, settings.format) == "text"]
    if texts:
        told = f"{texts[0]} is one text, a single row; rows of .jsonl, .json, .csv, .tsv, .parquet and .arrow can be streamed"
        if settings.stream:
            raise SettingError("stream", f"can't be: {told}")
        say(f"data  {size(total)}, read into memory: {told}")
        return False
    said = "rows given in Python" if not files else f"{size(total)} of files"
    say(f"data  {said}, streamed: encoded once into a file on the disk of {settings.out} (--no-stream: in memory) …")
    return True


def size(count: int) -> str:
    """A number of bytes, in words."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
