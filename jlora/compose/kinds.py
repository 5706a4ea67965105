"""Adapters that are no low-rank factors, in slots: the method of a leaf whose slots are of several kinds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.compose.slotted import Slotted
from jlora.core.products.by_kind import ByKind
from jlora.core.protocol.fields import Fields
from jlora.core.protocol.method import Arrays, Site, View
from jlora.core.protocol.wrapping import parts
from jlora.core.walk.weight import Weight
from jlora.methods.shira import SHiRA
from jlora.prompts.virtual import Virtual

#: The name of the array that has the kind of each slot.
KIND = "kind"


@dataclass(frozen=True)
class Array:
    """One array of a kind.

    Attributes:
        name: of the method's field.
        shape: of one matrix.
        dtype: its name.
        frozen: whether it is a constant.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    frozen: bool


@dataclass(frozen=True)
class Kind:
    """What slots must have in common to be computed together: a method with all hyperparameters, and the shapes of its arrays.

    Attributes:
        method: the method.
        arrays: its arrays.
    """

    method: Any
    arrays: tuple[Array, ...]

    def holds(self, other: Kind) -> bool:
        """Whether an adapter of another kind fits: the same, or fewer entries of a sparse one."""
        if not isinstance(self.method, SHiRA) or not isinstance(other.method, SHiRA):
            return self == other
        plain = [tuple(replace(array, shape=()) for array in kind.arrays) for kind in (self, other)]
        return plain[0] == plain[1] and other.method.entries <= self.method.entries


