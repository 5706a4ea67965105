"""Methods as JSON and TOML tables, and back.

A class is named by its import path, since another class may have the same name. jlora's own methods have their bare names.
"""

from __future__ import annotations

from typing import Any, TypeVar

from jlora.core.protocol.job import hyperparameters
from jlora.core.protocol.method import Method
from jlora.disk import catalog

_T = TypeVar("_T")


class UnknownClass(ValueError):
    """A table names a class of the user's own that is not imported."""


def is_own(cls: type) -> bool:
    """Whether a class is one of jlora's methods, and not derived from one."""
    return catalog.methods().get(cls.__name__) is cls


def method_to_dict(method: Method) -> dict[str, Any]:
    """A method as plain data: `{"method": "LoRA", "rank": 8, ...}`; inner methods are nested tables.

    A class of your own is named by its import path, as in `{"method": "package.module.Class", ...}`.

    Raises:
        ValueError: for a hyperparameter of another type than a file can hold: numbers, texts, methods, and tuples of these.

    Example:
        >>> jlora.method_to_dict(jlora.DoRA(jlora.LoRA(rank=4)))["inner"]["rank"]
        4
    """
    cls = type(method)
    plain = {name: _plain(getattr(method, name), f"{cls.__name__}'s {name}") for name in hyperparameters(cls)}
    return {"method": cls.__name__ if is_own(cls) else import_path(cls), **plain}


def _plain(value: Any, what: str) -> Any:
    if isinstance(value, Method):
        return method_to_dict(value)
    if isinstance(value, tuple | list):
        return tuple(_plain(each, what) for each in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"{what} is {value!r}, a {type(value).__name__}, which no file can hold; make it a number, a text, a method or a "
        "tuple of these, such as the name of what is meant"
    )


def method_from_dict(table: dict[str, Any]) -> Method:
    """The method that a table describes; what it leaves out has its default.

    Bare names are jlora's own methods. A class of your own is found by its import path, and only if it is imported already,
    so a file can't load code.

    Raises:
        ValueError: for an unknown method or hyperparameter, and for values that the method refuses.
    """
    cls = _class_of(table)
    given = {key: value for key, value in table.items() if key != "method"}
    fields = set(hyperparameters(cls))
    if unknown := sorted(set(given) - fields):
        raise ValueError(f"{cls.__name__} has no hyperparameter {', '.join(unknown)}; it has {sorted(fields)}")
    inner = {key: method_from_dict(v) if isinstance(v, dict) else _value(v) for key, v in given.items()}
    try:
        return cls(**inner)
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from None


def _class_of(table: Any) -> type[Method]:
    """The class that a table names."""
    name = table.get("method") if isinstance(table, dict) else None
    own = catalog.methods()
    if isinstance(name, str) and name in own:
        return own[name]
    paths = {path: cls for path, cls in imported(Method).items() if not is_own(cls)}
    # A class that can't start is no method, but the base of some.
    if isinstance(name, str) and name in paths and paths[name].start is not Method.start:
        return paths[name]
    if isinstance(name, str) and "." in name and name not in paths:
        module, _, last = name.rpartition(".")
        raise UnknownClass(f"no class {name!r} is imported: import {module}, where {last} is, before this is read")
    alike = [path for path in paths if path.rpartition(".")[2] == name and paths[path].start is not Method.start]
    hint = f"; a class of your own is named by its import path, {' or '.join(alike)}" if alike else ""
    raise ValueError(f"a method table needs method = one of {sorted(own)}; got {table!r}{hint}")


def imported(cls: type[_T]) -> dict[str, type[_T]]:
    """All classes below one, by import path; of one path the last that was defined, as in a notebook's cell run again."""
    found: dict[str, type[_T]] = {}
    for sub in cls.__subclasses__():
        found.update({import_path(sub): sub, **imported(sub)})
    return found


def import_path(cls: type) -> str:
    """The module and name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _value(value: Any) -> Any:
    """Lists as tuples, since methods are hashable, and tables of methods in them as such."""
    if isinstance(value, list | tuple):
        return tuple(method_from_dict(v) if isinstance(v, dict) and "method" in v else _value(v) for v in value)
    return value
