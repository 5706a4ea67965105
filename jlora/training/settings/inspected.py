"""The hyperparameters of a method, as `jlora inspect` shows them: what `--set` can change, and to what the job has set it."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from typing import Any

from jlora.core.protocol import docstrings
from jlora.core.protocol.wrapping import parts
from jlora.training.settings.fields import Settings, has_method
from jlora.training.settings.hyperparameters import OWN_FLAGS, owners
from jlora.training.settings.named import named, recipe_of

_WIDTH = 120


def settings_table(settings: Settings) -> str:
    """A line for each hyperparameter of `--method`: name, value in this run, default of the class, and what it is.

    Empty for what has none, and for a `[spec]` table and `--adapter`, which say all themselves.
    """
    if not has_method(settings) or recipe_of(settings) is None or not (known := owners(method := named(settings))):
        return ""
    steps = "a run of unknown length (see --steps)" if settings.steps is None else f"a run of {settings.steps} steps"
    rows = [("name", "value", "default", f"what; values for {steps}")]
    for name, cls in known.items():
        value = next(getattr(part, name) for part in parts(method) if type(part) is cls)
        what = _told(cls, name)
        if name in OWN_FLAGS or (name == "rank" and value == settings.rank):
            what += f" (--{name})"
        if name == cls.measured and name not in settings.set:
            what += " (found in the training data before a run)"
        rows.append((name, _shown(value), _shown(_default(cls, name)), what.strip()))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(_wrapped(row, widths) for row in rows)


def _default(cls: Any, name: str) -> Any:
    return next(each.default for each in dataclasses.fields(cls) if each.name == name)


def _shown(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "-"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _told(cls: type, name: str) -> str:
    """The first sentence that the docstring says of it."""
    return re.split(r"(?<=\.) ", docstrings.arguments(cls).get(name, ""))[0].rstrip(".")


def _wrapped(row: tuple[str, ...], widths: list[int]) -> str:
    start = "  ".join(cell.ljust(width) for cell, width in zip(row, widths))
    lines = textwrap.wrap(row[3], max(_WIDTH - len(start) - 4, 40)) or [""]
    return "\n".join(f"  {start if not n else ' ' * len(start)}  {line}".rstrip() for n, line in enumerate(lines))
