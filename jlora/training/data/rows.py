"""Rows of text, JSON lines, JSON arrays, CSV, TSV, Parquet and Arrow files, each with the line that it came from.

All but the last two may be compressed by gzip, with `.gz` behind their name; of those two the line is the row's number. A text
is read as a whole, all others row by row. Every row that cannot be used is an error that begins with
`file:line:`. Blank lines between rows are passed over, a byte order mark is left out, and the line ends of Windows are read as
`\n`.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import dataclasses
import gzip
import json
import zlib
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

from jlora.training.data.formats import tables
from jlora.training.data.formats.window import Window
from jlora.training.errors import DataError, EmptyRow

_SUFFIXES = {
    ".txt": "text", ".text": "text", ".md": "text",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv",
    **tables.SUFFIXES,
}  # fmt: skip
# The csv module's own limit, 131,072 characters a field, is less than a long document.
_FIELD_LIMIT = 2**31 - 1
# Bytes that are read at once.
_BLOCK = 2**16


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

    def missing(self, key: str, hint: str = "") -> DataError:
        """An error for a key that the row has not."""
        has = ", ".join(map(repr, self.values)) or "nothing"
        return self.error(f"there is no {key!r}; the row has {has}{hint}")

    def text(self, key: str) -> str:
        """The value of `key`, which must be a text that is not blank.

        Raises:
            EmptyRow: a DataError, if the value is blank.
            DataError: if the key is missing, or the value is no text.
        """
        if key not in self.values:
            raise self.missing(key)
        value = self.values[key]
        if not isinstance(value, str):
            raise self.error(f"{key!r} must be a text, got {value!r:.60}")
        if not value.strip():
            raise EmptyRow(self.path, self.line, f"{key!r} is empty")
        return value


#: What stands for the file where rows are given in Python.
GIVEN = "rows given in Python"


def given_rows(rows: Any) -> list[Row]:
    """Rows that are given as objects: a list of dicts, a Hugging Face `datasets.Dataset`, or what else has `len` and items.

    Raises:
        DataError: for a row that is no mapping, and where there is none.
        TypeError: for something that has no rows by number.
    """
    return list(iter_given(rows))


def iter_given(rows: Any) -> Iterator[Row]:
    """Rows that are given as objects, one after another as they are asked for; the rest is as for `given_rows`."""
    if isinstance(rows, Mapping) or not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise TypeError(
            f"data must be a file, or rows with len(rows) and rows[0], each a dict; got {type(rows).__name__}"
        )
    number = -1
    for number in range(len(rows)):
        if not isinstance(row := rows[number], Mapping):
            raise DataError(GIVEN, number + 1, f"the row must be a dict, got {row!r:.40}")
        yield Row(tables.without_nulls(dict(row)), GIVEN, number + 1)
    if number < 0:
        raise DataError(GIVEN, None, "there are no rows")


def file_format(path: str | Path, format: str | None = None) -> str:
    """`text`, `jsonl`, `csv`, `tsv`, `parquet` or `arrow`: the given format, or the one that the file's name tells.

    Raises:
        ValueError: if the name does not tell.
    """
    path = Path(path)
    plain = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    found = format or _SUFFIXES.get(plain.suffix.lower())
    if found is None:
        known = ", ".join(_SUFFIXES)
        raise ValueError(
            f"{path}: the format is not known from the name, which ends in none of {known}; rename the file, or say "
            "--format text, jsonl, csv, tsv, parquet or arrow"
        )
    return found


def read_rows(path: str | Path, format: str | None = None) -> list[Row]:
    """All rows of a file.

    Raises:
        DataError: for a malformed row, or a file without rows.
        OSError: if the file cannot be read.
    """
    return list(iter_rows(path, format))


def iter_rows(path: str | Path, format: str | None = None) -> Iterator[Row]:
    """The rows of a file, one after another as they are asked for; the rest is as for `read_rows`."""
    check_file(path)
    readers = {"text": _text_rows, "jsonl": _json_rows, "csv": _csv_rows, "tsv": _csv_rows}
    readers |= {"parquet": _table_rows, "arrow": _table_rows}
    kind, row = file_format(path, format), None
    for row in readers[kind](str(path), kind):
        yield row
    if row is None:
        raise DataError(path, None, "the file has no rows")


def check_file(path: str | Path) -> None:
    """The path is a file's.

    Raises:
        OSError: if it is not.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file")
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path}: a folder, wanted a file of rows")


def _first_character(path: str) -> str:
    """The first character of a file that is not blank, without a byte order mark; empty where there is none."""
    with contextlib.closing(_raw_blocks(path)) as blocks:
        for block in blocks:
            if text := block.removeprefix(codecs.BOM_UTF8).lstrip()[:1]:
                return text.decode("latin-1")
    return ""


def _raw_blocks(path: str) -> Generator[bytes, None, None]:
    with _opened(path) as file:
        while block := file.read(_BLOCK):
            yield block


