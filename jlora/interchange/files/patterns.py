"""Matches PEFT's patterns of module names by its rule, but in bounded time whatever the pattern."""

from __future__ import annotations

import importlib
import re
from typing import Any

LONGEST = 20_000
MOST_STEPS = 200_000

# Python's own parser, so that a pattern means here what it means in `re`.
_parser: Any = importlib.import_module("re._parser")

# Flags that need no care here: a name has no line ends, and the parser deals with verbose patterns.
_WITHOUT_EFFECT = re.UNICODE | re.DOTALL | re.MULTILINE | re.VERBOSE

_CATEGORIES = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda c: c.isalnum() or c == "_",
}


def matches(pattern: str, name: str) -> bool:
    r"""Whether a pattern of PEFT matches the name of a module: `re.match(rf"(.*\.)?({pattern})$", name)`.

    Args:
        pattern: a regular expression, or simply the end of a name.
        name: the module's name.

    Raises:
        ValueError: as `fullmatch` does.
    """
    return fullmatch(rf"(.*\.)?({pattern})", name)


def fullmatch(pattern: str, name: str) -> bool:
    """Whether a pattern matches the whole of a name, as `re.fullmatch` has it.

    Adapter folders come from strangers, and `re` takes exponential time for some patterns. So the parsed pattern is followed
    here for all positions at once, in a bounded number of steps.

    Args:
        pattern: a regular expression.
        name: a module's name.

    Raises:
        ValueError: for what is no pattern, for constructs that go beyond regular expressions (back references, atomic
            groups), and for a pattern or name that is too long or takes too many steps.
    """
    if max(len(pattern), len(name)) > LONGEST:
        raise ValueError(f"it or the name {name[:50]!r} has more than {LONGEST} characters")
    try:
        parsed = _parser.parse(pattern)
        return len(name) in _Matcher(name, parsed.state.flags).sequence(parsed, {0})
    except re.error as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("its groups are nested too deeply") from None


class _Matcher:
    """Finds for parts of a pattern the positions of one text at which a match can end."""

    def __init__(self, text: str, flags: int):
        self.text, self.steps = text, 0
        self.any_case = self._has_any_case(flags)

    def sequence(self, parts: Any, starts: set[int]) -> set[int]:
        """The positions where a match of all parts, one after the other, can end if it begins at one of `starts`."""
        for op, argument in parts:
            self.steps += len(starts)
            if self.steps > MOST_STEPS:
                raise ValueError("it takes too long to match")
            starts = self._part(op.name, argument, starts)
            if not starts:
                break
        return starts

    def _part(self, op: str, argument: Any, starts: set[int]) -> set[int]:
        if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return {at + 1 for at in starts if at < len(self.text) and _is_of(op, argument, self._read(at))}
        if op == "AT":
            return {at for at in starts if self._holds(argument.name, at)}
        if op == "BRANCH":
            return {end for branch in argument[1] for end in self.sequence(branch, starts)}
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, part = argument
            return self._repeated(least, most, part, starts)
        if op == "SUBPATTERN":
            _, added, removed, part = argument
            return self._group(added, removed, part, starts)
        if op in ("ASSERT", "ASSERT_NOT"):
            direction, part = argument
            return {at for at in starts if self._looks(direction, part, at) == (op == "ASSERT")}
        raise ValueError(f"{op.lower()} in a pattern are not read")

    def _has_any_case(self, flags: int) -> bool:
        if flags & ~(_WITHOUT_EFFECT | re.IGNORECASE):
            raise ValueError("flags in a pattern are not read, but for those of case and of lines")
        return bool(flags & re.IGNORECASE)

    def _group(self, added: int, removed: int, part: Any, starts: set[int]) -> set[int]:
        before = self.any_case
        self.any_case = (before or self._has_any_case(added)) and not self._has_any_case(removed)
        ends = self.sequence(part, starts)
        self.any_case = before
        return ends

    def _read(self, at: int) -> set[str]:
        """The character at a position; both its cases where the pattern ignores case."""
        character = self.text[at]
        return {character.lower(), character.upper()} if self.any_case else {character}

    def _repeated(self, least: int, most: int, part: Any, starts: set[int]) -> set[int]:
        for _ in range(least):
            before, starts = starts, self.sequence(part, starts)
            if starts in (before, set()):  # more rounds change nothing
                break
        reached, new = set(starts), starts
        for _ in range(most - least):
            new = self.sequence(part, new) - reached
            if not new:
                break
            reached |= new
        return reached

    def _looks(self, direction: int, part: Any, at: int) -> bool:
        if direction > 0:
            return bool(self.sequence(part, {at}))
        start = at - part.getwidth()[0]  # the parser allows a look-behind of one width only
        return start >= 0 and at in self.sequence(part, {start})

    def _holds(self, where: str, at: int) -> bool:
        text = self.text
        if where in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return at == 0
        if where in ("AT_END", "AT_END_STRING"):  # names have no line ends
            return at == len(text)
        sides = [0 <= n < len(text) and _CATEGORIES["CATEGORY_WORD"](text[n]) for n in (at - 1, at)]
        return (sides[0] != sides[1]) == (where == "AT_BOUNDARY")


def _is_of(op: str, argument: Any, characters: set[str]) -> bool:
    """Whether a part of a pattern that matches one character matches any of these."""
    if op == "IN":
        negated = argument[0][0].name == "NEGATE"
        return negated != any(_is_of(item.name, value, characters) for item, value in argument[negated:])
    if op == "RANGE":
        return any(argument[0] <= ord(character) <= argument[1] for character in characters)
    if op == "CATEGORY":
        known = any(map(_CATEGORIES[argument.name.replace("NOT_", "")], characters))
        return known != ("NOT_" in argument.name)
    return op == "ANY" or any(ord(character) == argument for character in characters) == (op == "LITERAL")
