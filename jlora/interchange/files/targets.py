"""PEFT's rule for the modules that it adapts, by the settings of a folder."""

from __future__ import annotations

from typing import Any

from jlora.interchange.files import patterns
from jlora.interchange.files.folder import brief


def left_out(config: dict[str, Any], module: str) -> str | None:
    """The reason for which PEFT would not adapt a module; None where it would.

    Args:
        config: content of `adapter_config.json`.
        module: the module's name.

    Raises:
        ValueError: for a setting of the wrong type, or a pattern that can't be matched.
    """
    excluded, wanted, saved, behind = (
        _setting(config, name, str)
        for name in ("exclude_modules", "target_modules", "modules_to_save", "layers_pattern")
    )
    layers = _setting(config, "layers_to_transform", int)
    if excluded and _names("exclude_modules", excluded, module):
        return f"exclude_modules {brief(excluded)} names {module!r}"
    for name in _listed(saved):
        if _matched("modules_to_save", rf"(?:|.*\.){name}(?:|\..*)", module, name):
            return f"modules_to_save holds {name!r}, which {module!r} is in"
    if wanted is None or (isinstance(wanted, str) and wanted.lower() == "all-linear"):
        return None
    if not _names("target_modules", wanted, module):
        return f"target_modules {brief(wanted)} does not name {module!r}"
    if isinstance(wanted, str) or module in wanted or layers in (None, []):
        return None
    chosen = _layer(_listed(behind), module) in _listed(layers)
    return None if chosen else f"layers_to_transform {brief(layers)} leaves out {module!r}"


def _setting(config: dict[str, Any], name: str, kind: type) -> Any:
    value = config.get(name)
    if any(type(each) is not kind for each in _listed(value)):
        raise ValueError(f"{name} must be of the type {kind.__name__} or a list of such, got {brief(value)}")
    return value


def _listed(value: Any) -> list[Any]:
    """One value or several as a list, which is empty for None and an empty string."""
    return value if isinstance(value, list) else [] if value in (None, "") else [value]


def _names(setting: str, wanted: str | list[str], module: str) -> bool:
    """Whether a module is named: matched by a pattern, or ending in one of several names."""
    if isinstance(wanted, str):
        return _matched(setting, wanted, module, wanted)
    return any(f".{module}".endswith(f".{name}") for name in wanted)


def _layer(behind: list[str], module: str) -> int | None:
    """The number of a module's layer: the first word of digits that follows a match of one of the patterns in `behind`."""
    words = module.split(".")
    numbers = [place for place, word in enumerate(words[:-1]) if word.isdecimal()]
    if not behind:
        return next((int(words[place]) for place in numbers if place > 1), None)
    for pattern in behind:
        for place in numbers:
            if _matched("layers_pattern", rf"(?:|.*\.){pattern}", ".".join(words[:place]), pattern):
                return int(words[place])
    return None


def _matched(setting: str, pattern: str, name: str, given: str) -> bool:
    """Whether a pattern matches a whole name.

    Raises:
        ValueError: for a pattern that can't be read, naming the setting and the pattern `given` there.
    """
    try:
        return patterns.fullmatch(pattern, name)
    except ValueError as error:
        raise ValueError(f"{setting} holds {brief(given)}, which is no pattern that jlora reads ({error})") from None
