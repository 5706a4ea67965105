"""Reading a JSON object from a file that a failing disk, or anybody else, may have written."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: No settings or index comes near this many bytes; a file that does is refused unread.
LARGEST = 2**27
#: No program nests settings deeper; what does would stop whoever walks through it, or prints it, by a RecursionError.
DEEPEST = 64
#: What reading parts of such an object raises where it holds other types than it should.
ILL_FORMED = (AttributeError, LookupError, OverflowError, TypeError, ValueError)


def read_object(path: str | os.PathLike[str], largest: int = LARGEST) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.
        largest: how many bytes it may have.

    Raises:
        ValueError: where it is no JSON, nested too deeply, no object, too large, or has two values for one key; the message
            begins with the path.
        OSError: where it can't be read.
    """
    path = Path(path)
    if (size := path.stat().st_size) > largest:
        raise ValueError(f"{path}: {size} bytes are too many for settings, wanted at most {largest}")
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text, object_pairs_hook=_without_twins)
        if "\\u" in text:  # half of a pair of surrogates is no text, which whoever uses it next would stumble over
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: wanted a JSON object, got a {type(found).__name__}")
    level: list[Any] = [found]
    for _ in range(DEEPEST):
        level = [inner for each in level for inner in _within(each)]
    if level:
        raise ValueError(f"{path}: not valid JSON (nested deeper than {DEEPEST} levels)")
    return found


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, none of whose keys has a second value that would go unseen."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"two values for {key[:100]!r}: {shown(found[key])} and {shown(value)}")
        found[key] = value
    return found


def _within(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def shown(value: Any) -> str:
    """A value from such a file for a message, cut to a few words however long or deep it is."""
    return f"{reprlib.repr(value)} ({type(value).__name__})"