@dataclass(frozen=True)
class OfKinds(Slotted):
    """Slots as `Slotted` has them, or of other kinds: those have the arrays of their method in place of factors.

    Args:
        kinds: the kinds beside low-rank factors, numbered from 1.
    """

    kinds: tuple[Kind, ...] = ()

    form = ByKind

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        others = {field(n, array.name): ("", *[""] * len(array.shape)) for n, array in self.numbered}
        return {**super().axes, KIND: ("",), **others}

    def check_context(self, context: Arrays) -> None:
        """As `Slotted`; refuses weights too."""
        super().check_context(context)
        if context.get("weights") is not None:
            methods = ", ".join(str(kind.method) for kind in self.kinds)
            raise ValueError(
                f"adapters that hold no factors ({methods}) can't be mixed by weights=; choose by slot=, or put those with "
                "factors into a bank of their own"
            )

    @property
    def numbered(self) -> list[tuple[int, Array]]:
        """All arrays of the kinds, each with the number of its kind."""
        return [(n, array) for n, kind in enumerate(self.kinds, 1) for array in kind.arrays]

    def arrays(self, site: Site, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """As those of `Slotted`, the kind of each slot, and the arrays of every kind."""
        front = (*site.batch_shape, self.slots)
        shapes = {field(n, each.name): ((*front, *each.shape), each.dtype) for n, each in self.numbered}
        shapes |= {KIND: (front, jnp.int32)}
        return super().arrays(site, dtype) | {
            name: jax.ShapeDtypeStruct(shape, kind) for name, (shape, kind) in shapes.items()
        }

    def weight(self, view: View) -> jax.Array:
        """That of the one choice for all rows; there is none where rows choose for themselves, or a kind has none."""
        return self.update(view).weight(view.w)

    def update(self, view: View) -> ByKind:
        """All slots of all kinds, and what the call chooses."""
        slots, mine = super().update(view), view.params
        fields = tuple(
            tuple(
                {each.name: mine[field(n, each.name)] for each in kind.arrays if each.frozen == frozen}
                for frozen in (False, True)
            )
            for n, kind in enumerate(self.kinds, 1)
        )
        sites = tuple(replace(view.site, method=kind.method) for kind in self.kinds)
        bare = replace(view, params={}, frozen={}, context={})
        return ByKind(slots, mine[KIND], fields, bare, sites)  # type: ignore[arg-type]


def field(number: int, name: str) -> str:
    """The name of a kind's array among those of a leaf."""
    return f"kind{number}_{name}"


def kind_of(weight: Weight, site: Site) -> tuple[Kind, dict[str, jax.Array]] | str:
    """A leaf's kind and arrays `[*batch, ...]`, or why a slot can't hold it."""
    why = _refusal(weight, site)
    if why is not None:
        return why
    params, frozen, method = dict(weight.params), dict(weight.frozen), site.method
    if type(method) is SHiRA:  # whatever mask it had, entries are entries
        params = {"values": params["values"] * jnp.asarray(method.scale, params["values"].dtype)}
        method = SHiRA(entries=params["values"].shape[-1])
    depth = len(site.batch_axes)
    arrays = [
        Array(name, tuple(array.shape[depth:]), str(array.dtype), fields is frozen)
        for fields in (params, frozen)
        for name, array in sorted(fields.items())
    ]
    return Kind(method, tuple(arrays)), {**params, **frozen}


def _refusal(weight: Weight, site: Site) -> str | None:
    """Why a slot of a row can't hold what a leaf's method does."""
    if not site.method.matrix or site.kind != "dot":
        return "takes its leaf otherwise than as a product's matrix, which rows can't have each their own of"
    if weight.beside:
        return f"changes the {', '.join(weight.beside)} beside the matrix too, which rows can't have each their own of"
    for method in parts(site.method):
        if isinstance(method, Virtual):
            return "stands in front of a text, where no slots are"
        if method.context or method.tells:
            return "wants to be told something by every call, or asks other leaves, which is not done here"
        if isinstance(method, Fields):
            return "trains the numbers in which the base is kept, which rows can't have each their own of"
    if weight.shared:
        return "shares arrays between leaves, which slots don't have"
    return None


def joined(every: Iterable[Kind]) -> tuple[Kind, ...]:
    """Room for all of some kinds: each once, and of sparse ones that with the most entries, where the first of them stood."""
    found: list[Kind] = []
    for kind in every:
        if any(other.holds(kind) for other in found):
            continue
        fewer = next((n for n, other in enumerate(found) if kind.holds(other)), None)
        if fewer is None:
            found.append(kind)
        else:
            found[fewer] = kind
    return tuple(found)


def with_room(every: Sequence[Slotted], slots: int) -> Slotted:
    """What slots must be to hold what any of some others hold; kinds keep their numbers in the first.

    Args:
        every: those, one at least.
        slots: how many.
    """
    kinds = joined(kind for each in every if isinstance(each, OfKinds) for kind in each.kinds)
    rank, gains = max(each.rank for each in every), any(each.gains for each in every)
    return OfKinds(slots, rank, gains, kinds=kinds) if kinds else Slotted(slots, rank, gains)


def placed(site: Site, kind: Kind, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An adapter's arrays of one leaf by the names that they have in a slot.

    Args:
        site: the leaf, with the `OfKinds` of the slots.
        kind: the adapter's kind there.
        arrays: its arrays, `[*batch, ...]`.

    Raises:
        ValueError: where no kind of the slots holds it.
    """
    has = site.method.kinds if isinstance(site.method, OfKinds) else ()
    number = next((n for n, each in enumerate(has, 1) if each.holds(kind)), None)
    if number is None:
        there = ", ".join(str(each.method) for each in has) or "no method beside low-rank factors"
        raise ValueError(f"there is no room for {kind.method}, but for {there}")
    whole = _filled_up(has[number - 1], arrays, site.in_size * site.out_size)
    named = {field(number, name): array for name, array in whole.items()}
    return {KIND: np.full(site.batch_shape, number, np.int32), **named}


def grown(before: Slotted, after: Slotted, arrays: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The arrays of all slots with as many entries of a kind as it has room for afterwards; others as they are.

    Args:
        before, after: the method of the slots; kinds have the same numbers in both.
        arrays: by name.
        size: entries of a matrix.
    """
    found = dict(arrays)
    pairs = (
        zip(before.kinds, after.kinds, strict=False)
        if isinstance(before, OfKinds) and isinstance(after, OfKinds)
        else ()
    )
    for n, (old, new) in enumerate(pairs, 1):
        if old != new:
            own = {each.name: np.asarray(arrays[field(n, each.name)]) for each in old.arrays}
            found |= {field(n, name): jnp.asarray(x) for name, x in _filled_up(new, own, size).items()}
    return found


def _filled_up(kind: Kind, arrays: Mapping[str, np.ndarray], size: int) -> dict[str, np.ndarray]:
    """An adapter's arrays with the shapes of a kind that holds it; `size` are the entries of a matrix."""
    if not isinstance(kind.method, SHiRA) or arrays["values"].shape[-1] == kind.method.entries:
        return dict(arrays)
    values, index = arrays["values"], arrays["index"]
    more = kind.method.entries - values.shape[-1]
    # No position stands twice: that is promised to the products.
    flat = index.reshape(-1, index.shape[-1])
    free = np.stack([np.setdiff1d(np.arange(size, dtype=flat.dtype), each)[:more] for each in flat])
    return {
        "values": np.concatenate([values, np.zeros((*values.shape[:-1], more), values.dtype)], axis=-1),
        "index": np.concatenate([flat, free], axis=-1).reshape(*values.shape[:-1], -1),
    }
