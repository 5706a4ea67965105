"""The room that every row of an engine has for an adapter: leaves, rank and gains, the same for all adapters."""

from __future__ import annotations

import math
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
#: All arrays of one adapter, flat: its gains, and by "" its factors.
Packed = dict[str, Any]


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
        self._lay_out()

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
            paths.insert(arrays, site.keys, {n: x.astype(jnp.float32) if n == "gain" else x for n, x in own.items()})
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

    def packed(self, held: Held | None) -> Packed:
        """An adapter's arrays on the host, filled up to the room's rank; nothing's for None.

        One after another in one buffer of each dtype, since moving many small arrays takes longer.
        """
        kinds = {"gain": np.dtype(np.float32), "": np.dtype(self.dtype)}
        whole = {kind: np.zeros(self._sizes[kind], dtype) for kind, dtype in kinds.items()}
        whole["gain"][:] = 1
        if held is not None:
            for keys, fields in held.arrays.items():
                for name, given in fields.items():
                    kind, start, shape = self._layout[keys, name]
                    part = whole[kind][start : start + math.prod(shape)].reshape(shape)
                    part[tuple(slice(size) for size in given.shape)] = given.astype(part.dtype)
        return whole

    def unpacked(self, packed: Packed) -> list[dict[str, Any]]:
        """The arrays of each leaf, in the order of `sites`."""
        found: dict[Keys, dict[str, Any]] = {site.keys: {} for site in self.sites}
        for (keys, name), (kind, start, shape) in self._layout.items():
            found[keys][name] = packed[kind][start : start + math.prod(shape)].reshape(shape)
        return list(found.values())

    def _lay_out(self) -> None:
        self._sizes: dict[str, int] = {"gain": 0, "": 0}
        self._layout: dict[tuple[Keys, str], tuple[str, int, tuple[int, ...]]] = {}
        for site in self.sites:
            for name, shape in shapes_of(site).items():
                depth, kind = len(site.batch_axes), name if name == "gain" else ""
                shape = (*shape[:depth], *shape[depth + 1 :])
                self._layout[site.keys, name] = kind, self._sizes[kind], shape
                self._sizes[kind] += math.prod(shape)


def held(name: str, entry: Entry) -> Held:
    """An adapter's arrays, fetched to host memory."""
    return Held(name, jax.device_get(entry.arrays))
