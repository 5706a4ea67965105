"""A method's own hyperparameters as the user writes them: `--set target=4`, or `target = 4` in a `[set]` table."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any

import jlora
from jlora.core.protocol.job import hyperparameters
from jlora.core.protocol.wrapping import Around, parts
from jlora.training.errors import SettingError, nearest

_WORDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a text",
    tuple: "whole numbers with commas between", types.NoneType: "none",
}  # fmt: skip


def owners(method: jlora.Method) -> dict[str, type[jlora.Method]]:
    """The hyperparameters that `--set` can give a method, by name, with the class whose they are.

    Those of the method inside are among them, where the outer one has none of the name.
    """
    found: dict[str, type[jlora.Method]] = {}
    for part in parts(method):
        found |= {name: type(part) for name in hyperparameters(type(part)) if name not in found}
    return {name: cls for name, cls in found.items() if not _is_method(_kinds(cls, name))}


def checked(method: jlora.Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given hyperparameters with the types that the method's fields have, as a JSON file holds them.

    Raises:
        SettingError: for a name that the method has not, and a value of another type.
    """
    known, found = owners(method), {}
    for name, value in given.items():
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean {near}?" if near else f"it has {', '.join(known) or 'none'}"
            about = " around ".join(type(part).__name__ for part in parts(method))
            raise SettingError("set", f"{name}: {about} has no hyperparameter {name}; {hint}")
        found[name] = _typed(known[name], name, value)
    return found


#: Hyperparameters that are settings of their own.
OWN_FLAGS = ("alpha", "dropout", "links", "steps", "init")


def check_names(method: jlora.Method, given: Mapping[str, Any], init: str | None, rank: int) -> None:
    """The method has the given hyperparameters, of these types, and none of them is a setting of its own.

    Args:
        method: as the job makes it of `rank`.
        given: those of `--set`.
        init: that of `--init`.
        rank: that of `--rank`, or the job's.

    Raises:
        SettingError: naming what to give instead.
    """
    known = owners(method)
    if init is not None and "init" not in known:
        raise SettingError("init", f"has no meaning with {type(method).__name__}, which starts in one way")
    for name in checked(method, given):
        # Some methods start with another rank than --rank; then `rank` may be set beside it.
        same = name == "rank" and any(getattr(part, "rank", None) == rank for part in parts(method))
        if name in OWN_FLAGS or same:
            raise SettingError("set", f"{name}: is a setting of its own: give --{name}")


def replaced(method: jlora.Method, given: Mapping[str, Any]) -> jlora.Method:
    """The method, and the one inside, with the (checked) hyperparameters in place of its own.

    Raises:
        ValueError: for what the method refuses.
    """
    names = set(hyperparameters(type(method)))
    own = {name: _as_field(value) for name, value in given.items() if name in names}
    rest = {name: value for name, value in given.items() if name not in names}
    if rest and isinstance(method, Around):
        own["inner"] = replaced(method.inner, rest)
    return dataclasses.replace(method, **own)


def _as_field(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# Kept for each class, since `get_type_hints` evaluates all of its annotations anew at every call.
_hints = functools.cache(typing.get_type_hints)


def _kinds(cls: type, name: str) -> tuple[Any, ...]:
    """The types that a field may have: those of a union, or its one."""
    hint = _hints(cls)[name]
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return tuple(typing.get_origin(kind) or kind for kind in (typing.get_args(hint) if union else (hint,)))


def _is_method(kinds: tuple[Any, ...]) -> bool:
    return any(isinstance(kind, type) and issubclass(kind, jlora.Method) for kind in kinds)


def _typed(cls: type, name: str, value: Any) -> Any:
    """The value as the field's type; a text is read as one."""
    kinds = _kinds(cls, name)
    if types.NoneType in kinds and value in (None, "none"):
        return None
    for kind in _WORDS:
        # A float may be a whole number too: some methods tell the two apart.
        if kind in kinds or (kind is int and float in kinds):
            found = _read(kind, value) if isinstance(value, str) else _taken(kind, value)
            if found is not None:
                return found
    wanted = " or ".join(words for kind, words in _WORDS.items() if kind in kinds)
    raise SettingError("set", f"{name}: {cls.__name__}'s {name} must be {wanted}, got {value!r}")


def _read(kind: type, text: str) -> Any:
    """What a text says as a kind of value; None where it says no such thing."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower())
    if kind is tuple:
        numbers = [_read(int, each.strip()) for each in text.strip("()[], ").split(",")]
        return None if None in numbers else numbers
    if kind is str:
        return text
    try:
        return kind(text)
    except (TypeError, ValueError):
        return None


def _taken(kind: type, value: Any) -> Any:
    """A value of a TOML file or of Python, where it is of a kind; None elsewhere."""
    if kind is tuple:
        whole = isinstance(value, list | tuple) and all(type(each) is int for each in value)
        return list(value) if whole else None
    return value if type(value) is kind else None
