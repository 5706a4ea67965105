"""The adapter of a leaf in the terms of PEFT: for each method the arrays that PEFT has for it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from jlora.compose import plain
from jlora.core.protocol.method import Site, states_peft
from jlora.core.tree import placement
from jlora.core.walk.weight import Weight
from jlora.interchange.names import Slot


@dataclass(frozen=True)
class Form:
    """One leaf's adapter in PEFT's terms.

    Attributes:
        site: the leaf.
        kind: "lora", "adalora", "vera", "shira", "rows" or "whole" (a trained leaf).
        arrays: by PEFT's role: "a" `[*batch, in, r]`, "b" `[*batch, r, out]`, "m" `[*batch, out]`, ...
        fields: for each of these the fields of the method that it holds.
        alpha: numerator of the scale.
        rslora: whether the scale is `alpha / sqrt(r)` and not `alpha / r`.
        dropout: probability of dropping an entry of the adapter's input while training.
        residual: for a form made by truncation `|delta - a b| / |delta|` of each matrix; else None.
        shared: constants that all leaves of the method have in common.
    """

    site: Site
    kind: str
    arrays: dict[str, np.ndarray]
    fields: dict[str, tuple[str, ...]]
    alpha: float = 1.0
    rslora: bool = False
    dropout: float = 0.0
    residual: np.ndarray | None = None
    shared: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Columns of `a`."""
        return self.arrays["a"].shape[-1]

    @property
    def scale(self) -> float:
        """The factor of `a @ b`."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def native(weight: Weight) -> Form | None:
    """The form in which PEFT has the method itself, exact to the bit; None where PEFT doesn't have it.

    Only the exact class counts: a class that is derived from it may have another weight.
    """
    site = weight.site
    assert site is not None
    if not states_peft(site.method):
        return None
    found = site.method.peft(*(_numpy(tree) for tree in (weight.params, weight.frozen, weight.shared)))
    if found is None:
        return None
    held = {name: found.fields.get(name, (name,)) for name in found.arrays}
    told: Any = {name: getattr(found, name) for name in ("alpha", "rslora", "dropout", "shared")}
    return Form(site, found.kind, found.arrays, held, **told)


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
    return Form(
        site, "lora", {"a": a, "b": b}, {"a": names, "b": names}, float(a.shape[-1]), residual=np.asarray(residual)
    )


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
