"""The content of an adapter folder while it is made: tensors, settings, and where each tensor comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jlora.interchange.leaves.names import Slot

PREFIX = "base_model.model."


@dataclass
class Written:
    """The content of an adapter folder that is to be written.

    Attributes:
        tensors: by their key.
        origins: for each key the pieces of leaves that the tensor is made of.
        config: what `adapter_config.json` will hold.
        notes: what a reader of the result should know.
    """

    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    origins: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, key: str, tensor: np.ndarray, origins: list[dict[str, Any]]) -> None:
        """Adds a tensor.

        Raises:
            ValueError: where two leaves would write the same key.
        """
        if key in self.tensors:
            raise ValueError(f"{origins[0].get('leaf')} and {self.origins[key][0].get('leaf')} both lead to {key!r}")
        # Contiguous, since safetensors writes an array's memory and ignores strides.
        self.tensors[key] = np.ascontiguousarray(tensor)
        self.origins[key] = origins


def origin(slot: Slot, fields: tuple[str, ...], **more: Any) -> dict[str, Any]:
    """One line of the manifest: fields of a leaf, and where they lie along its stacked axes and parts."""
    line: dict[str, Any] = {"leaf": slot.path, "fields": list(fields)}
    if slot.index:
        line["index"] = list(slot.index)
    if slot.part is not None:
        line["part"] = slot.part
    return line | more
