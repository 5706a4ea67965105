"""From torch names to leaves, for reading."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora import paths
from jlora.core.protocol.method import Method, Site
from jlora.core.tree import beside
from jlora.interchange.leaves import layout
from jlora.interchange.leaves.names import Slot

Keys = tuple[str, ...]
# The last word of the parameter that an adapter of a module adapts: the first of these that the module has.
MATRICES = ("weight", "in_proj_weight")


@dataclasses.dataclass(frozen=True)
class Read:
    """One leaf's adapter as it was read.

    Attributes:
        site: the leaf with its method.
        params: the trained arrays.
        frozen: the constants.
        shared: the constants that all leaves of the method have in common.
        shared_params: the trained arrays that they have in common.
    """

    site: Site
    params: dict[str, Any]
    frozen: dict[str, Any] = dataclasses.field(default_factory=dict)
    shared: dict[str, Any] = dataclasses.field(default_factory=dict)
    shared_params: dict[str, Any] = dataclasses.field(default_factory=dict)


class Index:
    """Every torch parameter that the names know, with the leaves that it is a part of.

    Args:
        slots: the slots of every leaf.
        leaves: the leaves of the base.
        where: the file of tensors, for messages.
        valued: whether the leaves have the base's values; where they stand for shapes alone, nothing is compared with them.
    """

    def __init__(self, slots: Mapping[Keys, list[Slot]], leaves: Mapping[Keys, Any], where: Any, valued: bool = True):
        self.slots, self.leaves, self.where, self.valued = slots, leaves, where, valued
        self.by_name: dict[str, list[Slot]] = {}
        self.tied: dict[str, str] = {}
        for slot in (slot for each in slots.values() for slot in each):
            self.by_name.setdefault(slot.name, []).append(slot)
            self.tied.update(dict.fromkeys(slot.entry.also, slot.name))

    def matrix(self, module: str, key: str) -> str:
        """The parameter that an adapter of a module adapts.

        Args:
            module: name of the module.
            key: name of the adapter's tensor, for the message.

        Raises:
            ValueError: where no leaf of the params is that parameter.
        """
        for last in MATRICES:
            if (name := f"{module}.{last}") in self.by_name or name in self.tied:
                return name
        raise ValueError(self._unknown(module, key))

    def parameter(self, name: str, key: str) -> str:
        """The name of a parameter, if a leaf of the params is that parameter.

        Args:
            name: of the parameter.
            key: name of its tensor, for the message.

        Raises:
            ValueError: where no leaf is.
        """
        if name not in self.by_name and name not in self.tied:
            raise ValueError(self._unknown(name, key))
        return name

    def _unknown(self, name: str, key: str) -> str:
        close = paths.nearest(name, self.by_name)
        return f"{self.where}: no leaf of the params is {name!r} (tensor {key!r}); by the names the nearest are {close}"

    def bare(self, module: str, targeted: list[str], key: str) -> list[str]:
        """The targeted parameters of a module, outermost wrapper first.

        Raises:
            ValueError: where there are several in no known order, or none.
        """
        mine = [name for name, slots in self.by_name.items() if slots[0].by_parameter and slots[0].module == module]
        found = [name for name in mine if any(name == t or name.endswith("." + t) for t in targeted)]
        if not found:
            raise ValueError(self._unknown(module, key))
        places = [self.by_name[name][0].entry.position for name in found]
        if len(found) > 1 and (None in places or len(set(places)) < len(places)):
            raise ValueError(f"names: {', '.join(found)} are 3-D parameters of one module; give each TorchParameter a "
                             "position, in the order in which the module defines them")  # fmt: skip
        return [name for _, name in sorted(zip(places, found), key=lambda item: item[0] or 0, reverse=True)]

    def site(self, keys: Keys, method: Method) -> Site:
        """The site of a leaf, with the axes that the names give."""
        leaf, slot = self.leaves[keys], self.slots[keys][0]
        blank = Site(keys, tuple(leaf.shape), str(leaf.dtype), (), (), (), "dot", method)
        if not method.matrix:
            return blank
        kind = {"embedding": "gather", "conv": "conv"}.get(slot.kind, "dot")
        batch = tuple(sorted((*slot.stacked, *slot.axes("expert"))))
        blank = dataclasses.replace(blank, beside=beside.present(blank, self.leaves))
        return dataclasses.replace(
            blank, in_axes=slot.axes("in"), out_axes=slot.axes("out", "part"), batch_axes=batch, kind=kind
        )

    def leaves_of(self, names: set[str]) -> list[Keys]:
        """The leaves that hold any of these parameters, in the order of the params."""
        return [keys for keys in self.leaves if any(slot.name in names for slot in self.slots.get(keys, ()))]

    def stack(self, site: Site, pieces: list[tuple[Slot, dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
        """Puts the pieces of a leaf together, with the batch axes in front; where a piece is missing, arrays are 0."""
        first = pieces[0][1]
        experts = {name: (array.shape[1:] if pieces[0][0].experts else array.shape) for name, array in first.items()}
        found = {name: np.zeros((*site.batch_shape, *shape), first[name].dtype) for name, shape in experts.items()}
        for slot, arrays in pieces:
            for name, array in arrays.items():
                found[name][layout.batch_index(slot, site)] = array
        return found


def trained_dtype(dtype: Any) -> np.dtype:
    """The dtype of adapters of a base: the base's, but float32 at least."""
    return np.dtype(np.float32) if np.dtype(dtype).itemsize < 4 else np.dtype(dtype)
