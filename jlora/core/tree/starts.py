"""The starts of adapted leaves: a method's own, mapped over batch axes, with what leaves draw together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _compat, paths
from jlora.core.protocol.fields import Fields
from jlora.core.protocol.method import Arrays, Site, Start
from jlora.core.protocol.readings import Sites
from jlora.core.protocol.statistics import INPUTS, RESIDUAL, needed
from jlora.core.protocol.stored import Stored
from jlora.core.tree import placement
from jlora.core.tree.adapted import SHARED
from jlora.core.tree.spec import Spec, resolve


@dataclass(frozen=True)
class Prepared:
    """What `prepare`, `residuals` or `loftq` found; goes to `adapterize(..., prepared=...)`.

    Attributes:
        starts: the start of every leaf whose method needs data. A spec of which some methods need data and others residuals
            takes those of both: `Prepared(one.starts | other.starts)`.
    """

    starts: dict[Site, Start]

    def start(self, site: Site) -> Start | None:
        """The start of a leaf, or None where its method needs no data.

        Raises:
            ValueError: for a leaf that was prepared with another method or shape, or not at all.
        """
        if not site.method.needs:
            return None
        if site not in self.starts:
            known = [f"{other.path} with {other.method}" for other in self.starts]
            raise ValueError(f"{site.path} with {site.method} was not prepared; prepared are: {', '.join(known)}")
        return self.starts[site]


def blank(params: Any, spec: Spec, sites: Sites | None = None) -> Prepared:
    """What stands for the starts of methods that need data where there is none and shapes are all that counts.

    Args:
        params: as for `adapterize`.
        spec: as for `adapterize`.
        sites: as for `adapterize`.
    """
    leaves, _ = paths.flatten_with_keys(params)
    return blank_at(resolve(leaves, spec, sites), dict(leaves))


def blank_at(sites: Sequence[Site], leaves: Mapping[tuple[str, ...], Any]) -> Prepared:
    """`blank` for leaves that are known already."""
    key, starts = jax.random.key(0), {}
    for site in sites:
        if site.method.needs:
            zeros = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in needed(site).items()}
            starts[site] = start_of(site, leaves[site.keys], key, **zeros)
    return Prepared(starts)


def starts_of(
    sites: Sequence[Site], leaves: Mapping[tuple[str, ...], Any], key: jax.Array, prepared: Prepared | None = None
) -> dict[Site, Start]:
    """The starts of some leaves, with what those of one method draw together."""
    starts = {}
    for site in sites:
        start = None if prepared is None else prepared.start(site)
        starts[site] = start or start_of(site, leaves[site.keys], key)
    for method in dict.fromkeys(site.method for site in sites):
        same = tuple(site for site in sites if site.method == method)
        own = jax.random.fold_in(key, paths.number(f"{SHARED}/{same[0].path}"))
        starts |= dict(zip(same, method.together(own, [starts[site] for site in same], same), strict=True))
    return starts


def start_of(site: Site, leaf: Any, key: jax.Array, **statistics: jax.Array) -> Start:
    """The method's start for every matrix of a leaf; batch axes in front.

    Raises:
        ValueError: for a method that starts from statistics which are not given.
    """
    if missing := sorted(site.method.needs - set(statistics)):
        raise ValueError(
            f"{site.path}: {site.method} starts from "
            + ("what a quantized base lost" if missing == [RESIDUAL] else f"data ({', '.join(missing)})")
            + "; pass prepared="
            + (
                "jlora.residuals(params, base, spec), or that of jlora.loftq"
                if missing == [RESIDUAL]
                else "jlora.prepare(params, spec, loss_fn, batches)"
            )
        )
    if isinstance(site.method, Fields):
        return site.method.start(key, leaf, site)
    key = jax.random.fold_in(key, paths.number(site.path))
    if not isinstance(leaf, Stored):
        leaf = jnp.asarray(leaf)  # numpy's arrays lack some of what methods use

    def placed(sharding: Any) -> Start:
        """Where the start lies: its arrays cut as the leaf is."""
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        given = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in statistics.items()}
        found = jax.eval_shape(partial(_start, site), shape, key, given)
        specs = placement.field_specs(site, sharding.spec)
        drawers: list[Any] = [{name: specs[name] for name in drawer} for drawer in (found.params, found.frozen)]
        return Start(*drawers)

    if isinstance(leaf, Stored):  # in one program, which decodes nothing for methods that don't look at the weight
        start = jax.jit(lambda leaf, key, given: _start(site, leaf.decoded(), key, given))
        aval = jax.typeof(next(iter(leaf.fields.values())))
        return _compat.automatic(start, aval, lambda _: placed(leaf.sharding))(leaf, key, statistics)
    return _compat.automatic(partial(_start, site), jax.typeof(leaf), placed)(leaf, key, statistics)


def _start(site: Site, leaf: jax.Array, key: jax.Array, statistics: Arrays) -> Start:
    if not site.method.matrix:
        return site.method.start(key, leaf, site, **statistics)

    def one(key: jax.Array, w: jax.Array, statistics: Arrays) -> Start:
        return site.method.start(key, w, site, **statistics)

    keys = jax.random.split(key, site.batch_shape) if site.batch_axes else key
    for _ in site.batch_axes:
        one = jax.vmap(one)
    folded = {name: array if name in INPUTS else site.fold(array) for name, array in statistics.items()}
    return one(keys, site.fold(leaf), folded)
