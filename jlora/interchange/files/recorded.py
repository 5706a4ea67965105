"""Reads from jlora's own manifest what PEFT's files don't say: exact methods, ranks of joined leaves, copies of the base."""

from __future__ import annotations

from typing import Any

from jlora.core.protocol.method import Method
from jlora.interchange.leaves.names import Slot
from jlora.methods import DoRA, LoRA


class Recorded:
    """Answers questions by the manifest of a folder, if it has one.

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
        """The ranks of a tensor that are a leaf's own, where those of several leaves were joined; else all.

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
        """Refuses settings that give a parameter another rank or scale than it was written with.

        Args:
            key: the key of its A.
            name: the parameter.
            rank: by the settings.
            scale: by the settings.

        Raises:
            ValueError: naming both.
        """
        if any("ranks" in line for line in self._lines.get(key, ())):
            return
        for leaf in self._methods.get(name, ()):
            inner: Any = leaf["method"].inner if type(leaf["method"]) is DoRA else leaf["method"]
            # A user's own class was written by its weight, so its hyperparameters need not be those of the file.
            if not _is_lora(inner) or leaf["form"] != "lora" or "residual" in leaf:
                continue
            told = inner.rank * (2 if inner.from_weight else 1), inner.scale
            if told[0] != rank or abs(told[1] - scale) > 1e-9 * abs(told[1]):
                raise ValueError(
                    f"{self._where} says that {name!r} has {leaf['method']}, rank {told[0]} and scale {told[1]:g}, but by "
                    f"adapter_config.json it has rank {rank} and scale {scale:g}; set it back, or delete the manifest"
                )

    def holds(self, key: str, slot: Slot, others: list[Slot]) -> bool:
        """Whether a tensor holds values of a slot; yes for all that share the parameter, if the manifest names none of them.

        Args:
            key: the tensor.
            slot: the slot.
            others: all slots of the parameter.
        """
        leaves = {line.get("leaf") for line in self._lines.get(key, ())}
        return slot.path in leaves or not any(other.path in leaves for other in others)

    def is_copy(self, key: str, slot: Slot) -> bool:
        """Whether a leaf's part of a tensor is a copy of the base."""
        return any(line.get("leaf") == slot.path and line.get("copy_of_base") for line in self._lines.get(key, ()))

    def described(self, slot: Slot) -> Method | None:
        """The method that was written for a parameter; None where that is unknown, or the adapter was truncated.

        An entry for the slot's leaf counts; without one all entries for the parameter must agree.
        """
        lines = self._methods.get(slot.name, [])
        mine = [line for line in lines if line["leaf"] == slot.path] or lines
        methods = {line["method"] for line in mine}
        return methods.pop() if len(methods) == 1 and "residual" not in mine[0] else None

    def one(self, slots: list[Slot], kind: type[Method] | None = None) -> Any:
        """The one method that was written for all of these parameters, if its class is `kind` (None: any); else None."""
        methods = {self.described(slot) for slot in slots}
        method = methods.pop() if len(methods) == 1 else None
        return method if kind is None or type(method) is kind else None

    def method(self, slots: list[Slot], found: Method) -> Method | None:
        """The one LoRA or DoRA that was written for all of these parameters, if `found` has its rank and scale; else None."""
        methods = {self.described(slot) for slot in slots}
        method = methods.pop() if len(methods) == 1 else None
        around = type(method) is DoRA
        inner: Any = method.inner if around else method  # type: ignore[union-attr]
        plain: Any = found.inner if isinstance(found, DoRA) else found
        if not _is_lora(inner) or not _is_lora(plain) or around != isinstance(found, DoRA):
            return None
        rank = inner.rank * (2 if inner.from_weight else 1)
        same = rank == plain.rank and abs(inner.scale - plain.scale) <= 1e-9 * abs(inner.scale)
        return method if same else None


def _is_lora(method: Any) -> bool:
    """Whether a method's class says that its form of PEFT is LoRA's."""
    return vars(type(method)).get("peft") is LoRA.peft
