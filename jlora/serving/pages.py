"""Adapters on the device, ready to be written into a row: the least recently used gives way."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable

import jax

from jlora.serving.room import Held, Packed, Room


class Pages:
    """At most `slots` adapters on the device, beside the one that is none.

    Attributes:
        loads: how many were moved there.
    """

    def __init__(self, room: Room, slots: int):
        """Args: what adapters are filled up to; how many are kept."""
        self._room, self._slots, self.loads = room, slots, 0
        self._blank = jax.device_put(room.packed(None))
        self._kept: OrderedDict[Held, Packed] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, held: Held) -> bool:
        return held in self._kept

    def get(self, held: Held | None) -> Packed:
        """An adapter's arrays on the device, moved there if need be; it is now the most recently used."""
        return self._blank if held is None else self._bring(held, ())

    def prefetch(self, coming: Iterable[Held]) -> None:
        """Begins to move adapters that are wanted soon, the soonest first; none of them gives way to a later one."""
        soon: dict[Held, None] = {}
        for held in coming:
            if len(soon) == self._slots:
                break
            soon[held] = None
        for held in soon:
            self._bring(held, soon)

    def _bring(self, held: Held, pinned: Collection[Held]) -> Packed:
        if held not in self._kept:
            while len(self._kept) >= self._slots:
                del self._kept[next(each for each in self._kept if each not in pinned)]
            # The transfer goes on while the host goes on.
            self._kept[held] = jax.device_put(self._room.packed(held))
            self.loads += 1
        self._kept.move_to_end(held)
        return self._kept[held]
