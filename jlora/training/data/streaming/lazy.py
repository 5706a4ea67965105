"""Examples that are made when they are asked for: parts of others, some packed into a row, answers beside those of others.

What memory they take are some numbers for each. The lists of the same names in `dataset`, `packing` and `preferences.pairs`
have the same examples.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np

from jlora.training.data.packing import join, pack
from jlora.training.data.preferences.pairs import Pair, beside, others


class Lazy(Sequence[Any]):
    """Examples by number.

    Attributes:
        lengths: int64 `[examples]`, tokens of each.
        texts: the most texts that one of them has.
    """

    lengths: np.ndarray
    texts = 1

    def __len__(self) -> int:
        return len(self.lengths)

    def at(self, number: int) -> Any:
        """The example of a number from 0 on."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self.at(number) for number in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"there are {len(self)} examples, got number {index}")
        return self.at(number)


class Chosen(Lazy):
    """Examples of others."""

    def __init__(self, examples: Lazy, numbers: np.ndarray):
        """Args: the others; the numbers of those that are chosen."""
        self._examples, self._numbers, self.lengths = examples, numbers, examples.lengths[numbers]

    def at(self, number: int) -> Any:
        return self._examples[int(self._numbers[number])]


class Packed(Lazy):
    """Examples packed into rows of at most `capacity` tokens, see `jlora.training.data.packing`."""

    def __init__(self, examples: Lazy, capacity: int):
        rows = pack(examples.lengths.tolist(), capacity)
        self._examples = examples
        self._ends = np.cumsum([len(row) for row in rows])
        self._numbers = np.fromiter(itertools.chain.from_iterable(rows), np.int64, int(self._ends[-1]))
        self.lengths = np.diff(np.cumsum(examples.lengths[self._numbers])[self._ends - 1], prepend=0)
        self.texts = int(np.diff(self._ends, prepend=0).max())

    def at(self, number: int) -> Any:
        start = self._ends[number - 1] if number else 0
        return join([self._examples[int(i)] for i in self._numbers[start : self._ends[number]]])


class Mismatched(Lazy):
    """Answers by themselves with those of other prompts, see `jlora.training.data.preferences.pairs.mismatched`."""

    def __init__(self, pairs: Lazy, max_length: int):
        self._pairs, self._max_length = pairs, max_length
        self._others = np.array(others([hashlib.sha256(pair.prompt.tobytes()).digest() for pair in pairs]))
        self.lengths = np.fromiter((len(self.at(n)) for n in range(len(pairs))), np.int64, len(pairs))

    def at(self, number: int) -> Pair:
        return beside(self._pairs[number], self._pairs[int(self._others[number])], self._max_length)


class Made(Sequence[Any]):
    """Whatever else there are several of, each made when it is asked for."""

    def __init__(self, count: int, make: Callable[[int], Any]):
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            numbers = range(*index.indices(self._count))
            return Made(len(numbers), lambda number: self._make(numbers[number]))
        if not 0 <= index < self._count:
            raise IndexError(f"there are {self._count}, got number {index}")
        return self._make(index)


def lengths_of(examples: Sequence[Any]) -> np.ndarray:
    """Tokens of each example, int64."""
    if isinstance(examples, Lazy):
        return examples.lengths
    return np.fromiter(map(len, examples), np.int64, len(examples))
