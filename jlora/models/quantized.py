"""Which weights of a model are kept in the form of a code, before any of them is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from jlora.core.protocol.code import Code
from jlora.core.protocol.method import Site
from jlora.core.protocol.readings import Sites
from jlora.core.protocol.stored import Stored
from jlora.core.transforms.lift import lift
from jlora.core.transforms.sites import sites
from jlora.core.tree.adapted import Adapted
from jlora.core.tree.quantize import keeping
from jlora.core.tree.spec import ALL_LINEAR, Keys, resolve
from jlora.paths import flatten_with_keys
from jlora.stored.int8 import Int8
from jlora.stored.names import NAMES, named


def spec_of(quantize: Any) -> Mapping[Any, Any]:
    """What `load(quantize=...)` asks for, as a spec of codes: a name or a code means all linear weights.

    Raises:
        ValueError: for a name that no code has.
        TypeError: for what is neither a name nor a code nor a spec.
    """
    if isinstance(quantize, str):
        quantize = named(quantize)
    if isinstance(quantize, Code):
        return {ALL_LINEAR: quantize}
    if not isinstance(quantize, Mapping):
        raise TypeError(
            f"quantize: wanted one of the names {', '.join(NAMES)}, a code such as jlora.NF4(), or a spec that maps patterns "
            f"to codes; got {type(quantize).__name__}"
        )
    return quantize


def sites_to_code(
    model: nn.Module, shapes: Mapping[Keys, tuple[int, ...]], dtypes: Mapping[Keys, np.dtype], spec: Mapping[Any, Any]
) -> dict[Keys, Site]:
    """The leaves of a model that a spec wants to be kept in the form of a code, by path; the model is only traced.

    Raises:
        TypeError, ValueError: as `jlora.quantize`, for all but the values.
    """
    flat = {path: jax.ShapeDtypeStruct(shape, dtypes[path]) for path, shape in shapes.items()}
    params = unflatten_dict(flat)
    found = resolve(flatten_with_keys(params)[0], keeping(spec), traced(model, params))
    return {site.keys: site for site in found}


def fitting(code: Code, model: nn.Module, params: Any) -> tuple[dict[Any, Any], dict[str, str]]:
    """A spec of one code for all linear weights whose sizes it takes, and why it does not take the others, by path.

    Args:
        code: the code.
        model: the model.
        params: its params, of which shapes are enough.
    """
    leaves, refused = flatten_with_keys(params)[0], {}
    # A code that takes every size.
    for site in resolve(leaves, keeping({ALL_LINEAR: Int8()}), traced(model, params)):
        try:
            code.check(site.in_size, site.out_size)
        except ValueError as error:
            refused[site.path] = str(error)
    return {**{re.escape(path): None for path in refused}, ALL_LINEAR: code}, refused


def traced(model: nn.Module, params: Any) -> Sites:
    """How a model reads its weights."""
    return sites(model.apply, {"params": params}, example(model, 8))


def example(model: Any, length: int = 1) -> jax.ShapeDtypeStruct:
    """The shape of the least that a model reads: one image, or one text of `length` tokens."""
    image: tuple[int, ...] | None = getattr(getattr(model, "config", None), "image_shape", None)
    if image is not None:
        return jax.ShapeDtypeStruct((1, *image), jnp.float32)
    return jax.ShapeDtypeStruct((1, length), jnp.int32)


def one_matrix(leaf: Stored, layer: int) -> jax.Array:
    """One layer of a leaf that stacks layers, decoded; nothing else of it is, where its roles say that it is a stack."""
    if leaf.batch_axes != (0,):
        return whole(leaf)[layer]
    down = lambda axes: tuple(axis - 1 for axis in axes)  # noqa: E731
    fields = {name: array[layer] for name, array in leaf.fields.items()}
    roles = down(leaf.in_axes), down(leaf.out_axes)
    return whole(Stored(fields, leaf.code, leaf.shape[1:], leaf.dtype, *roles, common=leaf.common))


@jax.jit
def whole(leaf: Stored) -> jax.Array:
    """A leaf decoded, without the arrays between."""
    return leaf.decoded()


def runnable(apply: Callable[..., Any], params: Any) -> Callable[..., Any]:
    """The function that runs a model on its params: lifted where some of them are kept in the form of a code."""
    leaves, _ = flatten_with_keys(params, lambda node: isinstance(node, Adapted))
    return lift(apply) if any(isinstance(leaf, Stored) for _, leaf in leaves) else apply


def refuse_codes(variables: Any) -> None:
    """Refuses params of which some are kept in the form of a code, where Flax would see matrices of wrong shapes.

    Raises:
        TypeError: with what can be done.
    """
    for _, leaf in flatten_with_keys(variables)[0]:
        if isinstance(leaf, Stored):
            leaf.__array__()
