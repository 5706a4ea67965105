"""Rows of text, JSON lines, CSV and TSV files, each with the line that it came from.

Whole files are read into memory. Every row that cannot be used is an error that begins with `file:line:`.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jlora.training.errors import DataError

_SUFFIXES = {
    ".txt": "text", ".text": "text", ".md": "text",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        values: column or key to value; a text file is one row with the key `text`.
        path: the file.
        line: the row's first line, counted from 1.
    """

    values: dict[str, Any]
    path: str
    line: int

    def error(self, complaint: str) -> DataError:
        """An error at this row."""
        return DataError(self.path, self.line, complaint)

    def text(self, key: str) -> str:
        """The value of `key`, which must be a text that is not blank.

        Raises:
            DataError: if the key is missing, or the value is no text or blank.
        """
        if key not in self.values:
            raise self.error(f"there is no {key!r}; the row has {', '.join(map(repr, self.values)) or 'nothing'}")
        value = self.values[key]
        if not isinstance(value, str):
            raise self.error(f"{key!r} must be a text, got {value!r:.60}")
        if not value.strip():
            raise self.error(f"{key!r} is empty")
        return value


def file_format(path: str | Path, format: str | None = None) -> str:
    """`text`, `jsonl`, `csv` or `tsv`: the given format, or the one that the file's name tells.

    Raises:
        ValueError: if the name does not tell.
    """
    found = format or _SUFFIXES.get(Path(path).suffix.lower())
    if found is None:
        raise ValueError(f"{path}: the format is not known from the name; say --format text, jsonl, csv or tsv")
    return found


def read_rows(path: str | Path, format: str | None = None) -> list[Row]:
    """All rows of a file.

    Raises:
        DataError: for a malformed row, or a file without rows.
        OSError: if the file cannot be read.
    """
    readers = {"text": _text_rows, "jsonl": _json_rows, "csv": _csv_rows, "tsv": _csv_rows}
    kind = file_format(path, format)
    rows = list(readers[kind](str(path), kind))
    if not rows:
        raise DataError(path, None, "the file has no rows")
    return rows


def _lines(path: str) -> list[str]:
    """The file's lines with their ends, decoded one by one so that bad bytes can be located."""
    lines = []
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                lines.append(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(
                    path, number, f"the line is not UTF-8 ({error.reason} at byte {error.start})"
                ) from error
    return lines


def _text_rows(path: str, kind: str) -> Iterator[Row]:
    text = "".join(_lines(path))
    if not text.strip():
        raise DataError(path, None, "the file has no text")
    yield Row({"text": text}, path, 1)


def _json_rows(path: str, kind: str) -> Iterator[Row]:
    lines = _lines(path)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise DataError(path, number, "the row is empty")
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(path, number, f"the row is not JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(value, dict):
            raise DataError(path, number, f"the row must be a JSON object, got {line.strip():.40}")
        yield Row(value, path, number)


def _csv_rows(path: str, kind: str) -> Iterator[Row]:
    """CSV with standard quoting; in TSV a quote is an ordinary character, as in the GLUE files."""
    options: dict[str, Any] = {"strict": True} if kind == "csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(_lines(path), **options)
    line = 0
    try:
        header = next(reader, None)
        if not header or len(set(header)) != len(header) or not all(name.strip() for name in header):
            raise DataError(path, 1, f"the first line must name the columns, each once, got {header}")
        line = reader.line_num
        for fields in reader:
            first, line = line + 1, reader.line_num
            if not any(field.strip() for field in fields):
                raise DataError(path, first, "the row is empty")
            if len(fields) != len(header):
                raise DataError(path, first, f"the row has {len(fields)} fields, but the header names {len(header)}")
            yield Row(dict(zip(header, fields)), path, first)
    except csv.Error as error:
        raise DataError(path, line + 1, f"the row is not well-formed ({error})") from error
