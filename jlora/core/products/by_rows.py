"""Gradients of a method's arrays where a mesh cuts the rows of activations: summed over devices last, when they are small."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

Product = Callable[[jax.Array, Any], jax.Array]


def by_rows(product: Product, x: jax.Array, arrays: Any, pieces: int) -> jax.Array:
    """`product(x [..., in], arrays)`, with gradients of the arrays that are taken by pieces of the rows, and then added up.

    Where they come from a dense gradient `xᵀ g` of the weight, a compiler sums that over devices as soon as each has its own.
    Taken piece by piece, each device goes on from its own to the gradients of the arrays, and those are summed, where they are
    smaller.

    Args:
        product: the product; each row of its result depends on the same row of `x` alone.
        x: the activation.
        arrays: a tree of what else it is made of.
        pieces: into how many the mesh cuts the rows. Rows that they don't divide can't be cut so, and are taken as one piece.
    """
    tokens = x.size // x.shape[-1]
    if pieces == 1 or not isinstance(tokens, int) or tokens % pieces:  # no int is what `jax.export` leaves open
        return product(x, arrays)
    leaves, structure = jax.tree.flatten(arrays)
    return _by_rows(x, leaves, lambda x, leaves: product(x, jax.tree.unflatten(structure, leaves)), pieces)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _by_rows(x: jax.Array, leaves: list[jax.Array], product: Product, pieces: int) -> jax.Array:
    return product(x, leaves)


@partial(_by_rows.defjvp, symbolic_zeros=True)
def _by_rows_jvp(product: Product, pieces: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """The tangent of the input as the product has it; those of the arrays with a copy of them for each piece.

    The barrier's transpose is one on the gradients: that of the input is not used before the others are there, after which
    nothing needs the output's.
    """
    x, leaves = primals
    dx, *each = (None if isinstance(t, SymbolicZero) else t for t in (tangents[0], *tangents[1]))
    moved = [n for n, t in enumerate(each) if t is not None]
    dx, moving = jax.lax.optimization_barrier((dx, [each[n] for n in moved]))
    y, terms = _by_rows(x, leaves, product, pieces), []
    if dx is not None:
        terms.append(jax.jvp(lambda x: product(x, leaves), (x,), (dx,))[1])
    if moved and sum(leaves[n].size for n in moved) > x.shape[-1] * y.shape[-1]:
        pieces = 1  # the dense gradient is the smaller
    if moved:
        cut = x.reshape(pieces, -1, x.shape[-1])

        def of_piece(x: jax.Array, those: list[jax.Array]) -> jax.Array:
            known = dict(zip(moved, those, strict=True))
            return product(x, [known.get(n, leaf) for n, leaf in enumerate(leaves)])

        def of_copies(those: list[jax.Array]) -> jax.Array:
            copies = [jnp.broadcast_to(leaf, (pieces, *leaf.shape)) for leaf in those]
            return jax.vmap(of_piece)(cut, copies)

        terms.append(jax.jvp(of_copies, ([leaves[n] for n in moved],), (moving,))[1].reshape(y.shape))
    return y, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(y)
