"""Updates that are added: products by the formed weight, gradients of its arrays by what the method does to the input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jlora.core.products.acting import Acting, plain_product
from jlora.core.products.contraction import Options, accumulation_dtype, choose, in_rows, matmul


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Added(Acting):
    """A method that acts as `product(x) + u(x)`, where `u` is made of its own arrays alone and is no product of the base's.

    In 32 bits, without dropout and with tokens enough (see `choose`) a product is one with the formed weight, made anew in
    every pass, so that no array of the output's size is added to another. The gradients of what the weight is made of are
    those of `u`, so that no dense gradient of the weight is needed. All else is as in `Acting`.
    """

    def dense(self, x: jax.Array, w: jax.Array, key: jax.Array | None, options: Options) -> jax.Array:
        """`x [..., in] @ v`, or `apply` where an input is dropped, or where forming `v` costs exactness or more time."""
        drops = key is not None and self.view.site.method.uses_key
        wide = x.dtype == accumulation_dtype(x.dtype) == w.dtype
        if drops or not wide or not self._formed_is_cheaper(x, options):
            return super().dense(x, w, key, options)
        return in_rows(lambda x: _by_weight(x, self, options), x)

    def spoken(self, x: jax.Array, w: jax.Array, key: jax.Array | None, options: Options) -> tuple[jax.Array, Any]:
        """What `apply` says, and `dense` for a method that says nothing."""
        y, said = super().spoken(x, w, key, options)
        return (y, said) if said else (self.dense(x, w, key, options), {})

    def _formed_is_cheaper(self, x: jax.Array, options: Options) -> bool:
        plan = choose(options.plan, x.size // x.shape[-1], [self.view.w.shape], self.view.w.dtype, options.runs)
        return plan.forward[0] == "formed" and plan.backward

    def _product(self, x: jax.Array, options: Options) -> jax.Array:
        v = self.view.site.method.weight(self.view)
        v = v if self.number is None else v * self.number.astype(v.dtype)
        return matmul(x, v.astype(x.dtype), options.out_dtype, options.precision)


def _nothing(z: jax.Array, w: jax.Array, dtype: Any, wide: Any, precision: Any) -> jax.Array:
    """Zeros in the place of the base's product, where that has no tangent."""
    return jnp.zeros((*z.shape[:-1], w.shape[1]), wide)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _by_weight(x: jax.Array, update: Added, options: Options) -> jax.Array:
    """`x [T, in] @ v`."""
    # Tied to its input: else a compiler is free to form the weights of all layers before the first of them is used.
    x, update = jax.lax.optimization_barrier((x, update))
    return update._product(x, options)


@partial(_by_weight.defjvp, symbolic_zeros=True)
def _by_weight_jvp(options: Options, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """The tangent of the input by the weight, formed again; those of the update's arrays by `apply`.

    Both checkpointed: nothing but the input and the update's own arrays is kept for the backward pass. The barrier's
    transpose is one on the gradients: that of the input is not used before the others are there, after which nothing needs
    the output's.
    """
    x, update = primals
    leaves, structure = jax.tree.flatten(update)
    dx, *tangent = (None if isinstance(t, SymbolicZero) else t for t in (tangents[0], *jax.tree.leaves(tangents[1])))
    dx, tangent = jax.lax.optimization_barrier((dx, tangent))
    y, terms = _by_weight(x, update, options), []
    if dx is not None:
        terms.append(jax.checkpoint(lambda dx, update: update._product(dx, options))(dx, update))
    moved = [n for n, each in enumerate(tangent) if each is not None]
    if moved:
        still = all(t is None or isinstance(t, SymbolicZero) for t in (tangents[1].view.w, tangents[1].number))
        product = _nothing if still else plain_product

        @jax.checkpoint
        def act(x: jax.Array, leaves: list[jax.Array], those: list[jax.Array]) -> jax.Array:
            for n, each in zip(moved, those, strict=True):
                leaves = [*leaves[:n], each, *leaves[n + 1 :]]
            return jax.tree.unflatten(structure, leaves)._applied(x, None, options, product)[0]

        those, moving = ([each[n] for n in moved] for each in (leaves, tangent))
        terms.append(jax.jvp(lambda those: act(x, leaves, those), (those,), (moving,))[1])
    return y, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(y)
