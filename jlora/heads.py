"""Which weight is a function's head: the last product, whose result is the output.

A product with a weight is a candidate. It is struck off when its result meets another weight further on, or is added to an
activation that does not come from it (a residual stream). What reaches the output is a head: a language model's output
matrix, a classifier's last layer; but not the last feed-forward layer of an encoder without a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jlora import _compat

_PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")
_INLINE = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call")
_RESIDUAL = ("add", "sub", "add_any")
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")


@dataclass(frozen=True)
class _Value:
    """What is known of a value: the leaf that it is, whether it is an activation, the products that it comes from."""

    leaf: str | None = None
    activation: bool = False
    products: frozenset[int] = frozenset()


@dataclass
class _Search:
    names: list[str] = field(default_factory=list)
    struck: set[int] = field(default_factory=set)

    def evaluate(self, jaxpr: Any, values: list[_Value]) -> list[_Value]:
        env = dict(zip(jaxpr.constvars, [_Value(activation=True)] * len(jaxpr.constvars), strict=True))
        env.update(zip(jaxpr.invars, values, strict=True))

        def read(atom: Any) -> _Value:
            return _Value() if hasattr(atom, "val") else env[atom]

        for eqn in jaxpr.eqns:
            env.update(zip(eqn.outvars, self.equation(eqn, [read(atom) for atom in eqn.invars]), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        name = eqn.primitive.name
        body = next((eqn.params[key] for key in _BODIES if key in eqn.params), None)
        if name in _INLINE and body is not None:
            return self.evaluate(_compat.open_jaxpr(body)[0], values)
        leaves = [value.leaf for value in values if value.leaf is not None]
        products = frozenset().union(*(value.products for value in values)) if values else frozenset()
        activation = any(value.activation for value in values)
        if leaves and activation and (name in _PRODUCTS or body is not None or "branches" in eqn.params):
            self.struck |= products
            products = frozenset({len(self.names)}) if name in _PRODUCTS else frozenset()
            self.names += leaves[:1] if name in _PRODUCTS else []
        elif name in _RESIDUAL:
            self._strike_residual(values)
        leaf = leaves[0] if len(values) == 1 and leaves else None
        return [_Value(leaf, activation, products)] * len(eqn.outvars)

    def _strike_residual(self, values: list[_Value]) -> None:
        if any(value.activation and not value.products for value in values):
            for value in values:
                self.struck |= value.products


def find(closed: Any, leaves: list[str]) -> set[str]:
    """The leaves that are heads of a traced function.

    Args:
        closed: the function's jaxpr; its first inputs are the leaves, the rest are data.
        leaves: their names.
    """
    jaxpr = _compat.live(_compat.open_jaxpr(closed)[0])
    data = [_Value(activation=True)] * (len(jaxpr.invars) - len(leaves))
    search = _Search()
    outputs = search.evaluate(jaxpr, [_Value(leaf=name) for name in leaves] + data)
    reached = frozenset().union(*(value.products for value in outputs)) if outputs else frozenset()
    return {search.names[product] for product in reached - search.struck}
