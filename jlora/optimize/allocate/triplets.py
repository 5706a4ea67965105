"""The factors of adapted leaves and the gate between them, taken out of trees laid out like `adapted.params` and put back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora import _compat, paths
from jlora.core.protocol.method import Site

Sites = Sequence[Site]
#: Names of a method's `a`, gate and `b`; None for what it does not have.
Fields = tuple[str, str | None, str]
FIELDS: Fields = ("a", "e", "b")


class Triplet(NamedTuple):
    """Something for each factor of a leaf; the leaf's batch axes come first, and each stacked matrix is a module.

    Attributes:
        a: of `a [*batch, in, r]`.
        e: of the gate `[*batch, r]`: AdaLoRA's `e`, SoRA's `g`, BeamLoRA's score.
        b: of `b [*batch, r, out]`.
    """

    a: Any
    e: Any
    b: Any


#: Nothing for any of the three.
NOTHING = Triplet(None, None, None)


def read(tree: Any, sites: Sites, fields: Fields = FIELDS) -> list[Triplet]:
    """The factors of every site; None for those that have no name."""
    return [Triplet(*(paths.lookup(tree, (*site.keys, name)) if name else None for name in fields)) for site in sites]


def write(tree: Any, sites: Sites, triplets: Sequence[Triplet], fields: Fields = FIELDS) -> Any:
    """The tree with the factors of every site replaced; one that is None, or has no name, stays as it is."""
    for site, triplet in zip(sites, triplets, strict=True):
        for name, value in zip(fields, triplet):
            if name and value is not None:
                tree = put(tree, (*site.keys, name), value)
    return tree


def put(tree: Any, keys: tuple[str, ...], value: Any) -> Any:
    """A copy of a nested dict with another value at `keys`."""
    if not keys:
        return value
    return {**tree, keys[0]: put(tree[keys[0]], keys[1:], value)}


def only(function: Callable[[Any], Any], tree: Any, sites: Sites, fields: Fields = FIELDS) -> Any:
    """The tree with a function applied to the sites' factors, and `optax.MaskedNode` in place of all else.

    `optax.tree_map_params` takes such a tree for one laid out like the params, and it holds no array for what is not a site's.
    """
    wanted = {(*site.keys, name) for site in sites for name in fields if name}
    leaves, treedef = paths.flatten_with_keys(tree)
    return jax.tree.unflatten(treedef, [function(x) if keys in wanted else optax.MaskedNode() for keys, x in leaves])


def along_rank(mask: jax.Array) -> Triplet:
    """A mask of ranks `[*batch, r]`, for each factor in a shape that broadcasts to it."""
    return Triplet(mask[..., None, :], mask, mask[..., :, None])


def taken(array: jax.Array, index: jax.Array | np.ndarray, axis: int) -> jax.Array:
    """`take_along_axis`, also where the other axes are cut over a mesh with explicit axes."""
    return _compat.automatic(partial(jnp.take_along_axis, axis=axis), jax.typeof(array))(array, index)


def names(sites: Sites) -> list[str]:
    """The modules: a leaf's path, with the index of the matrix where the leaf is a stack."""
    return [
        site.path + (f"[{','.join(map(str, index))}]" if index else "")
        for site in sites
        for index in np.ndindex(*site.batch_shape)
    ]


def table(values: Sequence[jax.Array], fill: Any) -> jax.Array:
    """Arrays `[*batch, r]` of several sites as one of `[modules, largest r]`, filled up with `fill`."""
    width = max(value.shape[-1] for value in values)
    rows = [value.reshape(-1, value.shape[-1]) for value in values]
    return jnp.concatenate([jnp.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=fill) for x in rows])


def split(whole: jax.Array, like: Sequence[jax.Array], own_axes: int = 1) -> list[jax.Array]:
    """The inverse of `table`.

    Args:
        whole: `[modules, ...]`.
        like: arrays of the shapes that the parts get.
        own_axes: how many of their last axes belong to one module: 1 for ranks `[*batch, r]`, 2 for matrices of one shape.
    """
    batches = [x.shape[: x.ndim - own_axes] for x in like]
    starts = np.cumsum([0, *(math.prod(batch) for batch in batches)])
    parts = [whole[start:end, ..., : x.shape[-1]] for start, end, x in zip(starts, starts[1:], like)]
    return [part.reshape(x.shape) for part, x in zip(parts, like)]
