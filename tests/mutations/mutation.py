"""What a mutation is, and how it is applied."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One small fault.

    Attributes:
        name: what is wrong then, in words.
        file: the file, from the top of the repository.
        old: the text that is replaced; it stands in the file exactly once.
        new: what it becomes.
        tests: what must turn red, as arguments of pytest.
        equivalent: why nothing can turn red, where that is so.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""

    def applied(self, text: str) -> str:
        """The file's text with the fault in it.

        Raises:
            ValueError: where `old` doesn't stand there exactly once, or is the same as `new`.
        """
        if (count := text.count(self.old)) != 1 or self.old == self.new:
            raise ValueError(
                f"{self.name!r}: its text stands {count} times in {self.file}, wanted once and another text for it; say "
                f"anew what it replaces: {self.old!r}"
            )
        return text.replace(self.old, self.new)
