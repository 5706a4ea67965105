"""Which weights are a function's heads: its last products, whose results are its outputs.

A *head* is a weight whose product with an activation reaches an output of the function without meeting another weight in a
product, and without being added to a residual stream. Everything else may lie between: a bias, a norm with its scale, a
softcap, dropout, casts, slices, pooling, an argmax. A function may have several heads (logits and a value), and a head may
also be an embedding (tied). A product is added to a residual stream where the other summand is something that the
product was computed from, as in `h + tanh(h) @ b`: so a model that ends in hidden states has no head, scanned or unrolled,
with or without a last norm. Two products of which neither was computed from the other's value, `x @ a + y @ b`, are both
heads. A pooler that is the last product of what a model returns is a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from jlora import _compat

_PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")
_INLINE = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call")
_SUMS = ("add", "sub", "add_any", "scatter-add", "scatter_add")
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr", "body_jaxpr", "branches", "jaxprs")
_Sources = frozenset[int]
_NONE: _Sources = frozenset()


@dataclass(frozen=True)
class _Value:
    """What is known of a value.

    Attributes:
        leaves: the leaves that it is made of, if of nothing else; for rows that were looked up in a table, the table.
        activation: whether data went into it.
        products: the products with weights that it comes from, with no other such product between.
        stream: the points of the program (inputs, lookups, products, broadcasts) that it continues, as the residual stream of
            a model does. Empty for integers, booleans and what is made of them: a mask continues nothing.
    """

    leaves: tuple[str, ...] = ()
    activation: bool = False
    products: _Sources = _NONE
    stream: _Sources = _NONE


@dataclass
class _Search:
    """One pass over a program.

    Attributes:
        closed_over: whether the function has no arguments but leaves. Then what it closes over or makes is its data; else that
            is constant, such as a mask.
        names: the leaves of each product, by the number of its point.
        before: for each point the points that it was computed from.
        struck: the products that are no heads.
    """

    closed_over: bool
    names: dict[int, tuple[str, ...]] = field(default_factory=dict)
    before: list[_Sources] = field(default_factory=list)
    struck: set[int] = field(default_factory=set)

    def point(self, values: list[_Value]) -> int:
        """Adds a point that is computed from values, and returns its number."""
        sources = _NONE.union(*(value.stream for value in values))
        self.before.append(sources.union(*(self.before[n] for n in sources)))
        return len(self.before) - 1

    def data(self, var: Any) -> _Value:
        """What is known of an input of the function that is data."""
        return _Value(activation=True, stream=frozenset({self.point([])}) if _is_float(var) else _NONE)

    def evaluate(self, jaxpr: Any, values: list[_Value]) -> list[_Value]:
        env = {var: self.data(var) if self.closed_over else _Value() for var in jaxpr.constvars}
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
        activation = any(value.activation for value in values)
        if self.closed_over and not activation and not any(value.leaves for value in values):
            return [self.data(var) for var in eqn.outvars]  # made by the function itself
        weights = _weights(name, values)
        if weights and activation and (name in _PRODUCTS or body is not None):
            return [self._used(name, weights, values)] * len(eqn.outvars)
        if name in _SUMS:
            self._strike_residual(values)
        if name == "dynamic_slice" and values[0].leaves and not values[0].activation:
            return [values[0]]  # a layer of a stack; the index is no part of it
        if name == "gather" and values[0].leaves:
            # Rows of a table are an activation, wherever their numbers come from.
            return [_Value(values[0].leaves, True, _NONE, frozenset({self.point(values)}))]
        single = not activation or len(values) == 1
        leaves = tuple(dict.fromkeys(leaf for value in values for leaf in value.leaves)) if single else ()
        products = _NONE.union(*(value.products for value in values))
        stream = _NONE.union(*(value.stream for value in values))
        if name == "broadcast_in_dim" and eqn.outvars[0].aval.size != eqn.invars[0].aval.size:
            stream = frozenset({self.point(values)}) if stream else _NONE
        return [_Value(leaves, activation, products, stream if _is_float(var) else _NONE) for var in eqn.outvars]

    def _used(self, name: str, weights: tuple[str, ...], values: list[_Value]) -> _Value:
        """The result of a product with a weight, or of a loop or branch with weights inside."""
        for value in values:
            self.struck |= value.products
        at = self.point(values)
        if name not in _PRODUCTS:
            return _Value(activation=True, stream=frozenset({at}))
        self.names[at] = weights
        return _Value(activation=True, products=frozenset({at}), stream=frozenset({at}))

    def _strike_residual(self, values: list[_Value]) -> None:
        for value in values:
            for other in values:
                ahead = value.products - other.products
                self.struck |= {product for product in ahead if other.stream & self.before[product]}


def _weights(name: str, values: list[_Value]) -> tuple[str, ...]:
    """The leaves that an equation uses as weights: those without data in them; in a product else those that were looked up."""
    whole = tuple(leaf for value in values if not value.activation for leaf in value.leaves)
    looked_up = tuple(leaf for value in values for leaf in value.leaves) if name in _PRODUCTS else ()
    return whole or looked_up


def _is_float(var: Any) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.inexact)


def find(closed: Any, leaves: list[str]) -> set[str]:
    """The leaves that are heads of a traced function.

    Args:
        closed: the function's jaxpr; its first inputs are the leaves, the rest are data.
        leaves: their names.
    """
    jaxpr = _compat.live(_compat.open_jaxpr(closed)[0])
    search = _Search(closed_over=len(jaxpr.invars) == len(leaves))
    values = [_Value(leaves=(name,)) for name in leaves]
    values += [search.data(var) for var in jaxpr.invars[len(leaves) :]]
    outputs = search.evaluate(jaxpr, values)
    reached = _NONE.union(*(value.products for value in outputs))
    return {name for product in reached - search.struck for name in search.names[product]}
