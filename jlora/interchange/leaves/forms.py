"""The adapter of a leaf in the terms of PEFT: for each method the arrays that PEFT has for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jlora.compose import plain
from jlora.core.protocol.method import Site, stated_kind, states_peft
from jlora.core.protocol.peft import Peft, PeftKind
from jlora.core.protocol.wrapping import Around
from jlora.core.tree import placement
from jlora.core.tree.starts import start_of
from jlora.core.walk import weight as weights
from jlora.core.walk.weight import Weight
from jlora.interchange.leaves import layout
from jlora.interchange.leaves.names import Slot

# What constants that no tensor holds are made again with; it must not matter.
KEY = 0


@dataclass(frozen=True, kw_only=True)
class Form(Peft):
    """What a method tells of its form in PEFT, with the leaf that it is of.

    Attributes:
        site: the leaf.
        residual: for a form made by truncation `|delta - a b| / |delta|` of each matrix; else None.
    """

    site: Site
    residual: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """Columns of `a`."""
        return self.arrays["a"].shape[-1]

    @property
    def scale(self) -> float:
        """The factor of `a @ b`."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def confined(weight: Weight, slots: list[Slot]) -> tuple[Weight, list[Slot]]:
    """Of a method that changes some matrices of a leaf only the one inside it, and the slots of those matrices; else as given.

    So the others are left out of a folder, as PEFT leaves them out with `layers_to_transform`.
    """
    active = weight.method.active(weight.frozen)
    if active is None:
        return weight, slots
    assert weight.site is not None and isinstance(weight.method, Around)
    site = replace(weight.site, method=weight.method.inner)
    frozen = {name: array for name, array in weight.frozen.items() if name in site.method.axes}
    used = _numpy(active)
    kept = [slot for slot in slots if np.any(used[layout.batch_index(slot, site)])]
    return replace(weight, site=site, frozen=frozen), kept


def native(weight: Weight) -> Form | None:
    """The form in which PEFT has the method itself, exact to the bit; None where PEFT doesn't have it.

    Only the exact class counts: a class that is derived from it may have another weight.
    """
    site = weight.site
    assert site is not None
    kind, stated = stated_kind(site.method), states_peft(site.method)
    if kind is None and not stated:
        return None
    arrays = [_numpy(tree) for tree in (weight.params, weight.frozen, weight.shared)]
    if kind is not None:
        return _of_kind(kind, weight, *arrays)
    found = site.method.peft(*arrays)
    if found is None:
        return None
    held = {name: found.fields.get(name, (name,)) for name in found.arrays}
    return Form(**{**vars(found), "fields": held}, site=site)


def _of_kind(kind: PeftKind, weight: Weight, params: Any, frozen: Any, shared: Any) -> Form | None:
    """The fields that a kind has tensors for; None where PEFT has no such method."""
    site = weight.site
    assert site is not None
    if kind.holds is not None and not kind.holds(site.method, site):
        return None
    fields = {**params, **frozen}
    arrays = {tensor.field: fields[tensor.field] for tensor in kind.of(site.method) if tensor.field in fields}
    if not _made_again(weight, {name: value for name, value in frozen.items() if name not in arrays}):
        return None
    held = {name: (name,) for name in arrays}
    return Form(kind.peft_type, arrays, held, shared=dict(shared), site=site)


def _made_again(weight: Weight, constants: dict[str, Any]) -> bool:
    """Whether constants that no tensor holds are what the method makes of its hyperparameters."""
    if not constants:
        return True
    assert weight.site is not None
    if weight.method.needs:
        return False
    made = start_of(weight.site, weights.base(weight), jax.random.key(KEY)).frozen
    return all(np.array_equal(value, np.asarray(made[name])) for name, value in constants.items())


def _numpy(tree: Any) -> Any:
    return jax.tree.map(np.asarray, placement.complete(tree) if jax.process_count() > 1 else tree)


def as_lora(weight: Weight) -> Form | None:
    """The exact LoRA form, scale in `b`, of a method whose weight is `w + a @ b`; None for any other."""
    found = plain.exact(weight)
    form = None if found is None else native(found)
    if form is None:
        return None
    # The factors stand for all fields that are not another role's own, such as DoRA's `m`.
    others = {name for role, held in form.fields.items() if role not in ("a", "b") for name in held}
    names = tuple(
        name for fields in (weight.params, weight.frozen, weight.shared) for name in fields if name not in others
    )
    return replace(form, site=weight.site, fields={**form.fields, "a": names, "b": names})


def truncated(weight: Weight, slots: list[Slot], rank: int) -> Form:
    """The LoRA of a rank that is closest to the change of the weight, with the residual that it leaves.

    Raises:
        ValueError: for a leaf that is no matrix, or a change that is not finite.
    """
    site = weight.site
    assert site is not None
    site = site if site.method.matrix else _with_roles(site, slots[0])
    a, b, residual = plain.nearest(weight, site, rank)
    names = tuple(weight.params) + tuple(weight.frozen) + tuple(weight.shared)
    held, alpha = {"a": names, "b": names}, float(a.shape[-1])
    return Form("lora", {"a": a, "b": b}, held, alpha, site=site, residual=np.asarray(residual))


def _with_roles(site: Site, slot: Slot) -> Site:
    """The site of a method that knows no roles, such as `Full`, with the roles that the names give the axes.

    Raises:
        ValueError: where the names say that the leaf is no matrix.
    """
    if slot.kind == "plain":
        raise ValueError(f"{site.path}: {site.method} trains a leaf that is no matrix, which LoRA can't express")
    roles = {"in_axes": slot.axes("in"), "out_axes": slot.axes("out", "part")}
    batch = tuple(sorted((*slot.stacked, *slot.axes("expert"))))
    return replace(site, **roles, batch_axes=batch, kind="gather" if slot.kind == "embedding" else "dot")
