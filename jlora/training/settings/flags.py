"""Command-line flags made from the fields of `Settings`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jlora.training.errors import nearest
from jlora.training.settings.configuration import Given, gather
from jlora.training.settings.fields import Settings, metadata_of

_NUMBERS = {int: "a whole number", float: "a number"}


def number(kind: type, holds: Callable[[Any], bool] | None = None, wanted: str = "") -> Callable[[str], Any]:
    """A parser of a flag's number, whose error says what is wanted.

    Args:
        kind: int or float.
        holds: whether the number may be the flag's; any may by default.
        wanted: what it must be, in words.
    """

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be {_NUMBERS[kind]}, got {text!r}") from error
        if holds is not None and not holds(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text}")
        return value

    return parse


class _Pairs(argparse.Action):
    """Gathers the values of a flag that is given several times, `NAME=VALUE` each."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        name, equals, value = values.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name.isidentifier():
            raise argparse.ArgumentError(self, f"must be NAME=VALUE, such as target=4, got {values!r}")
        found = getattr(namespace, self.dest, None) or {}
        if name in found:
            raise argparse.ArgumentError(self, f"{name} is given twice: {found[name]!r} and {value!r}")
        setattr(namespace, self.dest, {**found, name: value})


class _Lists(argparse.Action):
    """Gathers the values of a flag that is given several times, `NAME=VALUE,VALUE` each."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        name, equals, listed = values.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not listed.strip():
            raise argparse.ArgumentError(
                self, f"must be NAME=VALUE,VALUE such as learning-rate=1e-4,3e-4, got {values!r}"
            )
        found = getattr(namespace, self.dest, None) or {}
        if name in found:
            raise argparse.ArgumentError(self, f"{name} is given twice")
        setattr(namespace, self.dest, {**found, name: [each.strip() for each in listed.split(",")]})


class _Rules(argparse.Action):
    """Gathers the values of a flag that is given several times, `REGEX=AXES` each."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        pattern, equals, axes = values.rpartition("=")  # a regex may have an = too
        if not equals or not pattern:
            raise argparse.ArgumentError(self, f"must be REGEX=AXES, such as w/kernel=None,fsdp,tensor, got {values!r}")
        found = getattr(namespace, self.dest, None) or {}
        if pattern in found:
            raise argparse.ArgumentError(self, f"{pattern} is given twice: {found[pattern]!r} and {axes!r}")
        setattr(namespace, self.dest, {**found, pattern: axes})


_TABLES: dict[str, dict[str, Any]] = {
    "set": {"action": _Pairs, "metavar": "NAME=VALUE"},
    "sweep": {"action": _Lists, "metavar": "NAME=VALUE,VALUE"},
    "shard": {"action": _Rules, "metavar": "REGEX=AXES"},
}
_PARSERS = {"str": str, "int": number(int), "float": number(float)}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, with the nearest word that exists."""

    def error(self, message: str) -> NoReturn:
        """Print the sentence and exit with code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Exit with a sentence about arguments that the parser does not know."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        wrong = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        near = [found for word in wrong if (found := _initials(word, flags) or nearest(word, flags))]
        hint = f"; did you mean {' and '.join(near)}?" if near else ""
        self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        # Python 3.14's suggest_on_error, for the releases before it.
        if action.choices is None or value in action.choices:
            return
        words = [str(choice) for choice in action.choices]
        near = nearest(str(value), words)
        hint = f"; did you mean {near}?" if near else ""
        raise argparse.ArgumentError(action, f"must be one of {', '.join(words)}, got {value!r}{hint}")


def _initials(word: str, flags: Sequence[str]) -> str | None:
    """The flag whose initials are the word, such as --learning-rate for --lr."""
    initials = {"".join(part[0] for part in flag.split("-") if part): flag for flag in flags}
    return initials.get(word.lstrip("-")) if len(word.lstrip("-")) > 1 else None


def add_flags(
    parser: argparse.ArgumentParser, groups: tuple[str, ...], also: tuple[str, ...] = (), without: tuple[str, ...] = ()
) -> None:
    """Add the flags of some groups of settings, some others of another group, but for some, and `--config`."""
    sections = {group: parser.add_argument_group(group) for group in groups}
    for field in dataclasses.fields(Settings):
        group = field.metadata["group"]
        if (group in groups or field.name in also) and field.name not in ("spec", *without):
            _add(sections.get(group, parser), field)
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings, and a [spec] table of regex to method")


def _add(section: Any, field: dataclasses.Field) -> None:
    name, annotation = "--" + field.name.replace("_", "-"), str(field.type).removesuffix(" | None")
    default = field.default
    shown = "" if default in (None, dataclasses.MISSING) or annotation == "bool" else f" ({default})"
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": metadata_of(field, "help") + shown}
    if annotation == "dict[str, Any]":
        section.add_argument(name, **_TABLES[field.name], **options)
    elif annotation == "bool":
        action = "store_true" if field.name == "resume" else argparse.BooleanOptionalAction
        section.add_argument(name, action=action, **options)
    else:
        choices = metadata_of(field, "choices") or None
        # Many choices are told by the help text.
        metavar = None if choices and len(choices) < 6 else field.name.upper()
        section.add_argument(name, type=_PARSERS[annotation], choices=choices, metavar=metavar, **options)


def given(arguments: argparse.Namespace) -> Given:
    """The settings among the parsed arguments, over those of `--config`."""
    names = {field.name for field in dataclasses.fields(Settings)}
    flags = {name: value for name, value in vars(arguments).items() if name in names}
    return gather(flags, getattr(arguments, "config", None))
