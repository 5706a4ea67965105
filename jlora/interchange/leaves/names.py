"""Which torch parameter a leaf is: by a table that a person writes, never guessed from shapes."""

from __future__ import annotations

import itertools
import math
import re
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jlora.models.torch_parameter import TorchParameter

Names = Mapping[str, str | TorchParameter] | Callable[[str], str | TorchParameter | None]


@dataclass(frozen=True)
class Slot:
    """One torch parameter, or some columns of it, and the piece of a leaf that it is.

    Attributes:
        keys: the keys of the leaf.
        shape: its shape.
        roles: one word an axis.
        index: position on each stacked axis.
        part: the number of the name among several, or None.
        entry: the table's entry.
        name: the torch parameter.
    """

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    roles: tuple[str, ...]
    index: tuple[int, ...]
    part: int | None
    entry: TorchParameter
    name: str

    @property
    def path(self) -> str:
        """The `/`-joined path of the leaf."""
        return "/".join(self.keys)

    @property
    def module(self) -> str:
        """The torch module: the parameter's name without its last word."""
        return self.name.rpartition(".")[0]

    @property
    def parameter(self) -> str:
        """The last word of the parameter's name."""
        return self.name.rpartition(".")[2]

    @property
    def kind(self) -> str:
        """How torch keeps the matrix."""
        return self.entry.kind

    @property
    def experts(self) -> int | None:
        """Number of experts of a 3-D parameter."""
        return self.shape[self.roles.index("expert")] if self.kind.startswith("experts") else None

    @property
    def by_parameter(self) -> bool:
        """Whether PEFT adapts it as a parameter, by `target_parameters`, and not as a module."""
        return self.experts is not None or self.kind == "parameter"

    def axes(self, *roles: str) -> tuple[int, ...]:
        """The axes with these roles."""
        return tuple(axis for axis, role in enumerate(self.roles) if role in roles)

    @property
    def stacked(self) -> tuple[int, ...]:
        """The axes that count separate torch parameters."""
        return tuple(axis for axis, role in enumerate(self.roles) if role not in ("in", "out", "part", "expert"))

    def sizes(self, *roles: str) -> tuple[int, ...]:
        """Sizes of the axes with these roles."""
        return tuple(self.shape[axis] for axis in self.axes(*roles))

    def leaf_columns(self) -> np.ndarray:
        """The numbers of the leaf's folded "out" columns that belong to this slot, in torch's order."""
        shape = self.sizes("out", "part")
        every = np.arange(math.prod(shape)).reshape(shape)
        if self.part is None:
            return every.reshape(-1)
        if self.entry.sizes is not None:
            start = sum(self.entry.sizes[: self.part])
            return every.reshape(-1)[start : start + self.entry.sizes[self.part]]
        axis = [role for role in self.roles if role in ("out", "part")].index("part")
        return np.take(every, self.part, axis=axis).reshape(-1)

    def torch_columns(self) -> tuple[int, int, int]:
        """Where the slot lies along the torch parameter's out axis: start, stop, and the axis' whole width."""
        width = len(self.leaf_columns())
        return self.entry.columns or (0, width, width)


def resolve(names: Names, leaves: Iterable[tuple[tuple[str, ...], Any]]) -> dict[tuple[str, ...], list[Slot]]:
    """The slots of every leaf that the names know.

    Raises:
        TypeError: for names that are neither a mapping nor a function, or an entry of another kind.
        ValueError: for an entry that doesn't fit its leaf, a pattern that matches nothing, or two leaves on one place.
    """
    leaves = [(keys, tuple(leaf.shape)) for keys, leaf in leaves]
    find = _finder(names)
    found = {}
    for keys, shape in leaves:
        entry = find("/".join(keys))
        if entry is not None:
            found[keys] = slots(keys, shape, *entry)
    _check_places(found)
    return found


def _finder(names: Names) -> Callable[[str], Any]:
    """A function from path to (entry, groups of the regex), or to None."""
    if isinstance(names, Mapping):
        compiled = [(_regex(pattern), entry) for pattern, entry in names.items()]

        def find(path: str) -> Any:
            for regex, entry in compiled:
                if (match := regex.fullmatch(path)) is not None:
                    return entry, {k: v.replace("/", ".") for k, v in match.groupdict().items() if v is not None}
            return None

        return find
    if not callable(names):
        raise TypeError(f"names must be a mapping from regex to torch name, or a function; got {type(names).__name__}")
    return lambda path: None if (entry := names(path)) is None else (entry, {})


def _regex(pattern: Any) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"names: the pattern {pattern!r} is no regular expression: {error}") from None


def slots(keys: tuple[str, ...], shape: tuple[int, ...], entry: Any, groups: dict[str, str]) -> list[Slot]:
    """The slots of one leaf.

    Raises:
        TypeError: for an entry that is neither a name nor a `TorchParameter`.
        ValueError: for an entry that doesn't fit the leaf.
    """
    path = "/".join(keys)
    if isinstance(entry, str):
        entry = _default(path, shape, entry, groups)
    if not isinstance(entry, TorchParameter):
        raise TypeError(f"names: {path} must lead to a torch name or a TorchParameter, got {entry!r}")
    roles = _roles(path, shape, entry, groups)
    first = Slot(keys, shape, roles, (), None, entry, "")
    _check_entry(first, groups)
    parts = range(len(entry.names)) if len(entry.names) > 1 else [None]
    found = []
    for index in np.ndindex(*(shape[axis] for axis in first.stacked)):
        at = {roles[axis]: str(n) for axis, n in zip(first.stacked, index)}
        for part in parts:
            name = entry.names[part or 0].format(**groups, **at)
            found.append(replace(first, index=tuple(index), part=part, name=name))
    return found


