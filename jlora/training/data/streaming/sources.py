"""Rows that stay in their files: read anew, one after another, each time that they are gone through."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jlora.training.data.rows import Row


class StreamedRows:
    """Rows of several sources, some of them or all."""

    def __init__(self, parts: Sequence[Callable[[], Iterator[Row]]], wanted: np.ndarray | None = None):
        """Args: functions that give the rows of a source; of all rows together those that are wanted, bool, by default all."""
        self._parts, self._wanted = parts, wanted

    def __iter__(self) -> Iterator[Row]:
        rows = (row for part in self._parts for row in part())
        if self._wanted is None:
            return rows
        return (row for row, wanted in zip(rows, self._wanted) if wanted)

    def __len__(self) -> int:
        return int(sum(self.counts) if self._wanted is None else np.count_nonzero(self._wanted))

    @functools.cached_property
    def counts(self) -> list[int]:
        """Rows of each source; all are read for it, once."""
        return [sum(1 for _ in part()) for part in self._parts]

    def chosen(self, numbers: np.ndarray) -> StreamedRows:
        """Those of these rows that have the numbers, in the order of the files."""
        total = sum(self.counts)
        places = np.arange(total) if self._wanted is None else np.flatnonzero(self._wanted)
        wanted = np.zeros(total, bool)
        wanted[places[numbers]] = True
        chosen = StreamedRows(self._parts, wanted)
        chosen.counts = self.counts
        return chosen


#: Rows in memory, or not.
DataRows = Sequence[Row] | StreamedRows
