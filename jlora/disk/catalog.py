"""The methods that come with jlora, by the names that users give them."""

from __future__ import annotations

import jlora.methods
from jlora.core.protocol.method import Method


def methods() -> dict[str, type[Method]]:
    """The classes that `jlora/methods/__init__.py` exports, in the order of their names.

    Whatever lists methods lists these: base classes, such as `Gated` and `Around`, are no methods that a user names.
    """
    found = {name: value for name, value in vars(jlora.methods).items() if isinstance(value, type)}
    return {name: found[name] for name in sorted(found) if issubclass(found[name], Method)}
