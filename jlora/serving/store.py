"""Adapters in host memory, each at its own rank, for an engine that pages them to its device."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from jlora.compose.entry import Entry, Source, adapted_of, entry_of
from jlora.core.tree.adapted import Adapted
from jlora.core.tree.spec import ALL_LINEAR
from jlora.models.peft_names import peft_names
from jlora.serving.front import front_of, layout_of, parted
from jlora.serving.request import UnknownAdapter
from jlora.serving.room import Held, Room


class AdapterStore:
    """Adapters of one base in host memory at their own rank, paged to the device by least recent use.

    An engine's rows have room for the leaves, the rank and the gains that are said here, whatever adapters come later: so
    adding, removing and changing adapters compiles nothing. Methods may be called from any thread, while the engine runs.

    Args:
        model: the decoder.
        params: its params; leaves may be kept in the form of a code.
        slots: how many adapters are kept on the device beside those in rows, ready to be written into a row.
        rank: the largest rank of an adapter.
        leaves: which leaves adapters may change, as a pattern of a spec, or several. Experts are left out.
        gains: whether there is room for gains, as DoRA has them.
        like: adapters as `add` takes them, which are not added: there is room for those of their methods that are no low-rank
            factors, each with all its hyperparameters, and for as many virtual tokens.
        dtype: of the factors on the device; by default that of the model's computation, to which products cast them anyway.
        names: which torch parameter a leaf is, to read folders in PEFT's format; by default `jlora.models.peft_names(model)`.

    Raises:
        ValueError: for numbers that are not positive, and patterns that match nothing.

    Example:
        >>> model, params = jlora.models.load(jlora.models.STORIES260K)
        >>> store = jlora.serving.AdapterStore(model, params, slots=16, rank=32, leaves=".*/q_proj/kernel")
        >>> store.add("sql", jlora.adapterize(params, {".*/q_proj/kernel": jlora.Axes("batch in out", jlora.LoRA(4))}))
        >>> store.names
        ('sql',)

    Reference:
        Sheng et al. 2023, arXiv:2311.03285 (S-LoRA).
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        *,
        slots: int = 8,
        rank: int = 16,
        leaves: Any = ALL_LINEAR,
        gains: bool = True,
        like: Sequence[Source] = (),
        dtype: Any = None,
        names: Any = None,
    ):
        for name, number in {"slots": slots, "rank": rank}.items():
            if number < 1:
                raise ValueError(f"{name} must be a positive whole number, got {number}")
        self.slots, self._names = slots, peft_names(model) if names is None else names
        self._model, self._prefix = model, layout_of(model)
        read = [parted(adapted_of(each, params, self._names, self._prefix)) for each in like]
        entries = [self._entry("like", adapted, params) for adapted, _ in read]
        virtual = max((tokens for _, tokens in read), default=0)
        self.room = Room(model, params, leaves, rank, gains, dtype, entries, virtual)
        self._held: dict[str, Held] = {}
        self._lock = threading.Lock()

    def add(self, name: str, source: Source) -> None:
        """Takes an adapter in: an `Adapted` on this base, or a folder (`jlora.save`, a run of `jlora finetune`, PEFT's format).

        Raises:
            FileNotFoundError: for a folder that is not there.
            ValueError: for a name that is taken, and an adapter that rows can't hold: of another base or method, of a larger
                rank, on other leaves, with values that are not finite. Then nothing was changed.
        """
        self._check_free(name)
        adapted = adapted_of(source, self.room.params, self._names, self._prefix)
        rest, tokens = parted(adapted)
        self.room.check_front(name, tokens)
        entry = self._entry(name, rest, self.room.params, self.room.dtype)
        found = self.room.held(name, entry, front_of(name, self._model, adapted))
        with self._lock:
            self._check_free(name)
            self._held[name] = found

    def remove(self, name: str) -> None:
        """Takes an adapter out. Requests that were taken with it end with the arrays with which they began.

        Raises:
            UnknownAdapter: where there is none of that name.
        """
        with self._lock:
            self.get(name)
            del self._held[name]

    def get(self, name: str) -> Held:
        """An adapter's arrays.

        Raises:
            UnknownAdapter: where there is none of that name.
        """
        found = self._held.get(name)
        if found is None:
            raise UnknownAdapter(f"no adapter {name!r} in the store, which has {len(self._held)}")
        return found

    @property
    def row_bytes(self) -> int:
        """Bytes that an adapter takes on the device, whichever it is: once for each row, and once for each slot.

        Keys and values of virtual tokens lie in the rows' cache, and in slots that have some.
        """
        return self.room.size

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are in it."""
        with self._lock:
            return tuple(self._held)

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def __len__(self) -> int:
        return len(self._held)

    def _entry(self, name: str, adapted: Adapted, params: Any, dtype: Any = None) -> Entry:
        return entry_of(name, adapted, params, self._names, dtype)

    def _check_free(self, name: str) -> None:
        if name in self._held:
            raise ValueError(f"the store has an adapter {name!r} already; remove it first")
