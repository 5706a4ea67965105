"""What mixtures of trained adapters have in common: their factors, side by side at every leaf that one of them changes."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jlora import paths
from jlora.compose import plain
from jlora.compose.bank import Bank, Source
from jlora.compose.combine import check_one_base
from jlora.compose.kinds import OfKinds
from jlora.compose.slotted import Slotted
from jlora.core.protocol.hyperparameters import check_hyperparameters
from jlora.core.protocol.method import Arrays, Method, Site, Start, View, factor_labels
from jlora.core.tree import placement
from jlora.core.tree.adapted import Adapted, Plan
from jlora.core.tree.adapterize import adapterize
from jlora.core.tree.spec import Axes
from jlora.disk import folders
from jlora.methods.lora import kaiming, trained_dtype


@dataclass(frozen=True)
class Experts(Method):
    """Base of the mixtures: low-rank updates `scale_s * a_s @ b_s`, one for each adapter.

    Args:
        names: those of the adapters; the place of a name is its slot.
        rank: columns of every `a_s`; smaller ranks are filled up with zeros, which training leaves zero.
        train_adapters: whether the factors are trained too. Then the scales are beside them, else in `b`.
    """

    names: tuple[str, ...] = ("0", "1")
    rank: int = 8
    train_adapters: bool = False

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("rank",), of=Experts)
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"{type(self).__name__}'s names must be one for each adapter, got {self.names!r}")

    @property
    def slots(self) -> int:
        """How many adapters there are."""
        return len(self.names)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        scale: dict[str, tuple[str, ...]] = {"scale": ("",)} if self.train_adapters else {}
        return {"a": ("", "in", "rank"), "b": ("", "rank", "out"), **scale}

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """LoRA's start in every slot, until the adapters' factors are put in its place."""
        dtype, (rows, columns) = trained_dtype(w), w.shape
        a = kaiming(key, (rows, self.slots * self.rank), dtype).reshape(rows, self.slots, self.rank)
        factors = {"a": jnp.moveaxis(a, 1, 0), "b": jnp.zeros((self.slots, self.rank, columns), dtype)}
        return Start(factors, {"scale": jnp.ones(self.slots, dtype)}) if self.train_adapters else Start({}, factors)

    def experts(self, view: View) -> tuple[jax.Array, jax.Array]:
        """`a [slots, in, rank]` and `b [slots, rank, out]`, scales in `b`."""
        if not self.train_adapters:
            return view.frozen["a"], view.frozen["b"]
        return view.params["a"], view.frozen["scale"][:, None, None] * view.params["b"]

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups."""
        return factor_labels(site, {"a": "a", "b": "b"}) if self.train_adapters else {}


def mixture(
    params: Any,
    adapters: Mapping[str, Source] | Bank,
    method: Callable[[tuple[str, ...], int, int], Experts],
    key: jax.Array | None,
    names: Any,
) -> Adapted:
    """A mixture's method at every leaf that any of some adapters changes, with their factors.

    Args:
        params: the base.
        adapters: by name, as `Bank.of` takes them; or a bank, whose factors are copied.
        method: of the adapters' names, the largest rank, and the number of matrices.
        key: of what else the method starts from.
        names: which torch parameter a leaf is, for folders in PEFT's format.

    Raises:
        ValueError: as `Bank.of`; for an empty bank, one on another base, and adapters that have a gain or no factors.
    """
    if isinstance(adapters, Bank):
        check_one_base([Adapted(params, {}, {}, {}, Plan(())), adapters.adapted])
        bank, read = adapters, {}
    else:
        read = {name: _read(each, params, names) for name, each in adapters.items()}
        bank = Bank.of(params, read)
    if not len(bank):
        raise ValueError("a mixture is made of adapters, and the bank has none")
    sites = bank.adapted.plan.sites
    matrices = sum(math.prod(site.batch_shape) for site in sites)
    made = method(bank.names, max(_bank_method(site).rank for site in sites), matrices)
    spec = {re.escape(site.path): Axes(_roles(site), made, site.kind) for site in sites}
    adapted = adapterize(params, spec, key)
    return _filled(adapted, bank, {name: each for name, each in read.items() if isinstance(each, Adapted)})


