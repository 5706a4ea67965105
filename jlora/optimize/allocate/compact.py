"""From adapters with allocated ranks to plain LoRA of the ranks that are left."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora import paths
from jlora.core.protocol.gated import Gated
from jlora.core.protocol.method import Arrays, Method
from jlora.core.protocol.wrapping import Around, innermost, with_innermost
from jlora.core.tree.adapted import SHARED, Adapted, Plan
from jlora.disk.serialize import is_own
from jlora.methods.lora import LoRA
from jlora.optimize.allocate import triplets
from jlora.optimize.restart import unchained


def compact(adapted: Adapted) -> Adapted:
    """The same adapters as plain `LoRA`: ranks whose gate is 0 are dropped, the gates go into `a`, the scale stays.

    For use after training, to store and serve less. Every leaf gets the rank it has left, at least 1; a stacked leaf gets the
    largest rank that any of its matrices has left, with zeros in the others. Inside another method, as in
    `DoRA(AdaLoRA(...))`, the inner one becomes LoRA. A `Chain` becomes LoRA of its finished links and the present one. Leaves
    of methods without gates or links stay as they are. So do leaves of your own classes that change the weight of
    `Gated`, or go around another method.

    Raises:
        TypeError: under `jit`, since the ranks decide the shapes.

    Example:
        >>> small = jlora.compact(adapted)
    """
    adapted = unchained(adapted)
    params, sites = adapted.params, []
    frozen: dict[str, Any] = {SHARED: adapted.frozen[SHARED]} if SHARED in adapted.frozen else {}
    for site in adapted.plan.sites:
        inner, constant = innermost(site.method), paths.lookup(adapted.frozen, site.keys)
        if _is_gated(site.method):
            trained = paths.lookup(params, site.keys)
            fields, rank = _fields(trained["a"], inner.gates({**constant, **trained}), trained["b"])
            params = triplets.put(params, site.keys, {**_others(trained, inner), **fields})
            constant = _others(constant, inner)
            plain = LoRA(rank=rank, alpha=inner.scale * rank, dropout=inner.dropout)  # type: ignore[attr-defined]
            site = dataclasses.replace(site, method=with_innermost(site.method, plain))
        sites.append(site)
        if constant:
            paths.insert(frozen, site.keys, constant)
    return adapted.replace(params=params, frozen=frozen, plan=Plan(tuple(sites)))


def _is_gated(method: Method) -> bool:
    """Whether the innermost method's weight is LoRA's with gates, so that LoRA can take its place in what is around it."""
    if isinstance(method, Around):
        return is_own(type(method)) and _is_gated(method.inner)
    changed = [
        name
        for name in ("weight", "factors", "_parts")
        if getattr(type(method), name, None) is not getattr(Gated, name)
    ]
    return isinstance(method, Gated) and not changed


def open_gates(adapted: Adapted) -> dict[str, int]:
    """The number of gates that are not zero, by module, of the methods that have gates."""
    found: dict[str, int] = {}
    for site in adapted.plan.sites:
        if isinstance(inner := innermost(site.method), Gated):
            fields = {**paths.lookup(adapted.frozen, site.keys), **paths.lookup(adapted.params, site.keys)}
            numbers = (np.asarray(jax.device_get(inner.gates(fields))) != 0).sum(-1)
            found |= dict(zip(triplets.names([site]), map(int, numbers.ravel()), strict=True))
    return found


def _others(fields: Arrays, inner: Gated) -> Arrays:
    """The arrays that are not the inner method's."""
    return {name: value for name, value in fields.items() if name not in inner.axes}


def _fields(a: jax.Array, gates: jax.Array, b: jax.Array) -> tuple[dict[str, jax.Array], int]:
    """LoRA's factors with the ranks in use moved to the front and the others cut off, and the largest number of them."""
    if isinstance(gates, Tracer):
        raise TypeError("jlora.compact makes arrays whose shapes depend on values: call it outside of jit")
    used = np.asarray(jax.device_get(gates)) != 0
    rank = max(1, int(used.sum(-1).max()))
    order = np.argsort(~used, axis=-1, kind="stable")[..., :rank]
    a = jnp.take_along_axis(a * gates[..., None, :], order[..., None, :], axis=-1)
    return {"a": a, "b": jnp.take_along_axis(b, order[..., :, None], axis=-2)}, rank
