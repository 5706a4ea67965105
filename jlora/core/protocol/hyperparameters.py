"""Checks of hyperparameters that several methods have in common."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from jlora.core.protocol.method import Site

#: What a number must be: a test, and the words for it.
POSITIVE = (lambda v: 0 < v < math.inf, "positive and finite")
NOT_NEGATIVE = (lambda v: 0 <= v < math.inf, "0 or more, and finite")
BELOW_ONE = (lambda v: 0 <= v < 1, "at least 0 and below 1")
_BOUNDS = {
    "alpha": POSITIVE,
    "beta": BELOW_ONE,
    "beta1": BELOW_ONE,
    "beta2": BELOW_ONE,
    "orthogonality": NOT_NEGATIVE,
    "dropout": BELOW_ONE,
}


def check_hyperparameters(method: Any, counts: tuple[str, ...] = (), bounds: dict[str, Any] | None = None) -> None:
    """Refuses values out of range: those that methods have in common, and the given.

    Args:
        method: with `phases`, if it has a schedule.
        counts: fields that are positive whole numbers, or None where that is their default.
        bounds: for other fields that are numbers, or None likewise, a test and the words for it.

    Raises:
        ValueError: naming the method and the hyperparameter.
    """
    name, defaults = type(method).__name__, {field.name: field.default for field in fields(method)}
    given = {field: getattr(method, field) for field in defaults}
    given = {field: value for field, value in given.items() if value is not None or defaults[field] is not None}
    for field in counts:
        value = given.get(field, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}'s {field} must be a positive whole number, got {value!r}")
    for field, (holds, wanted) in {**_BOUNDS, **(bounds or {})}.items():
        value = given.get(field, 0.5)  # in all ranges
        if not isinstance(value, int | float) or isinstance(value, bool) or not holds(value):
            raise ValueError(f"{name}'s {field} must be {wanted}, got {value!r}")
    for field, value in given.items():
        if isinstance(defaults[field], bool) and not isinstance(value, bool):
            raise ValueError(f"{name}'s {field} must be True or False, got {value!r}")
    seed, most = given.get("seed", 0), given.get("max_rank")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"{name}'s seed must be a whole number of at least 0, got {seed!r}")
    if most is not None and most < method.rank:
        raise ValueError(f"{name}'s max_rank ({most}) is below the rank that it starts with ({method.rank})")
    if hasattr(method, "phases"):
        method.phases.check(name)


def check_rank(method: Any, site: Site) -> None:
    """Refuses a rank above the matrix's sides.

    Raises:
        ValueError: naming both.
    """
    side = min(site.in_size, site.out_size)
    for name in ("rank", "max_rank"):
        rank = getattr(method, name, None)
        if rank is not None and rank > side:
            raise ValueError(
                f"{name} {rank} is above the smaller side of the {site.in_size} x {site.out_size} matrix; "
                f"use {side} or less"
            )
