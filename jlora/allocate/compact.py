"""From adapters with allocated ranks to plain LoRA of the ranks that are left."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora import paths
from jlora.adapted import Adapted, Plan
from jlora.allocate import triplets
from jlora.allocate.triplets import Triplet
from jlora.method import Method
from jlora.methods.adalora import AdaLoRA
from jlora.methods.elalora import ElaLoRA
from jlora.methods.lora import LoRA

_ALLOCATED = (AdaLoRA, ElaLoRA)


def compact(adapted: Adapted) -> Adapted:
    """The same adapters as plain `LoRA`: columns with `e = 0` are dropped, `e` is multiplied into `a`, the scale stays.

    For after the training, to store and serve less. Every leaf gets the rank it has left, at least 1; a stacked leaf that
    of the matrix with most ranks, with zeros at the others. Inside another method, as in `DoRA(AdaLoRA(...))`, the inner one
    becomes LoRA. Leaves of other methods stay as they are.

    Raises:
        TypeError: under `jit`, since the ranks decide the shapes.

    Example:
        >>> small = jlora.compact(adapted)
    """
    params, sites = adapted.params, []
    for site in adapted.plan.sites:
        inner = _inner(site.method)
        if inner is not None:
            (factor,) = triplets.read(params, [site])
            fields, rank = _fields(factor)
            others = {k: v for k, v in paths.lookup(params, site.keys).items() if k not in Triplet._fields}
            params = triplets.put(params, site.keys, {**others, **fields})
            plain = LoRA(rank=rank, alpha=inner.scale * rank, dropout=inner.dropout)
            site = dataclasses.replace(site, method=_swapped(site.method, plain))
        sites.append(site)
    return adapted.replace(params=params, plan=Plan(tuple(sites)))


def _inner(method: Any) -> AdaLoRA | ElaLoRA | None:
    if isinstance(method, _ALLOCATED):
        return method
    inside = (getattr(method, field.name) for field in dataclasses.fields(method))
    return next((found for each in inside if isinstance(each, Method) and (found := _inner(each))), None)


def _swapped(method: Any, plain: LoRA) -> Method:
    if isinstance(method, _ALLOCATED):
        return plain
    inside = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    return dataclasses.replace(method, **{n: _swapped(v, plain) for n, v in inside.items() if isinstance(v, Method)})


def _fields(factor: Triplet) -> tuple[dict[str, jax.Array], int]:
    """LoRA's factors of the ranks in use, those first."""
    if isinstance(factor.e, Tracer):
        raise TypeError("jlora.compact makes arrays whose shapes depend on values: call it outside of jit")
    used = np.asarray(jax.device_get(factor.e)) != 0
    rank = max(1, int(used.sum(-1).max()))
    order = np.argsort(~used, axis=-1, kind="stable")[..., :rank]
    a = jnp.take_along_axis(factor.a * factor.e[..., None, :], order[..., None, :], axis=-1)
    return {"a": a, "b": jnp.take_along_axis(factor.b, order[..., :, None], axis=-2)}, rank
