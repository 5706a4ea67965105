"""Rows of Parquet and Arrow files, by pyarrow, which is an extra."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jlora.training.errors import DataError

#: What a file's name ends in, and the format that it tells.
SUFFIXES = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}


def table_rows(path: str, kind: str) -> Iterator[dict[str, Any]]:
    """The rows of a file in order, without the nulls by which a table fills what a row or a message has not.

    Args:
        path: the file.
        kind: `parquet`, or `arrow` for Arrow's file and stream formats (Hugging Face's caches are streams).

    Raises:
        DataError: if pyarrow is missing, or cannot read the file.
    """
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError(path, None, f"reading {kind} files needs pyarrow: pip install 'jlora[arrow]'") from error
    try:
        for batch in _batches(path, kind):
            for row in batch.to_pylist():
                yield without_nulls(row)
    except pyarrow.ArrowException as error:
        raise DataError(path, None, f"the file is not a whole {kind} file ({error})") from error


def _batches(path: str, kind: str) -> Iterator[Any]:
    import pyarrow  # pyright: ignore[reportMissingImports]

    if kind == "parquet":
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]

        with parquet.ParquetFile(path) as file:
            yield from file.iter_batches()
        return
    with pyarrow.memory_map(path) as source:
        try:
            reader = pyarrow.ipc.open_file(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            yield from pyarrow.ipc.open_stream(source)
        else:
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))


def without_nulls(value: Any) -> Any:
    """A row without the nulls by which a table fills what a row or a message has not."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value
