"""The room that every row of an engine has for an adapter: leaves, rank and gains, the same for all adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import paths
from jlora.compose.combine import check_one_base
from jlora.compose.entry import Entry, check_alike, in_slots
from jlora.compose.kinds import with_room
from jlora.compose.slotted import Slotted, arrays_of, empty
from jlora.core.protocol.method import Site
from jlora.core.tree.adapted import Adapted, Plan
from jlora.core.tree.spec import resolve
from jlora.models.quantized import traced
from jlora.serving.front import Front

Keys = tuple[str, ...]
#: All arrays of one adapter, flat: its gains, by "" its factors, others by their dtype; and keys and values by `FRONT`.
Packed = dict[str, Any]
FRONT = ("front_keys", "front_values")


@dataclass(frozen=True, eq=False)
class Held:
    """An adapter in host memory.

    Attributes:
        name: its name.
        arrays: of each leaf that it changes `a [*batch, in, r]`, `b [*batch, r, out]` and maybe `gain [*batch, out]`, scales
            folded in, `r` its own rank; or its kind, and the arrays of its method.
        front: what it puts in front of a text; None for nothing.
    """

    name: str
    arrays: Mapping[Keys, Mapping[str, np.ndarray]]
    front: Front | None = None

    @property
    def virtual(self) -> int:
        """Tokens that it puts in front of a text."""
        return 0 if self.front is None else self.front.tokens


class Room:
    """What of an adapter a row has room for.

    Attributes:
        params: the base.
        sites: the leaves, with a `Slotted` of one slot.
        virtual: tokens in front of a text.
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        leaves: Any,
        rank: int,
        gains: bool,
        dtype: Any,
        like: Sequence[Entry] = (),
        virtual: int = 0,
    ):
        """Args: as for `AdapterStore`, and virtual tokens in front of a text."""
        patterns = leaves if isinstance(leaves, tuple | list) else [leaves]
        spec = {pattern: Slotted(1, rank, gains) for pattern in patterns}
        named, report = paths.flatten_with_keys(params)[0], traced(model, params)
        readings = {keys: leaf.readings for keys, leaf in report.aligned(dict(named)).items()}
        # A row can't choose in a product of experts, where tokens of several rows are mixed.
        mixed = {keys for keys, each in readings.items() if any(one.primitive == "ragged_dot_general" for one in each)}
        sites = [site for site in resolve(named, spec, report) if site.keys not in mixed]
        self.sites = [replace(site, method=_with_kinds(site, like)) for site in sites]
        self.params, self.rank, self.gains, self.virtual = params, rank, gains, virtual
        self.dtype = jnp.dtype(model.config.dtype if dtype is None else dtype)
        self._lay_out()

    def rows(self, params: Any, count: int) -> Adapted:
        """The base with the arrays of `count` rows, each of which is the base's.

        Raises:
            ValueError: for params that are others than the room's.
        """
        check_one_base([Adapted(each, {}, {}, {}, Plan(())) for each in (self.params, params)])
        sites = [replace(site, method=replace(site.method, slots=count, own=True)) for site in self.sites]  # type: ignore[type-var]
        adapted, arrays = empty(params, sites, self.dtype), {}
        for site in adapted.plan.sites:
            own = paths.lookup(adapted.params, site.keys)
            # A gain in 16 bits would be another one.
            paths.insert(arrays, site.keys, {n: x.astype(jnp.float32) if n == "gain" else x for n, x in own.items()})
        return adapted.replace(params=arrays)

    def held(self, name: str, entry: Entry, front: Front | None = None) -> Held:
        """An adapter's arrays, fetched to host memory, with what it puts in front of a text.

        Raises:
            ValueError: for one that has no room, with the leaf, what it wants and what there is.
        """
        own = {site.keys: site for site in self.sites}
        self._check(name, entry, own)
        arrays = in_slots(name, entry, own, "room is made at the start, by like= or --adapters")
        found: dict[Keys, Mapping[str, np.ndarray]] = jax.device_get(arrays)
        return Held(name, found, front)

    def check_front(self, name: str, tokens: int) -> None:
        """Refuses an adapter with more virtual tokens than there is room for.

        Raises:
            ValueError: with what it wants and what there is.
        """
        if tokens > self.virtual:
            raise ValueError(
                f"{name!r} puts {tokens} virtual tokens in front of a text, and there is room for {self.virtual}; room is made "
                "at the start, by like= or --adapters"
            )

    def _check(self, name: str, entry: Entry, own: Mapping[Keys, Site]) -> None:
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

    @property
    def size(self) -> int:
        """Bytes that one adapter takes on the device: in a row, and in a slot beside the rows."""
        return sum(self._sizes[kind] * dtype.itemsize for kind, dtype in self._dtypes.items())

    def packed(self, held: Held | None) -> Packed:
        """An adapter's arrays on the host, filled up to the room's rank; nothing's for None.

        One after another in one buffer of each dtype, since moving many small arrays takes longer.
        """
        whole = {kind: np.zeros(self._sizes[kind], dtype) for kind, dtype in self._dtypes.items()}
        if "gain" in whole:
            whole["gain"][:] = 1
        if held is not None:
            for keys, fields in held.arrays.items():
                for name, given in fields.items():
                    kind, place, shape = self._layout[keys, name]
                    whole[kind][place].reshape(shape)[tuple(map(slice, given.shape))] = given
        if held is not None and held.front is not None:
            front = held.front.padded(self.virtual)
            whole |= {FRONT[0]: front.keys, FRONT[1]: front.values}
        return whole

    def unpacked(self, packed: Packed) -> list[dict[str, Any]]:
        """The arrays of each leaf, in the order of `sites`."""
        found: dict[Keys, dict[str, Any]] = {site.keys: {} for site in self.sites}
        for (keys, name), (kind, place, shape) in self._layout.items():
            found[keys][name] = packed[kind][place].reshape(shape)
        return list(found.values())

    def _lay_out(self) -> None:
        self._dtypes: dict[str, np.dtype] = {}
        self._sizes: dict[str, int] = {}
        self._layout: dict[tuple[Keys, str], tuple[str, slice, tuple[int, ...]]] = {}
        for site in self.sites:
            for name, each in arrays_of(site, self.dtype).items():
                depth = len(site.batch_axes)
                kind = name if name == "gain" else "" if name in ("a", "b") else np.dtype(each.dtype).name
                shape = (*each.shape[:depth], *each.shape[depth + 1 :])
                start = self._sizes.setdefault(kind, 0)
                self._dtypes.setdefault(kind, np.dtype(np.float32 if name == "gain" else each.dtype))
                self._sizes[kind] += math.prod(shape)
                self._layout[site.keys, name] = kind, slice(start, self._sizes[kind]), shape


def _with_kinds(site: Site, like: Sequence[Entry]) -> Slotted:
    """What slots of a leaf hold, with room for what some adapters have there."""
    method = site.method
    assert isinstance(method, Slotted)
    wanted = [entry.sites[site.keys].method for entry in like if site.keys in entry.sites]
    whole = with_room([method, *(each for each in wanted if isinstance(each, Slotted))], method.slots)
    return replace(whole, rank=method.rank, gains=method.gains)