def _lines(path: str) -> Iterator[str]:
    """The file's lines with their ends, decoded one by one so that bad bytes can be located."""
    with contextlib.closing(_raw_lines(path)) as file:
        for number, raw in enumerate(file, 1):
            if number == 1 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise DataError(path, None, "the file is UTF-16; save it as UTF-8")
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    path, number, f"the line is not UTF-8 ({error.reason} at byte {error.start})"
                ) from error
            yield text[:-2] + "\n" if text.endswith("\r\n") else text


def _raw_lines(path: str) -> Generator[bytes, None, None]:
    with _opened(path) as file:
        yield from file


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """The file's bytes, unpacked where its name ends in `.gz`."""
    packed = path.lower().endswith(".gz")
    with (gzip.open if packed else open)(path, "rb") as file:
        try:
            yield file
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(path, None, f"the file is not a whole gzip file ({error})") from error


def _table_rows(path: str, kind: str) -> Iterator[Row]:
    for number, values in enumerate(tables.table_rows(path, kind), 1):
        yield Row(values, path, number)


def _text_rows(path: str, kind: str) -> Iterator[Row]:
    text = "".join(_lines(path))
    if not text.strip():
        raise DataError(path, None, "the file has no text")
    yield Row({"text": text}, path, 1)


def _json_rows(path: str, kind: str) -> Iterator[Row]:
    """An object a line, or one array of objects, whatever the file's name."""
    if _first_character(path) == "[":
        yield from _array_rows(path)
        return
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield _json_row(path, number, line.strip())


def _json_row(path: str, number: int, line: str) -> Row:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        hint = "; wanted one object a line, or one array of objects" if line in ("{", "[") else ""
        why = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise DataError(path, number, f"the row is not JSON ({why}){hint}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets in …
        raise DataError(path, number, f"the row cannot be read ({error})") from error
    return _object_row(path, number, value, line)


def _object_row(path: str, number: int, value: Any, source: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(path, number, f"the row must be a JSON object, got {source:.40}")
    return Row(value, path, number)


def _array_rows(path: str) -> Iterator[Row]:
    """The elements of one array, read one by one, so that each has its line, and the array need not be in memory."""
    text = Window(_text_blocks(path))
    text.next()
    text.go(text.place + 1)
    closed = text.next() == "]"
    while not closed:
        line = text.line
        yield _object_row(path, line, *_element(path, text))
        after = text.next()
        closed = after == "]"
        if not closed and after != ",":
            raise DataError(path, line, "after this row of the array there is neither a comma nor the closing ]")
        if not closed:
            text.go(text.place + 1)
            text.next()
    text.go(text.place + 1)
    if text.next():
        rest = text.text[text.place : text.place + 40]
        raise DataError(path, text.line, f"after the array of rows there is more: {rest!r}")


def _element(path: str, text: Window) -> tuple[Any, str]:
    """The element where the reader stands, and how it is written; the reader stands behind it then."""
    while True:
        try:
            value, end = json.JSONDecoder().raw_decode(text.text, text.place)
        except json.JSONDecodeError as error:
            if text.more():  # it may go on there
                continue
            raise DataError(path, text.line, f"the array of rows is not JSON here ({error.msg})") from error
        except (ValueError, RecursionError) as error:
            raise DataError(path, text.line, f"the array of rows is not JSON here ({error})") from error
        source = text.text[text.place : end]
        text.go(end)
        return value, source


def _text_blocks(path: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        with contextlib.closing(_raw_blocks(path)) as blocks:
            for block in blocks:
                yield decoder.decode(block)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        for _ in _lines(path):  # says which line it is
            pass
        raise


def _csv_rows(path: str, kind: str) -> Iterator[Row]:
    """CSV with standard quoting; in TSV a quote is an ordinary character, as in the GLUE files."""
    options: dict[str, Any] = {"strict": True} if kind == "csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(_lines(path), **options)
    line, limit = 0, csv.field_size_limit(_FIELD_LIMIT)
    try:
        header = next(reader, None)
        if not header or len(set(header)) != len(header) or not all(name.strip() for name in header):
            raise DataError(path, 1, f"the first line must name the columns, each once, got {header}")
        line = reader.line_num
        for fields in reader:
            first, line = line + 1, reader.line_num
            if not "".join(fields).strip() and len(fields) < 2:
                continue  # a blank line
            if not any(field.strip() for field in fields):
                raise DataError(path, first, "the row is empty")
            if len(fields) != len(header):
                raise DataError(path, first, f"the row has {len(fields)} fields, but the header names {len(header)}")
            yield Row(dict(zip(header, fields)), path, first)
    except csv.Error as error:
        raise DataError(path, line + 1, f"the row is not well-formed ({error})") from error
    finally:
        csv.field_size_limit(limit)
