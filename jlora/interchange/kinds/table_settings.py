"""The settings of a `PeftKind`: from methods, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from jlora.core.protocol.method import Method
from jlora.core.protocol.peft import PeftKind, PeftSetting
from jlora.interchange.files.config import Settings

_MISSING = object()


def _value(setting: PeftSetting, method: Method) -> Any:
    """PEFT's value of a method's hyperparameter; `_MISSING` for one that PEFT has no value for."""
    value = getattr(method, setting.field)
    if not setting.values:
        return value
    return next((theirs for ours, theirs in setting.values if ours == value), _MISSING)


def agree(kind: PeftKind, methods: dict[str, Method]) -> bool:
    """Whether one `adapter_config.json` can hold the settings of all modules."""
    for setting in kind.settings:
        if setting.listed is not None:
            if not _listed_apart(setting, methods):
                return False
            continue
        values = {_value(setting, method) for method in methods.values()}
        if _MISSING in values or (len(values) > 1 and not setting.pattern):
            return False
    return len({type(method) for method in methods.values()}) == 1


def _listed_apart(setting: PeftSetting, methods: dict[str, Method]) -> bool:
    """Whether each module has one of the two values, and PEFT takes none for listed that ends as a listed one does."""
    if any(getattr(method, setting.field) not in (setting.listed, setting.default) for method in methods.values()):
        return False
    listed = [module for module in methods if getattr(methods[module], setting.field) == setting.listed]
    return not any(module.endswith(name) for module in methods if module not in listed for name in listed)


def written(kind: PeftKind, methods: dict[str, Method]) -> dict[str, Any]:
    """The settings that hold the hyperparameters: the commonest value, and a pattern for modules with others."""
    found: dict[str, Any] = {}
    for setting in (setting for setting in kind.settings if setting.listed is None):
        values = {module: _value(setting, method) for module, method in methods.items()}
        common = Counter(values.values()).most_common(1)[0][0]
        found[setting.name] = _number(common)
        if setting.pattern:
            found[setting.pattern] = {module: _number(value) for module, value in values.items() if value != common}
    return found


def _number(value: Any) -> Any:
    """A whole number as an int, as PEFT's configurations mostly have it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def targets(
    kind: PeftKind, methods: dict[str, Method], modules: set[str], shortest: Callable[[list[str], set[str]], list[str]]
) -> tuple[list[str], dict[str, list[str]]]:
    """`target_modules`, and the settings that list some of them, which PEFT wants to be named as there."""
    named = shortest(list(methods), modules)
    listed = {}
    for setting in (setting for setting in kind.settings if setting.listed is not None):
        mine = [module for module, method in methods.items() if getattr(method, setting.field) == setting.listed]
        listed[setting.name] = shortest(mine, modules)
        others = [module for module in methods if module not in mine]
        clash = any(module.endswith(name) for module in others for name in listed[setting.name])
        if clash or not set(listed[setting.name]) <= set(named):
            named, listed[setting.name] = sorted(methods), sorted(mine)
    return named, listed


def check(kind: PeftKind, settings: Settings) -> None:
    """Refuses settings that jlora has another value of; warns of those of the training that it has not, and of old ones.

    Raises:
        ValueError: naming the setting.
    """
    for name, value in kind.only.items():
        settings.wanted(name, value)
    for name in kind.training:
        settings.left_out(name)
    if kind.changed is not None:
        name, release = kind.changed
        settings.older(name, next(setting.default for setting in kind.settings if setting.name == name), release)


def read(kind: PeftKind, settings: Settings, module: str) -> dict[str, Any]:
    """The hyperparameters of a module's method.

    Raises:
        ValueError: for a setting of the wrong type, or a value that jlora has not.
    """
    return {setting.field: _read(setting, settings, module) for setting in kind.settings}


def _read(setting: PeftSetting, settings: Settings, module: str) -> Any:
    if setting.listed is not None:
        return setting.listed if settings.lists(setting.name, module) else setting.default
    types = frozenset(type(theirs) for _, theirs in setting.values)
    value = settings.typed(setting.name, setting.default, setting.pattern, module, types)
    if not setting.values:
        return value
    for ours, theirs in setting.values:
        if type(theirs) is type(value) and theirs == value:
            return ours
    raise settings.refused(setting.name, value, [theirs for _, theirs in setting.values])
