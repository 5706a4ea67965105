"""What a bank holds of an adapter: its leaves as factors and gains, whatever method they had."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.compose import plain
from jlora.compose.combine import check_one_base
from jlora.compose.kinds import OfKinds, kind_of, placed
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
#: Arrays of leaves by the names that they have in slots.
Placed = Mapping[tuple[str, ...], Mapping[str, Any]]


#: The largest change of a product, for inputs of 1, that norms can square in 32 bits.
_MOST = float(np.sqrt(np.finfo(np.float32).max))


@dataclass(frozen=True)
class Entry:
    """One adapter as a bank holds it: sites with the `Slotted` that it needs, and arrays without a slot axis.

    Arrays of a leaf are `a`, `b` and maybe `gain`; those of its method, where that is an `OfKinds`.
    """

    sites: dict[tuple[str, ...], Site]
    arrays: Fields


def entry_of(name: str, source: Source, params: Any, names: Any, dtype: Any = None) -> Entry:
    """An adapter's leaves in the form of a bank.

    Args:
        name: the adapter's, for messages.
        source: the adapter.
        params: the base.
        names: which torch parameter a leaf is, for PEFT's folders.
        dtype: in which factors are to be held.

    Raises:
        ValueError: for a leaf that has no such form, is not finite, or so large that sums would overflow, with the adapter, the
            path and the method.
    """
    adapted = adapted_of(source, params, names)
    sites, arrays = {}, {}
    for weight, site in zip(adapted.replace(context={}).weights(), adapted.plan.sites, strict=True):
        found = None if site.method.context else _factors(weight, site)
        if isinstance(innermost(site.method), Virtual):
            raise ValueError(
                f"{site.path}: {site.method} of {name!r} stands in front of a text, where no bank has slots: use it by itself"
            )
        if found is not None:
            gain = {} if found.scale is None else {"gain": found.scale}
            own, method = {"a": found.a, "b": found.b, **gain}, Slotted(1, found.a.shape[-1] or 1, bool(gain))
        else:
            other = kind_of(weight, site)
            if isinstance(other, str):
                raise ValueError(f"{site.path}: {site.method} of {name!r} {other}: use it by itself")
            own, method = other[1], OfKinds(1, 1, kinds=(other[0],))
        arrays[site.keys] = own
        _check_size(f"{site.path}: {name!r}", own, dtype)
        sites[site.keys] = replace(site, method=method, beside=())
    return Entry(sites, arrays)


def in_slots(name: str, entry: Entry, own: Mapping[tuple[str, ...], Site], remedy: str) -> Placed:
    """An adapter's arrays of each leaf, by the names that they have in slots.

    Args:
        name: the adapter's, for messages.
        entry: the adapter.
        own: the leaves of the slots; all of the adapter's are among them.
        remedy: what makes room.

    Raises:
        ValueError: where the slots of a leaf have no room for the adapter's kind.
    """
    found: dict[tuple[str, ...], Mapping[str, Any]] = {**entry.arrays}
    for keys, site in entry.sites.items():
        if isinstance(site.method, OfKinds):
            try:
                found[keys] = placed(own[keys], site.method.kinds[0], jax.device_get(found[keys]))
            except ValueError as error:
                raise ValueError(f"{site.path}: for {name!r} {error}; {remedy}") from None
    return found


def adapted_of(source: Source, params: Any, names: Any, prefix: Any = None) -> Adapted:
    """An adapter on its base; arguments as for `entry_of`, and the model's layout of prefixes in PEFT's folders.

    Raises:
        FileNotFoundError: for a folder that is not there.
        ValueError: for an adapter of another base, and as its reader.
    """
    if not isinstance(source, Adapted | Stacked):
        return folders.read(source, params, names, prefix)
    adapted = source if isinstance(source, Adapted) else source.plan  # which refuses
    check_one_base([Adapted(params, {}, {}, {}, Plan(())), adapted])
    return adapted


def _check_size(whose: str, arrays: Arrays, dtype: Any) -> None:
    """Refuses values with which a row's numbers would be infinite.

    Beside others they could reach their rows: where all slots are computed, zero times infinity is no number.
    """
    given = [array for array in arrays.values() if jnp.issubdtype(array.dtype, jnp.inexact)]
    held = [array if dtype is None or "a" not in arrays else array.astype(dtype) for array in given]
    if not all(bool(jnp.all(jnp.isfinite(array))) for array in held):
        given_so = all(bool(jnp.all(jnp.isfinite(array))) for array in given)
        kind = f" as {jnp.dtype(dtype).name}, in which they are held" if given_so else ""
        raise ValueError(f"{whose} holds values that are not finite{kind}")
    most = max((float(jnp.max(jnp.abs(array.astype(jnp.float32)), initial=0)) for array in given), default=0.0)
    if "a" in arrays:
        thin = np.abs(np.asarray(arrays["a"], np.float64)).sum(-2, keepdims=True)
        most = max(most, float(np.max(thin @ np.abs(np.asarray(arrays["b"], np.float64)), initial=0)))
    if most > _MOST:
        raise ValueError(
            f"{whose} changes a product by up to {most:.1e} for inputs of 1, and beyond {_MOST:.1e} norms overflow: is its "
            "scale (alpha) what was meant?"
        )


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
