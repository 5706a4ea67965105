"""Where the values of a traced function come from: from its data, from leaves of its params alone, or from neither.

`jlora.sites` needs this to tell weights from activations. A weight that is multiplied by a mask is still a weight, and it
enters the model where it, or what is made of it, meets an activation in a product. A table of positions that is added to an
activation enters in no product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jlora import _compat

_PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")
#: The parameters of equations that hold a program to be run on the equation's operands, in the same order.
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")


@dataclass(frozen=True)
class Origin:
    """Where one value comes from.

    Attributes:
        data: whether from the function's data, in part at least.
        leaves: the leaves of the params that it is made of; empty where data is in it.
    """

    data: bool = False
    leaves: frozenset[str] = frozenset()

    def __or__(self, other: Origin) -> Origin:
        """The origin of a value that is made of two others."""
        if self.data or other.data:
            return DATA
        return Origin(False, self.leaves | other.leaves)


DATA, CONSTANT = Origin(True), Origin()


@dataclass
class Origins:
    """The origins of all values of a jaxpr and of the programs in it.

    Attributes:
        of_variable: the origin of each variable; for a program that runs at several places, that of all runs together.
        entered: the leaves of which, without data, one operand of a product is made while the other operand is data.
        of_leaves_alone: whether the function has no arguments but leaves. Its data is then what it closes over or makes, so
            every value that is made of no leaf counts as data, and a mask can't be told from an activation.
    """

    of_variable: dict[Any, Origin] = field(default_factory=dict)
    entered: set[str] = field(default_factory=set)
    of_leaves_alone: bool = False

    def of(self, atom: Any) -> Origin:
        """The origin of a variable, or of a literal, which is a constant."""
        return CONSTANT if hasattr(atom, "val") else self.of_variable.get(atom, CONSTANT)

    def is_data(self, atom: Any) -> bool:
        """Whether data is in an array. A scalar counts as no data: it scales a weight, whatever it is made of."""
        return atom.aval.ndim > 0 and self.of(atom).data

    def run(self, jaxpr: Any, consts: Sequence[Origin], args: Sequence[Origin]) -> list[Origin]:
        """Finds the origins in a jaxpr, and gives those of its outputs."""
        for variable, origin in zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args)):
            self._set(variable, origin)
        for eqn in jaxpr.eqns:
            for variable, origin in zip(eqn.outvars, self._equation(eqn)):
                self._set(variable, origin)
        return [self.of(atom) for atom in jaxpr.outvars]

    def _set(self, variable: Any, origin: Origin) -> None:
        if self.of_leaves_alone and origin == CONSTANT and variable.aval.ndim:
            origin = DATA
        self.of_variable[variable] = self.of_variable.get(variable, CONSTANT) | origin

    def _equation(self, eqn: Any) -> list[Origin]:
        values = [self.of(atom) for atom in eqn.invars]
        special = _SPECIAL.get(eqn.primitive.name)
        if special is not None:
            return special(self, eqn, values)
        body = next((eqn.params[key] for key in _BODIES if key in eqn.params), None)
        if body is not None and len(_compat.open_jaxpr(body)[0].invars) == len(values):
            return self.inside(body, values)
        if body is not None or "jaxprs" in eqn.params:  # which operand becomes which input is unknown
            data = any(value.data for value in values)
            self.entered |= _all(value for value in values if not value.data).leaves if data else frozenset()
        arrays = [value for atom, value in zip(eqn.invars, values) if atom.aval.ndim]
        return [_all(arrays or values)] * len(eqn.outvars)

    def inside(self, closed: Any, values: Sequence[Origin]) -> list[Origin]:
        """`run` for a program that an equation holds."""
        jaxpr, consts = _compat.open_jaxpr(closed)
        return self.run(jaxpr, [CONSTANT] * len(consts), values)


def _all(origins: Iterable[Origin]) -> Origin:
    return reduce(Origin.__or__, origins, CONSTANT)


def _product(origins: Origins, eqn: Any, values: list[Origin]) -> list[Origin]:
    first, second = values[:2]
    for one, other in ((first, second), (second, first)):
        if other.data and not one.data:
            origins.entered |= one.leaves
    return [_all(values)] * len(eqn.outvars)


def _lookup(origins: Origins, eqn: Any, values: list[Origin]) -> list[Origin]:
    """Rows of a table are an activation; a matrix out of a stack is still a weight, even if data chose it."""
    matrix = eqn.outvars[0].aval.ndim >= 2 and eqn.invars[0].aval.ndim >= 3
    return [values[0] if matrix and values[0].leaves else _all(values)]


def _slice(origins: Origins, eqn: Any, values: list[Origin]) -> list[Origin]:
    return [values[0] if values[0].leaves else _all(values)]


def _select(origins: Origins, eqn: Any, values: list[Origin]) -> list[Origin]:
    """One weight or another is a weight, even if data chooses: `vmap` turns a `switch` over experts into such a selection."""
    cases = values[1:]
    return [_all(cases if all(case.leaves for case in cases) else values)]


def _scan(origins: Origins, eqn: Any, values: list[Origin]) -> list[Origin]:
    consts, carried = _compat.scan_counts(eqn.params)
    fixed, carry, xs = values[:consts], values[consts : consts + carried], values[consts + carried :]
    return _until_stable(carry, lambda carry: origins.inside(eqn.params["jaxpr"], [*fixed, *carry, *xs]))


def _while(origins: Origins, eqn: Any, values: list[Origin]) -> list[Origin]:
    tests, bodies = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    fixed, carry = values[tests : tests + bodies], values[tests + bodies :]
    return _until_stable(carry, lambda carry: origins.inside(eqn.params["body_jaxpr"], [*fixed, *carry]))


def _until_stable(carry: list[Origin], step: Callable[[list[Origin]], list[Origin]]) -> list[Origin]:
    """The outputs of a loop's step, which is repeated until the origins of what it carries no longer grow."""
    while True:
        outputs = step(carry)
        after = [before | now for before, now in zip(carry, outputs)]
        if after == carry:
            return outputs
        carry = after


def _cond(origins: Origins, eqn: Any, values: list[Origin]) -> list[Origin]:
    outputs = [origins.inside(branch, values[1:]) for branch in eqn.params["branches"]]
    return [_all(each) for each in zip(*outputs)]


_SPECIAL = {
    **dict.fromkeys(_PRODUCTS, _product),
    "gather": _lookup,
    "dynamic_slice": _slice,
    "select_n": _select,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}


def find(jaxpr: Any, consts: Sequence[Any], names: Sequence[str]) -> Origins:
    """The origins in a function whose inputs are leaves of the params.

    `jlora.sites` traces the other arguments outside of this function, so they are constants of its jaxpr that are tracers
    themselves: these are the data, but for random keys. What the function closes over is concrete, and counts as a constant
    such as a mask or a permutation, unless there is no other data.

    Args:
        jaxpr: of the function of the leaves.
        consts: the values of its constants.
        names: the names of the leaves.
    """
    traced = [isinstance(value, Tracer) and not _is_key(value) for value in consts]
    origins = Origins(of_leaves_alone=not any(traced))
    origins.run(
        jaxpr, [DATA if each else CONSTANT for each in traced], [Origin(False, frozenset({name})) for name in names]
    )
    return origins


def _is_key(value: Any) -> bool:
    raw = value.dtype == np.uint32 and value.shape == (2,)
    return raw or jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key)