def _read(source: Source, params: Any, names: Any) -> Source:
    """An adapter of a folder; what is no folder as it is, for the bank to take or to refuse."""
    return folders.read(source, params, names) if isinstance(source, str | os.PathLike) else source


def _bank_method(site: Site) -> Slotted:
    """The method by which a bank holds a leaf; refuses one with gains, or with what is no factors."""
    method = site.method
    assert isinstance(method, Slotted)
    if isinstance(method, OfKinds):
        raise ValueError(
            f"{site.path}: {method.kinds[0].method} is no low-rank change, and a mixture adds up such; the nearest LoRA to "
            'what it does to a matrix is jlora.combine([adapted], [1.0], "svd", rank=...)'
        )
    if method.gains:
        raise ValueError(
            f"{site.path}: an adapter has a gain there, as DoRA has, so that what it does is no change that is added, and a "
            "mixture adds up changes"
        )
    return method


def _roles(site: Site) -> str:
    """The roles of a leaf's axes in words."""
    roles = dict.fromkeys(site.in_axes, "in") | dict.fromkeys(site.out_axes, "out")
    return " ".join(roles.get(axis, "batch") for axis in range(len(site.shape)))


def _filled(adapted: Adapted, bank: Bank, read: Mapping[str, Adapted]) -> Adapted:
    """The mixture with the factors that a bank has, and the scales of the adapters where these are trained."""
    params: dict[str, Any] = {**adapted.params}
    frozen: dict[str, Any] = {**adapted.frozen}
    leaves = dict(paths.flatten_with_keys(adapted.base)[0])
    slots, scales = bank.ids(bank.names), _scales(bank, read)
    for site in adapted.plan.sites:
        held, depth = paths.lookup(bank.adapted.params, site.keys), len(site.batch_axes)
        new: Arrays = {name: jnp.take(held[name], slots, axis=depth) for name in ("a", "b")}
        if "scale" in site.method.axes:
            scale = jnp.asarray([each.get(site.path, 1.0) for each in scales], new["b"].dtype)
            new["scale"] = jnp.broadcast_to(scale, (*site.batch_shape, len(slots)))
            new["b"] = new["b"] / new["scale"][..., None, None]
        old = [paths.lookup(tree, site.keys) for tree in (adapted.params, adapted.frozen)]
        start = Start(*({name: _put(new, name, x) for name, x in each.items()} for each in old))
        start = placement.place(start, site, leaves[site.keys])
        params, frozen = _with(params, site.keys, start.params), _with(frozen, site.keys, start.frozen)
    return replace(adapted, params=params, frozen=frozen)


def _put(new: Arrays, name: str, old: jax.Array) -> jax.Array:
    """A field's new value, filled up with zeros to the shape of the old one; the old one where there is none."""
    if name not in new:
        return old
    value = new[name].astype(old.dtype)
    return jnp.pad(value, [(0, size - own) for size, own in zip(old.shape, value.shape, strict=True)])


def _with(tree: dict[str, Any], keys: tuple[str, ...], fields: Arrays) -> dict[str, Any]:
    """A nested dict with a leaf's fields replaced, and nothing of the former changed."""
    if not keys:
        return fields
    return {**tree, keys[0]: _with(tree.get(keys[0], {}), keys[1:], fields)} if fields or keys[0] in tree else tree


def _scales(bank: Bank, read: Mapping[str, Adapted]) -> list[dict[str, float]]:
    """The scale of every adapter's leaves by path, in the order of the bank; those of a bank's own are in `b` already."""
    found = []
    for name in bank.names:
        each, scales = read.get(name), {}
        for weight in [] if each is None else each.replace(context={}).weights():
            factors = plain.factors(weight)
            scales[weight.name] = 1.0 if factors is None else factors.scale
        found.append(scales)
    return found
