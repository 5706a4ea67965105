"""The room that every row of an engine has for an adapter: leaves, rank and gains, the same for all adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import paths
from jlora.compose.combine import check_one_base
from jlora.compose.entry import Entry, check_alike
from jlora.compose.slotted import Slotted, empty, shapes_of
from jlora.core.tree.adapted import Adapted, Plan
from jlora.core.tree.spec import resolve
from jlora.models.quantized import traced

Keys = tuple[str, ...]
#: Arrays of one adapter, a dict for each leaf of the room.
Arrays = list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Held:
    """An adapter in host memory.

    Attributes:
        name: its name.
        arrays: `a [*batch, in, r]`, `b [*batch, r, out]` and maybe `gain [*batch, out]` of each leaf that it changes, scales
            folded in, `r` its own rank.
    """

    name: str
    arrays: Mapping[Keys, Mapping[str, np.ndarray]]


class Room:
    """What of an adapter a row has room for.

    Attributes:
        params: the base.
        sites: the leaves, with a `Slotted` of one slot.
    """

    def __init__(self, model: Any, params: Any, leaves: Any, rank: int, gains: bool, dtype: Any):
        """Args: as for `AdapterStore`."""
        patterns = leaves if isinstance(leaves, tuple | list) else [leaves]
        spec = {pattern: Slotted(1, rank, gains) for pattern in patterns}
        named, report = paths.flatten_with_keys(params)[0], traced(model, params)
        readings = {keys: leaf.readings for keys, leaf in report.aligned(dict(named)).items()}
        # A row can't choose in a product of experts, where tokens of several rows are mixed.
        mixed = {keys for keys, each in readings.items() if any(one.primitive == "ragged_dot_general" for one in each)}
        self.sites = [site for site in resolve(named, spec, report) if site.keys not in mixed]
        self.params, self.rank, self.gains = params, rank, gains
        self.dtype = model.config.dtype if dtype is None else dtype

    def rows(self, params: Any, count: int) -> Adapted:
        """The base with the arrays of `count` rows, each of which is the base's.

        Raises:
            ValueError: for params that are others than the room's.
        """
        check_one_base([Adapted(each, {}, {}, {}, Plan(())) for each in (self.params, params)])
        sites = [replace(site, method=Slotted(count, self.rank, self.gains, own=True)) for site in self.sites]
        adapted, arrays = empty(params, sites, self.dtype), {}
        for site in adapted.plan.sites:
            own = paths.lookup(adapted.params, site.keys)
            # A gain in 16 bits would be another one.
            paths.insert(arrays, site.keys, {n: x.astype(self._kind(n)) if n == "gain" else x for n, x in own.items()})
        return adapted.replace(params=arrays)

    def check(self, name: str, entry: Entry) -> None:
        """Refuses an adapter that has no room.

        Raises:
            ValueError: with the leaf, what it wants and what there is.
        """
        own = {site.keys: site for site in self.sites}
        for keys, site in entry.sites.items():
            if keys not in own:
                raise ValueError(
                    f"{site.path}: {name!r} adapts this leaf, and the store has no room for it; there is room at {len(own)} "
                    "leaves, those of leaves= without experts"
                )
            check_alike(own[keys], site)
            method = site.method
            assert isinstance(method, Slotted)
            if method.rank > self.rank:
                raise ValueError(
                    f"{site.path}: {name!r} has rank {method.rank}, but the store room for rank={self.rank}"
                )
            if method.gains and not self.gains:
                raise ValueError(f"{site.path}: {name!r} has a gain, and the store no room for gains: gains=True")

    def filled(self, held: Held | None) -> Arrays:
        """An adapter's arrays on the host, filled up to the room's rank; nothing's for None."""
        found = []
        for site in self.sites:
            given = {} if held is None else held.arrays.get(site.keys, {})
            shapes = {
                name: (*site.batch_shape, *shape[len(site.batch_shape) + 1 :])
                for name, shape in shapes_of(site).items()
            }
            found.append({name: self._filled(name, shape, given.get(name)) for name, shape in shapes.items()})
        return found

    def _filled(self, name: str, shape: tuple[int, ...], given: np.ndarray | None) -> np.ndarray:
        whole = np.full(shape, name == "gain", self._kind(name))
        if given is not None:
            whole[tuple(slice(size) for size in given.shape)] = given.astype(whole.dtype)
        return whole

    def _kind(self, name: str) -> Any:
        return np.dtype(jnp.float32 if name == "gain" else self.dtype)


def held(name: str, entry: Entry) -> Held:
    """An adapter's arrays, fetched to host memory."""
    return Held(name, jax.device_get(entry.arrays))
