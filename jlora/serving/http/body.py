"""The body of a call: read within its limit, JSON without doubt, and every field of it either used or refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request

from jlora.serving.http.refusals import Refused, bad

_MISSING = object()
# A deeper one has no meaning in any call, and Python's parser fails on very deep ones.
_DEPTH = 64


async def read(request: Request, limit: int) -> Body:
    """The fields of a call.

    Args:
        request: whose body it is.
        limit: bytes, at most.

    Raises:
        Refused: for a body that is too large, of another type, or no JSON object.
        starlette.requests.ClientDisconnect: where the client is gone before its end.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page of another site could send a form, but no JSON, to a server on the user's own machine.
        raise Refused(415, f"Content-Type must be application/json, got {kind or 'none'}", "unsupported_media_type")
    too_large = Refused(413, f"the body is larger than the {limit:,} bytes that this server reads", "body_too_large")
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated[:19]) > limit:
        raise too_large
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > limit:
            raise too_large
    return Body(parsed(bytes(found)))


def parsed(text: bytes) -> dict[str, Any]:
    """A JSON object, by the letter of RFC 8259: no NaN, no name twice, no half of a surrogate pair.

    Raises:
        Refused: for anything else.
    """
    try:
        found = json.loads(text.decode("utf-8"), parse_constant=_no_number, object_pairs_hook=_object)
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise Refused(400, "the body is no JSON that can be read: it is nested too deeply", "invalid_json") from error
    except ValueError as error:
        why = (
            str(error)
            if not isinstance(error, UnicodeError)
            else "it is not valid UTF-8, or holds half a surrogate pair"
        )
        raise Refused(400, f"the body is no JSON that can be read: {why}", "invalid_json") from error
    if not isinstance(found, dict):
        raise Refused(400, "the body must be a JSON object", "invalid_json")
    if _depth(found) > _DEPTH:
        raise Refused(400, "the body is no JSON that can be read: it is nested too deeply", "invalid_json")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:60]!r} stands twice in one object")
        found[name] = value
    return found


def _depth(value: Any) -> int:
    parts, depth = [value], 0
    while parts:
        depth += 1
        inner = (part.values() if isinstance(part, dict) else part for part in parts if isinstance(part, dict | list))
        parts = [each for part in inner for each in part]
    return depth


class Body:
    """The fields of a call, of which each must be asked for: `done` refuses what is left.

    A field that is null is as good as none.
    """

    def __init__(self, fields: Mapping[str, Any], where: str = ""):
        """Args: the fields; what stands before their names in an error, where they are a part of a body."""
        self._fields, self._where = dict(fields), where

    def copy(self) -> Body:
        """The same, to be asked once more."""
        return Body(self._fields, self._where)

    def take(self, name: str, default: Any = _MISSING) -> Any:
        """A field as it is.

        Raises:
            Refused: where it is missing and has no default.
        """
        found = self._fields.pop(name, None)
        if found is None:
            if default is _MISSING:
                raise bad(self._where + name, "is missing")
            return default
        return found

    def text(self, name: str, default: Any = _MISSING) -> Any:
        """A text."""
        return self._checked(name, default, lambda value: isinstance(value, str), "a text")

    def flag(self, name: str) -> bool:
        """true or false, by default false."""
        return self._checked(name, False, lambda value: isinstance(value, bool), "true or false")

    def whole(self, name: str, default: Any, low: int, high: int | None = None) -> Any:
        """A whole number."""
        wanted = f"a whole number from {low}" + (f" to {high}" if high is not None else "")
        return self._checked(
            name, default, lambda v: type(v) is int and low <= v and (high is None or v <= high), wanted
        )

    def number(self, name: str, default: Any, holds: Callable[[float], bool], wanted: str) -> Any:
        """A number."""

        def right(value: Any) -> bool:
            return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value) and holds(value)

        found = self._checked(name, default, right, wanted)
        return found if found is None else float(found)

    def table(self, name: str) -> Body:
        """An object, by default an empty one."""
        found = self._checked(name, {}, lambda value: isinstance(value, dict), "an object")
        return Body(found, f"{self._where}{name}.")

    def without(self, absent: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuses fields of things that aren't there, unless their value asks for nothing.

        Args:
            absent: the values that ask for nothing, by field.
        """
        for name, nothing in absent.items():
            found = self.take(name, None)
            if found is not None and not any(type(found) is type(each) and found == each for each in nothing):
                raise bad(self._where + name, "is not there in this server: leave it out", "unsupported_parameter")

    def ignored(self, *names: str) -> None:
        """Passes over fields that change nothing of an answer."""
        for name in names:
            self._fields.pop(name, None)

    def done(self) -> None:
        """Refuses fields that nobody asked for."""
        if self._fields:
            name = self._where + min(self._fields)[:60]
            raise bad(name, "is no field that this server knows: leave it out", "unknown_parameter")

    def _checked(self, name: str, default: Any, holds: Callable[[Any], bool], wanted: str) -> Any:
        found = self.take(name, default)
        if found is not default and not holds(found):
            raise bad(self._where + name, f"must be {wanted}, got {shown(found)}")
        return found


def shown(value: Any) -> str:
    """A value as JSON, short."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
