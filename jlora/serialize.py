"""Methods as JSON and TOML tables, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

from jlora.method import Method


def _subclasses(cls: type[Method]) -> dict[str, type[Method]]:
    found: dict[str, type[Method]] = {}
    for sub in cls.__subclasses__():
        found.update({sub.__name__: sub, **_subclasses(sub)})
    return found


def method_to_dict(method: Method) -> dict[str, Any]:
    """A method as plain data: `{"method": "LoRA", "rank": 8, ...}`; inner methods are nested tables.

    Example:
        >>> jlora.method_to_dict(jlora.DoRA(jlora.LoRA(rank=4)))["inner"]["rank"]
        4
    """
    values = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    plain = {name: method_to_dict(v) if isinstance(v, Method) else v for name, v in values.items()}
    return {"method": type(method).__name__, **plain}


def method_from_dict(table: dict[str, Any]) -> Method:
    """The method that a table describes; what it leaves out has its default.

    Only classes that are imported already are found, so a file can't load code.

    Raises:
        ValueError: for an unknown method or hyperparameter, and for values that the method refuses.
    """
    known = _subclasses(Method)
    name = table.get("method") if isinstance(table, dict) else None
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"a method table needs method = one of {sorted(known)}; got {table!r}")
    cls, given = known[name], {key: value for key, value in table.items() if key != "method"}
    fields = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(given) - fields):
        raise ValueError(f"{name} has no hyperparameter {', '.join(unknown)}; it has {sorted(fields)}")
    inner = {key: method_from_dict(v) if isinstance(v, dict) else _tuple(v) for key, v in given.items()}
    try:
        return cls(**inner)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from None


def _tuple(value: Any) -> Any:
    """Lists as tuples, since methods are hashable."""
    return tuple(_tuple(each) for each in value) if isinstance(value, list) else value
