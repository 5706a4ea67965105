"""Examples in a file: written once, one after another, and read back by number.

The file has no name, so that nothing is left of it when the process ends, however it ends. It is read by offset and not mapped,
since mapped pages count as the process's memory. An example takes 5 bytes a token in it, and some tens of
bytes in memory.
"""

from __future__ import annotations

import array
import errno
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlora.training.data.encode import Example
from jlora.training.data.preferences.pairs import Pair
from jlora.training.data.streaming.lazy import Lazy
from jlora.training.files import is_full_disk

_NONE = np.zeros(0, np.int32)


class Spool:
    """A file that examples, all of one kind, are added to.

    Attributes:
        bytes: how long the file is.
    """

    def __init__(self, folder: Path):
        """Args: the folder on whose disk the file lies, or is to lie: one that exists already, at it or above."""
        self.folder = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
        self._file = tempfile.TemporaryFile(dir=self.folder, buffering=2**20)  # noqa: SIM115  (open as long as this is)
        self._starts, self._lengths = array.array("q"), array.array("i")
        self._labels, self._flags = array.array("i"), array.array("b")
        self._pairs = array.array("b")
        self.bytes = 0

    def add(self, examples: Iterable[Any]) -> None:
        """Add examples, or pairs of them.

        Raises:
            OSError: if there is no room for them.
        """
        try:
            for example in examples:
                if isinstance(example, Pair):
                    # Of an answer by itself both are the same, until it gets another one's.
                    sides = [example.first] if example.first is example.second else [example.first, example.second]
                    self._pairs.append(example.desirable)
                else:
                    sides = [example]
                for side in sides:
                    self._write(side)
            self._file.flush()
        except OSError as error:
            if is_full_disk(error):
                raise OSError(
                    errno.ENOSPC,
                    f"the disk of {self.folder} is full: after {self.bytes:,} bytes of tokens there is no room for those of "
                    "more rows, which are kept there while data are streamed; make room, choose another disk by --out, or "
                    "give --max-rows",
                ) from error
            raise

    def _write(self, example: Example) -> None:
        classify = example.label >= 0
        if classify:
            content = example.tokens.astype(np.int32).tobytes() + example.types.astype(np.uint8).tobytes()
        else:
            # Targets are the tokens after those that are read.
            tokens = np.append(example.tokens, example.targets[-1])
            assert np.array_equal(tokens[1:], example.targets)
            content = tokens.astype(np.int32).tobytes() + (example.weights > 0).tobytes()
        self._starts.append(self.bytes)
        self._lengths.append(len(example))
        self._labels.append(example.label)
        self._flags.append(example.cut)
        self._file.write(content)
        self.bytes += len(content)

    def examples(self) -> Lazy:
        """What was added."""
        read = _Written(self)
        return read if not self._pairs else _WrittenPairs(read, np.array(self._pairs))

    def __len__(self) -> int:
        return len(self._pairs) or len(self._starts)

    def read(self, number: int) -> Example:
        """The example of a number, of pairs each row by itself."""
        length, label, cut = self._lengths[number], self._labels[number], bool(self._flags[number])
        ones = np.ones(length, np.int32)
        if label >= 0:
            content = self._bytes(number, 5 * length)
            tokens = np.frombuffer(content, np.int32, length)
            types = np.frombuffer(content, np.uint8, length, 4 * length).astype(np.int32)
            return Example(tokens, _NONE, _NONE.astype(np.float32), types, label, ones, cut)
        content = self._bytes(number, 5 * length + 4)
        tokens = np.frombuffer(content, np.int32, length + 1)
        weights = np.frombuffer(content, np.uint8, length, 4 * (length + 1)).astype(np.float32)
        return Example(tokens[:-1], tokens[1:], weights, _NONE, -1, ones, cut)

    def _bytes(self, number: int, size: int) -> bytes:
        found = os.pread(self._file.fileno(), size, self._starts[number])
        if len(found) != size:
            raise OSError(errno.EIO, f"the file of streamed rows in {self.folder} ends before row {number}")
        return found

    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.array(self._lengths, np.int64)


class _Written(Lazy):
    """The examples of a spool."""

    def __init__(self, spool: Spool):
        self._spool, self.lengths = spool, spool.lengths()

    def at(self, number: int) -> Example:
        return self._spool.read(number)


class _WrittenPairs(Lazy):
    """The pairs of a spool, each of two rows, or of one for both."""

    def __init__(self, rows: Lazy, desirable: Sequence[int] | np.ndarray):
        self._rows, self._desirable = rows, desirable
        self._each = len(rows) // len(desirable)
        self.lengths = rows.lengths.reshape(-1, self._each).max(axis=1)

    def at(self, number: int) -> Pair:
        start = number * self._each
        first, second = self._rows[start], self._rows[start + self._each - 1]
        return Pair(first, second, int(self._desirable[number]))
