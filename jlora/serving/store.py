"""Adapters in host memory, each at its own rank, for an engine that pages them to its device."""

from __future__ import annotations

from typing import Any

from jlora.compose.bank import Source
from jlora.core.tree.spec import ALL_LINEAR


class AdapterStore:
    """Adapters of one base in host memory at their own rank, paged to the device by least recent use.

    An engine's rows have room for the leaves, the rank and the gains that are said here, whatever adapters come later: so
    adding, removing and changing adapters compiles nothing. Methods may be called from any thread, while the engine runs.

    Args:
        model: the decoder.
        params: its params; leaves may be kept in the form of a code.
        slots: how many adapters are kept on the device beside those in rows, ready to be written into a row.
        rank: the largest rank of an adapter.
        leaves: which leaves adapters may change, as a pattern of a spec, or several.
        gains: whether there is room for gains, as DoRA has them.
        dtype: of the factors on the device; by default that of the model's computation.
        names: which torch parameter a leaf is, to read folders in PEFT's format; by default `jlora.models.peft_names(model)`.

    Example:
        >>> store = AdapterStore(model, params, slots=16, rank=32)
        >>> store.add("sql", "runs/sql")
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
        dtype: Any = None,
        names: Any = None,
    ):
        raise NotImplementedError

    def add(self, name: str, source: Source) -> None:
        """Takes an adapter in: an `Adapted` on this base, or a folder (`jlora.save`, a run of `jlora finetune`, PEFT's format).

        Raises:
            FileNotFoundError: for a folder that is not there.
            ValueError: for a name that is taken, and an adapter that rows can't hold: of another base or method, of a larger
                rank, on other leaves, with values that are not finite.
        """
        raise NotImplementedError

    def remove(self, name: str) -> None:
        """Takes an adapter out. Requests that were taken with it end with the arrays with which they began.

        Raises:
            UnknownAdapter: where there is none of that name.
        """
        raise NotImplementedError

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are in it."""
        raise NotImplementedError

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __len__(self) -> int:
        return len(self.names)
