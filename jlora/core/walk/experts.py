"""Grouped products of experts (`ragged_dot`), computed by the weight's own update where that has such a use."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jlora.core.products.update import Linear
from jlora.core.walk import weight as weights
from jlora.core.walk.folding import big, is_float, side_of
from jlora.core.walk.interpreter import Walk, rule
from jlora.core.walk.weight import Weight


@rule("ragged_dot_general")
def ragged_dot(walk: Walk, eqn: Any, x: Any, weight: Any, group_sizes: Any, *offset: Any) -> list[Any] | None:
    """Rows of an activation in groups, each with the matrix of its expert."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_contract, contract), batch = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    by_rows = tuple(x_contract) == (1,) and groups and batch == ((), ()) and not offset
    if not isinstance(weight, Weight) or isinstance(x, Weight) or x.ndim != 2 or not by_rows:
        return None
    owned = weight.owns("experts") and is_float(x)
    if not owned or side_of(weight, contract, groups) != "in" or len(big(weight.batch)) != 1:
        return None
    stacked = next(iter(big(weight.batch)))
    if weight.axes[groups[0]] != (stacked,):
        return None
    walk.seen.add(weight.name)
    return [_by_expert(walk, eqn, x, weight, stacked.size, group_sizes).reshape(eqn.outvars[0].aval.shape)]


def _by_expert(walk: Walk, eqn: Any, x: jax.Array, weight: Weight, count: int, group_sizes: jax.Array) -> jax.Array:
    stacked = partial(jax.tree.map, lambda m: m.reshape(count, *m.shape[len(weight.batch) :]))
    update, w = stacked(weights.update(weight)), stacked(weights.matrix(weight))
    expert = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(x.shape[0]), side="right", method="compare_all")

    def product(x: jax.Array, m: jax.Array, dtype: Any) -> jax.Array:
        precision = eqn.params["precision"]
        return jax.lax.ragged_dot(x, m, group_sizes, precision=precision, preferred_element_type=dtype)

    def rescale(y: jax.Array, scale: jax.Array) -> jax.Array:
        return y * scale[expert]

    linear = Linear(lambda x, dtype: product(x, w, dtype), product, product, rescale, eqn.outvars[0].aval.dtype)
    return update.experts(x, w, walk.next_key(weight.key, x), linear)
