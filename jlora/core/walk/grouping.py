"""Products of one activation with several weights (q, k and v; gate and up), computed together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jlora import _compat
from jlora.core.walk import dot
from jlora.core.walk.interpreter import Walk
from jlora.core.walk.weight import Weight


def together(walk: Walk, eqns: list[Any], ahead: Callable[[Any], Any]) -> list[list[Any]] | None:
    """The outputs of contractions that share an operand, or None where each is computed by itself.

    Args:
        walk: the walk.
        eqns: the equations.
        ahead: the value of a variable, also of a weight that would be cast or reshaped only later; None where it has none yet.
    """
    uses = []
    for eqn in eqns:
        values = [ahead(atom) for atom in eqn.invars]
        one_weight = sum(isinstance(value, Weight) for value in values) == 1
        if any(value is None for value in values) or not one_weight or _compat.explicit_sharding(eqn.outvars[0].aval):
            return None
        uses.append(dot.use_of(eqn, *values))
    if any(use.x is not uses[0].x or not use.weight.method.matrix for use in uses):
        return None
    return dot.together(walk, uses)
