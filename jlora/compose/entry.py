"""What a bank holds of an adapter: its leaves as factors and gains, whatever method they had."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jlora.compose import plain
from jlora.compose.combine import check_one_base
from jlora.compose.slotted import Slotted
from jlora.core.products.low_rank import Factors
from jlora.core.protocol.method import Arrays, Site
from jlora.core.protocol.wrapping import innermost, parts
from jlora.core.tree.adapted import Adapted, Plan
from jlora.core.tree.stacked import Stacked
from jlora.core.walk import weight as weights_of
from jlora.core.walk.weight import Weight
from jlora.disk import folders
from jlora.disk.serialize import is_own
from jlora.prompts.virtual import Virtual

Source = Adapted | str | os.PathLike[str]
Fields = dict[tuple[str, ...], Arrays]


@dataclass(frozen=True)
class Entry:
    """One adapter as a bank holds it: sites with the `Slotted` of its rank, and arrays without a slot axis."""

    sites: dict[tuple[str, ...], Site]
    arrays: Fields


def entry_of(name: str, source: Source, params: Any, names: Any) -> Entry:
    """An adapter's leaves in the form of a bank.

    Raises:
        ValueError: for a leaf that has no such form, or is not finite, with the adapter, the path and the method.
    """
    if isinstance(source, Adapted | Stacked):
        adapted = source if isinstance(source, Adapted) else source.plan  # which refuses
        check_one_base([Adapted(params, {}, {}, {}, Plan(())), adapted])
    else:
        adapted = folders.read(source, params, names)
    sites, arrays = {}, {}
    for weight, site in zip(adapted.replace(context={}).weights(), adapted.plan.sites, strict=True):
        found = _factors(weight, site)
        if isinstance(innermost(site.method), Virtual):
            raise ValueError(
                f"{site.path}: {site.method} of {name!r} stands in front of a text, where no bank has slots: use it by itself"
            )
        if found is None:
            raise ValueError(
                f"{site.path}: {site.method} of {name!r} is no (w + a @ b) * gain, so no bank holds it; the nearest LoRA to "
                'what it does to a matrix is jlora.combine([adapted], [1.0], "svd", rank=...)'
            )
        gain = {} if found.scale is None else {"gain": found.scale}
        arrays[site.keys] = {"a": found.a, "b": found.b, **gain}
        if not all(bool(jnp.all(jnp.isfinite(array))) for array in arrays[site.keys].values()):
            # Beside others it could reach their rows: where all slots are computed, zero times it is not zero.
            raise ValueError(f"{site.path}: {name!r} holds values that are not finite")
        sites[site.keys] = replace(site, method=Slotted(1, found.a.shape[-1] or 1, bool(gain)), beside=())
    return Entry(sites, arrays)


def _factors(weight: Weight, site: Site) -> Factors | None:
    """A leaf's effective weight as factors, scales folded into `b`; None where it has none, or changes what is beside it."""
    if not site.method.matrix or not site.method.mergeable or weight.beside:
        return None
    found = plain.factors(weight)
    if found is not None:
        return Factors(found.a * found.gates[..., None, :], found.scale * found.b)
    if site.method.form is Factors and all(is_own(type(part)) for part in parts(site.method)):
        update = jax.jit(weights_of.update)(weight)
        assert isinstance(update, Factors)
        return update
    return None


def check_alike(first: Site, other: Site) -> None:
    """Refuses two sites that read a leaf in different ways."""
    axes = [(site.batch_axes, site.in_axes, site.out_axes) for site in (first, other)]
    if axes[0] != axes[1]:
        raise ValueError(
            f"{first.path}: one adapter has its axes (batch, in, out) as {axes[0]}, another as {axes[1]}; adapt the leaf alike"
        )
