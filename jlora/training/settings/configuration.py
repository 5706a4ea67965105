"""Settings from flags and from a TOML file, with errors that name the flag, or the key and its file."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlora.training.errors import SettingError, nearest
from jlora.training.settings.fields import Settings


@dataclasses.dataclass(frozen=True)
class Given:
    """The values that a user gave, and the name under which each was written.

    Attributes:
        values: setting to value, for what was given.
        names: setting to the name to show in errors, such as `--rank` or `rank in run.toml`.
    """

    values: Mapping[str, Any]
    names: Mapping[str, str]

    def settings(self, defaults: Mapping[str, Any] | None = None) -> Settings:
        """The settings: the given values over `defaults`.

        Raises:
            SettingError: under the name that the user wrote.
        """
        try:
            return Settings(**{**(defaults or {}), **self.values})
        except SettingError as error:
            raise error.renamed(self.names.get(error.setting, error.setting)) from error


def gather(flags: Mapping[str, Any], config: str | Path | None = None) -> Given:
    """What flags and the TOML file say; a flag wins over the file.

    Args:
        flags: setting to value, for the flags that were given.
        config: path of a TOML file, whose keys are settings (dashes may stand for underscores), with a `[spec]` table
            of regex to method table such as `{method = "LoRA", rank = 8}`, or a `[set]` table of hyperparameters. Tables are
            joined entry by entry; what flags say comes first.
    """
    values, names = {}, {}
    if config is not None:
        for key, value in read_toml(config).items():
            values[key], names[key] = value, f"{key} in {config}"
    for key, value in flags.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            value = {**value, **{name: given for name, given in values[key].items() if name not in value}}
        values[key], names[key] = value, "--" + key.replace("_", "-")
    return Given(values, names)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The file's settings by field name.

    Raises:
        SettingError: for a key that is no setting, naming the nearest one.
        ValueError: if the file is not TOML.
        OSError: if it cannot be read.
    """
    with open(path, "rb") as file:
        try:
            table = tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a TOML file: {error}") from error
    known = [field.name for field in dataclasses.fields(Settings) if field.name != "resume"]
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            near = nearest(name, known)
            hint = f"; did you mean {near}?" if near else f"; the settings are {', '.join(known)}"
            raise SettingError(name, f"is not a setting{hint}", f"{key} in {path}")
        if name in found:
            raise SettingError(name, "is given twice", f"{key} in {path}")
        found[name] = value
    return found
