"""The protocol of events: what a method asks of the training loop between two steps."""

from __future__ import annotations

from typing import Any, Protocol


class Event(Protocol):
    """What `Method.event` gives: compared and hashed by value; leaves with equal events share one.

    An event with `restarts`, steps of the run, lets the training job's learning rate rise anew after each.
    """

    def due(self, step: int) -> bool:
        """Whether it happens after this many steps."""
        ...

    def happen(self, context: Any) -> tuple[Any, Any]:
        """What becomes of the run: of a `jlora.EventContext` the new `Adapted` and optimizer state.

        Both have the structure, shapes and shardings of before; the old ones may be donated.
        """
        ...
