"""Which weights of a model are kept in the form of a code, before any of them is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from jlora.core.protocol.code import Code
from jlora.core.protocol.method import Site
from jlora.core.protocol.readings import Sites
from jlora.core.transforms.sites import sites
from jlora.core.tree.quantize import keeping
from jlora.core.tree.spec import ALL_LINEAR, Keys, resolve
from jlora.paths import flatten_with_keys
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


def traced(model: nn.Module, params: Any) -> Sites:
    """How a model reads its weights."""
    return sites(model.apply, {"params": params}, jax.ShapeDtypeStruct((1, 8), jnp.int32))
