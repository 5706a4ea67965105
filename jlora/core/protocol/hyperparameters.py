"""Checks of hyperparameters that several methods have in common."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any

from jlora.core.protocol.method import Site

#: What a value must be: a test, and the words for it.
Bound = tuple[Callable[[Any], bool], str]


def number(holds: Callable[[Any], bool], words: str) -> Bound:
    """A number of which something holds; True and False are none."""
    return lambda v: isinstance(v, int | float) and not isinstance(v, bool) and holds(v), words


def integer(least: int, words: str | None = None) -> Bound:
    """A whole number of at least `least`."""
    return number(lambda v: isinstance(v, int) and v >= least, words or f"an integer of at least {least}")


def one_of(names: Collection[Any], words: str | None = None) -> Bound:
    """One of some values."""
    return lambda v: v in tuple(names), words or f"one of {tuple(names)}"


POSITIVE = number(lambda v: 0 < v < math.inf, "positive and finite")
NOT_NEGATIVE = number(lambda v: 0 <= v < math.inf, "0 or more, and finite")
NOT_ZERO = number(lambda v: 0 < abs(v) < math.inf, "finite and not 0")
ABOVE_ZERO_TO_ONE = number(lambda v: 0 < v <= 1, "above 0 and at most 1")
BELOW_ONE = number(lambda v: 0 <= v < 1, "at least 0 and below 1")
_COUNT = integer(1, "a positive whole number")
_BOUNDS = {
    "alpha": POSITIVE,
    "beta": BELOW_ONE,
    "beta1": BELOW_ONE,
    "beta2": BELOW_ONE,
    "orthogonality": NOT_NEGATIVE,
    "dropout": BELOW_ONE,
    "seed": integer(0, "a whole number of at least 0"),
}


def check_hyperparameters(
    method: Any,
    counts: tuple[str, ...] = (),
    bounds: dict[str, Bound] | None = None,
    of: type | None = None,
    regexes: tuple[str, ...] = (),
) -> None:
    """Refuses values out of range: those that methods have in common, and the given.

    Args:
        method: with `phases`, if it has a schedule.
        counts: fields that are positive whole numbers, or None where that is their default.
        bounds: for other fields, or None likewise, a test and the words for it.
        of: the class whose fields these are, where users derive classes from it with fields of their own; by default the
            method's.
        regexes: fields that are regexes of paths, or None likewise.

    Raises:
        ValueError: naming the method and the hyperparameter.
    """
    name, defaults = type(method).__name__, {field.name: field.default for field in fields(of or method)}
    given = {field: getattr(method, field) for field in defaults}
    given = {field: value for field, value in given.items() if value is not None or defaults[field] is not None}
    for field, (holds, wanted) in {**dict.fromkeys(counts, _COUNT), **_BOUNDS, **(bounds or {})}.items():
        if field in given and not holds(given[field]):
            raise ValueError(f"{name}'s {field} must be {wanted}, got {given[field]!r}")
    for field, value in given.items():
        if isinstance(defaults[field], bool) and not isinstance(value, bool):
            raise ValueError(f"{name}'s {field} must be True or False, got {value!r}")
    for field in regexes:
        _check_regex(f"{name}'s {field}", given.get(field, ""))
    most = given.get("max_rank")
    if most is not None and most < method.rank:
        raise ValueError(f"{name}'s max_rank ({most}) is below the rank that it starts with ({method.rank})")
    if hasattr(method, "phases"):
        method.phases.check(name)


def _check_regex(words: str, value: Any) -> None:
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise ValueError(f"{words} must be a regex that matches paths, got {value!r}: {error}") from None


def check_rank(method: Any, site: Site, names: tuple[str, ...] = ("rank", "max_rank")) -> None:
    """Refuses a rank above the matrix's sides, of the hyperparameters of these names that the method has.

    Raises:
        ValueError: naming both.
    """
    side = min(site.in_size, site.out_size)
    for name in names:
        rank = getattr(method, name, None)
        if rank is not None and rank > side:
            raise ValueError(
                f"{name} {rank} is above the smaller side of the {site.in_size} x {site.out_size} matrix; "
                f"use {side} or less"
            )


def instead(value: int, choices: Collection[int], none: str = "no number does") -> str:
    """What a message tells to do in the place of a value that doesn't fit: the choices that are nearest to it."""
    nearest = sorted(choices, key=lambda choice: abs(choice - value))[:5]
    return f"use {', '.join(map(str, nearest))}" if nearest else f"{none}; leave it out of the spec"