def _default(path: str, shape: tuple[int, ...], name: str, groups: dict[str, str]) -> TorchParameter:
    """The entry that a bare name stands for.

    Its kind follows from the leaf's last key and number of axes (a vector has one layout only), and its last word, where it
    has none, from the last key.
    """
    last = path.rpartition("/")[2]
    stacked = len([field for field in _fields(name) if field not in groups])
    kind = "embedding" if last == "embedding" else "plain" if len(shape) - stacked <= 1 else "linear"
    if name.rpartition(".")[2] not in ("weight", "bias"):
        name = f"{name}.{'bias' if last == 'bias' else 'weight'}"
    return TorchParameter(name, kind=kind)


def _fields(name: str) -> list[str]:
    """The words in braces, in order, each once."""
    return list(dict.fromkeys(field for _, field, _, _ in string.Formatter().parse(name) if field))


def _roles(path: str, shape: tuple[int, ...], entry: TorchParameter, groups: dict[str, str]) -> tuple[str, ...]:
    wanted = [field for field in _fields(entry.names[0]) if field not in groups]
    if entry.roles is None:
        rest = len(shape) - len(wanted)
        matrix = ["out"] * rest if entry.kind == "plain" else ["in", "out"]
        if entry.kind in ("conv", "experts", "experts_in_out") or len(matrix) != rest:
            raise ValueError(
                f"names: {path} has shape {shape}, and its axes can't be told from {entry.names[0]!r} alone; name them, "
                f'for example TorchParameter({entry.names[0]!r}, "{" ".join([*wanted, "in"] + ["out"] * (rest - 1))}")'
            )
        return (*wanted, *matrix)
    roles = tuple(entry.roles.split())
    if len(roles) != len(shape):
        raise ValueError(f"names: {path} has {len(shape)} axes, shape {shape}, but its roles are {entry.roles!r}")
    return roles


def _check_entry(slot: Slot, groups: dict[str, str]) -> None:
    path, entry, roles = slot.path, slot.entry, slot.roles
    stacked = [roles[axis] for axis in slot.stacked]
    for field in (field for name in entry.names for field in _fields(name)):
        if field not in stacked and field not in groups:
            raise ValueError(
                f"names: {path}: {{{field}}} in {entry.names[0]!r} is neither a group of the regex nor one of the roles "
                f"{' '.join(roles)!r}"
            )
    if len(set(stacked)) != len(stacked):
        raise ValueError(f"names: {path} has two stacked axes of one name in {entry.roles!r}")
    for name in entry.names:
        if missing := [role for role in stacked if role not in _fields(name)]:
            raise ValueError(
                f"names: {path} is stacked along {missing[0]!r}, so its torch name needs {{{missing[0]}}}; got {name!r}"
            )
    if slot.kind.startswith("experts") != ("expert" in roles):
        raise ValueError(f"names: {path}: the kind 'experts' and an axis with the role 'expert' go together")
    if slot.kind == "conv" and (roles.count("out") != 1 or roles[-1] != "out"):
        raise ValueError(f"names: {path}: a convolution's axes are [*window, in, out]; got {' '.join(roles)!r}")
    width = math.prod(slot.sizes("out", "part"))
    if "part" in roles and slot.sizes("part") != (len(entry.names),):
        raise ValueError(f"names: {path} has {slot.sizes('part')[0]} parts and {len(entry.names)} names")
    if entry.sizes is not None and sum(entry.sizes) != width:
        raise ValueError(f"names: {path} has {width} columns, but sizes {entry.sizes} sum to {sum(entry.sizes)}")
    if entry.columns is not None and entry.columns[1] - entry.columns[0] != width:
        raise ValueError(f"names: {path} has {width} columns, but columns {entry.columns} are not that many")


def _check_places(found: dict[tuple[str, ...], list[Slot]]) -> None:
    """Refuses slots that share a column of a torch parameter, or differ on what one parameter is."""
    by_name: dict[str, list[Slot]] = {}
    for each in found.values():
        for slot in each:
            by_name.setdefault(slot.name, []).append(slot)
    for name, sharing in by_name.items():
        ranges = sorted(slot.torch_columns() for slot in sharing)
        first = sharing[0]
        for slot in sharing[1:]:
            if slot.kind != first.kind or slot.torch_columns()[2] != first.torch_columns()[2]:
                raise ValueError(f"names: {first.path} and {slot.path} differ on what the parameter {name!r} is")
        if any(one[1] > other[0] for one, other in itertools.pairwise(ranges)):
            raise ValueError(f"names: {sharing[0].path} and {sharing[1].path} are both the torch parameter {name!r}")
