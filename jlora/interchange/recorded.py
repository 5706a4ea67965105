"""What jlora's own manifest adds to a PEFT folder: exact methods, ranks of joined leaves, copies of the base."""

from __future__ import annotations

from typing import Any

from jlora.core.protocol.method import Method
from jlora.interchange.forms import is_lora
from jlora.interchange.names import Slot
from jlora.methods import DoRA


class Recorded:
    """The manifest of a folder, or nothing.

    Args:
        manifest: its content; None where the folder is PEFT's own.
        where: its path, for messages.
    """

    def __init__(self, manifest: dict[str, Any] | None, where: Any):
        self._where = where
        found = manifest or {"profile": "peft", "tensors": [], "leaves": []}
        self._lines = {line["key"]: line["from"] for line in found["tensors"]}
        self._methods: dict[str, list[dict[str, Any]]] = {}
        if found["profile"] == "peft":
            for leaf in found["leaves"]:
                for name in leaf["parameters"]:
                    self._methods.setdefault(name, []).append(leaf)

    def ranks(self, key: str, slot: Slot, rank: int) -> slice:
        """Which ranks of a tensor are a leaf's own, where several leaves were joined.

        Raises:
            ValueError: where the leaves' ranks don't make up those of the tensor.
        """
        lines = [line for line in self._lines.get(key, ()) if "ranks" in line]
        pairs = sorted(tuple(line["ranks"]) for line in lines)
        if lines and [0, *(stop for _, stop in pairs)] != [*(start for start, _ in pairs), rank]:
            raise ValueError(f"{self._where}: the ranks {pairs} of {key!r} are not all of its {rank}; delete the file to read "
                             "the folder as PEFT's own")  # fmt: skip
        for line in lines:
            at = (line.get("leaf"), tuple(line.get("index", ())), line.get("part"))
            if at == (slot.path, slot.index, slot.part):
                return slice(*line["ranks"])
        return slice(None)

    def check(self, key: str, name: str, rank: int, scale: float) -> None:
        """The LoRA that was written for a parameter has the rank and scale that the folder's settings give it.

        Raises:
            ValueError: where it has not.
        """
        if any("ranks" in line for line in self._lines.get(key, ())):
            return
        for leaf in self._methods.get(name, ()):
            inner: Any = leaf["method"].inner if type(leaf["method"]) is DoRA else leaf["method"]
            # A class of somebody's own may have gone out by its weight, in other factors.
            if not is_lora(inner) or leaf["form"] != "lora" or "residual" in leaf:
                continue
            told = inner.rank * (2 if inner.from_weight else 1), inner.scale
            if told[0] != rank or abs(told[1] - scale) > 1e-9 * abs(told[1]):
                raise ValueError(
                    f"{self._where} says that {name!r} has {leaf['method']}, rank {told[0]} and scale {told[1]:g}, but by "
                    f"adapter_config.json it has rank {rank} and scale {scale:g}; set it back, or delete the manifest"
                )

    def holds(self, key: str, slot: Slot, others: list[Slot]) -> bool:
        """Whether a slot is among those whose values a tensor holds; all are, where it says nothing of any of them."""
        leaves = {line.get("leaf") for line in self._lines.get(key, ())}
        return slot.path in leaves or not any(other.path in leaves for other in others)

    def is_copy(self, key: str, slot: Slot) -> bool:
        """Whether a leaf's part of a tensor is a copy of the base."""
        return any(line.get("leaf") == slot.path and line.get("copy_of_base") for line in self._lines.get(key, ()))

    def described(self, slot: Slot) -> Method | None:
        """The method that was written for a parameter, by the leaf's path or as the only one.

        None for a class that is not imported: what PEFT reads is whole without it.
        """
        lines = self._methods.get(slot.name, [])
        mine = [line for line in lines if line["leaf"] == slot.path] or lines
        methods = {line["method"] for line in mine}
        return methods.pop() if len(methods) == 1 and "residual" not in mine[0] else None

    def one(self, slots: list[Slot], kind: type[Method]) -> Any:
        """The method that was written for all of these parameters, where it is of a kind; None elsewhere."""
        methods = {self.described(slot) for slot in slots}
        method = methods.pop() if len(methods) == 1 else None
        return method if type(method) is kind else None

    def method(self, slots: list[Slot], found: Method) -> Method | None:
        """The LoRA that was written for these parameters, where it is what was found; None elsewhere."""
        methods = {self.described(slot) for slot in slots}
        method = methods.pop() if len(methods) == 1 else None
        around = type(method) is DoRA
        inner: Any = method.inner if around else method  # type: ignore[union-attr]
        plain: Any = found.inner if isinstance(found, DoRA) else found
        if not is_lora(inner) or not is_lora(plain) or around != isinstance(found, DoRA):
            return None
        rank = inner.rank * (2 if inner.from_weight else 1)
        same = rank == plain.rank and abs(inner.scale - plain.scale) <= 1e-9 * abs(inner.scale)
        return method if same else None
