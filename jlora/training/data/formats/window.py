"""A text of which only what is being looked at is in memory, however long it is."""

from __future__ import annotations

import re
from collections.abc import Iterator

_BLANK = re.compile(r"\s*")


class Window:
    """A text that comes in blocks.

    Attributes:
        text: the part of it that is in memory.
        place: where in that part the reader stands; what is before it is forgotten when more is read.
        line: the line of that place, counted from 1.
    """

    def __init__(self, blocks: Iterator[str]):
        self._blocks, self.text, self.place, self.line = blocks, "", 0, 1

    def more(self) -> bool:
        """Read on, as much again as there is; whether there was anything."""
        parts, size = [self.text[self.place :]], 0
        wanted = len(parts[0])
        for block in self._blocks:
            parts.append(block)
            size += len(block)
            if size and size >= wanted:
                break
        self.text, self.place = "".join(parts), 0
        return size > 0

    def go(self, place: int) -> None:
        """Stand at another place, further on in the part that is in memory."""
        self.line += self.text.count("\n", self.place, place)
        self.place = place

    def next(self) -> str:
        """The next character that is not blank, where the reader stands then; empty at the end."""
        while True:
            blank = _BLANK.match(self.text, self.place)
            assert blank is not None
            self.go(blank.end())
            if self.place < len(self.text) or not self.more():
                return self.text[self.place : self.place + 1]
