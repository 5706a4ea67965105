"""Former homes of modules from which the page on new methods told to import: they lead to where these are now.

They are entries of `sys.modules` and no files, so that the package's folder shows the rooms alone; and only these four, since
everything else that pages named is a name of `jlora` itself.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType
from typing import Any

MOVED = {
    "method": "jlora.core.protocol.method",
    "gated": "jlora.core.protocol.gated",
    "around": "jlora.core.protocol.wrapping",
    "hyperparameters": "jlora.core.protocol.hyperparameters",
}


class _Former(ModuleType):
    """A module under its former name, whose use gives a warning."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by the import system, and of every module by some tools
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        new = MOVED[self.__name__.removeprefix("jlora.")]
        found = getattr(importlib.import_module(new), name)
        home = "jlora" if hasattr(sys.modules["jlora"], name) else new
        warnings.warn(f"{self.__name__} has moved: import {name} from {home}", DeprecationWarning, stacklevel=2)
        return found


for _name in MOVED:
    sys.modules.setdefault(f"jlora.{_name}", _Former(f"jlora.{_name}", f"Former name of `{MOVED[_name]}`."))


def module(name: str) -> ModuleType:
    """The module with a former name, as an attribute of `jlora`.

    Raises:
        AttributeError: for a name that never was one.
    """
    if name not in MOVED:
        raise AttributeError(f"module 'jlora' has no attribute {name!r}")
    return sys.modules[f"jlora.{name}"]
