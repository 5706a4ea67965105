"""Command-line flags made from the fields of `Settings`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, NoReturn

from jlora.training.configuration import Given, gather
from jlora.training.settings import Settings

_PARSERS = {"str": str, "int": int, "float": float}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        """Print the sentence and exit with code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def add_flags(parser: argparse.ArgumentParser, groups: tuple[str, ...], without: tuple[str, ...] = ()) -> None:
    """Add the flags of some groups of settings, and `--config`."""
    sections = {group: parser.add_argument_group(group) for group in groups}
    for field in dataclasses.fields(Settings):
        group = field.metadata["group"]
        if group in groups and field.name not in without and field.name != "spec":
            _add(sections[group], field)
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings, and a [spec] table of regex to method")


def _add(section: Any, field: dataclasses.Field) -> None:
    name, annotation = "--" + field.name.replace("_", "-"), str(field.type).removesuffix(" | None")
    default = field.default
    shown = "" if default is None or annotation == "bool" else f" ({default})"
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": field.metadata["help"] + shown}
    if annotation == "bool":
        action = "store_true" if field.name == "resume" else argparse.BooleanOptionalAction
        section.add_argument(name, action=action, **options)
    else:
        choices = field.metadata["choices"] or None
        metavar = None if choices else field.name.upper()
        section.add_argument(name, type=_PARSERS[annotation], choices=choices, metavar=metavar, **options)


def given(arguments: argparse.Namespace) -> Given:
    """The settings among the parsed arguments, over those of `--config`."""
    names = {field.name for field in dataclasses.fields(Settings)}
    flags = {name: value for name, value in vars(arguments).items() if name in names}
    return gather(flags, getattr(arguments, "config", None))
