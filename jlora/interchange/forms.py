"""What PEFT has for each method: the arrays of a leaf, with the batch axes in front."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import mesh
from jlora.core.protocol.method import Factors, Method, Site, View, states_peft
from jlora.core.walk import weight as weights
from jlora.core.walk.weight import Weight
from jlora.disk.serialize import is_own
from jlora.interchange import svd
from jlora.interchange.names import Slot
from jlora.methods import DoRA, LoRA


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
        residual: `|delta - a b| / |delta|` for each matrix, where this is a truncation.
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
    """The form in which PEFT has the method itself, exact to the bit; None where it has none.

    By the class itself: one derived from it may have another weight.
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
    return jax.tree.map(np.asarray, mesh.complete(tree) if jax.process_count() > 1 else tree)


def is_lora(method: Method) -> bool:
    """Whether a class is LoRA, or one derived from it that says to have its form of PEFT."""
    return isinstance(method, LoRA) and vars(type(method)).get("peft") is LoRA.peft


def as_lora(weight: Weight) -> Form | None:
    """The exact LoRA form, scale in `b`, of a method whose weight is `w + a @ b`; None for any other."""
    site = weight.site
    assert site is not None
    around = type(site.method) is DoRA
    method = site.method.inner if around else site.method  # type: ignore[attr-defined]
    if not method.matrix or not method.low_rank:
        return None
    found: Factors | None = weights.over_batch(method.factors, weight)
    if found is None or found.scale is not None or not (is_own(type(method)) or _agrees(method, found, weight)):
        return None
    arrays = {"a": np.asarray(found.a), "b": np.asarray(found.b)}
    names = tuple(weight.params) + tuple(weight.frozen) + tuple(weight.shared)
    fields = {"a": names, "b": names}
    if around:
        arrays["m"], fields["m"] = np.asarray(weight.params["m"]), ("m",)
        fields = {name: tuple(f for f in held if f != "m") if name != "m" else held for name, held in fields.items()}
    return Form(site, "lora", arrays, fields, float(arrays["a"].shape[-1]), dropout=found.dropout)


def _agrees(method: Method, found: Factors, weight: Weight) -> bool:
    """Whether a method's factors give its weight, as the contract wants it: one that inherits them may have another weight."""
    told, wanted = found.a @ found.b, weights.over_batch(_delta(method), weight)
    # The difference of two weights is no more exact than they are.
    size = jnp.max(jnp.abs(wanted)) * 1e-4 + jnp.max(jnp.abs(weight.array)) * 8 * jnp.finfo(wanted.dtype).eps
    return bool(jnp.max(jnp.abs(told - wanted)) <= size)


def truncated(weight: Weight, slots: list[Slot], rank: int) -> Form:
    """The best LoRA of a rank for what the method adds to the weight, with what it leaves out.

    Raises:
        ValueError: for a leaf that is no matrix, or a change that is not finite.
    """
    site = weight.site
    assert site is not None
    if site.method.matrix:
        delta = np.asarray(weights.over_batch(_delta(site.method), weight))
    else:
        site = _with_roles(site, slots[0])
        whole = site.method.weight(View(weight.array, weight.params, weight.frozen, site, weight.shared))
        delta = np.asarray(site.fold(whole) - site.fold(weight.array).astype(whole.dtype))
    if not np.all(np.isfinite(delta)):
        raise ValueError(f"{site.path}: its adapter holds values that are not finite")
    a, b, residual = svd.truncate(delta, min(rank, *delta.shape[-2:]))
    names = tuple(weight.params) + tuple(weight.frozen) + tuple(weight.shared)
    return Form(
        site, "lora", {"a": a, "b": b}, {"a": names, "b": names}, float(a.shape[-1]), residual=np.asarray(residual)
    )


def _with_roles(site: Site, slot: Slot) -> Site:
    """A site whose method takes the leaf as it is, with the axes that the names give."""
    if slot.kind == "plain":
        raise ValueError(f"{site.path}: {site.method} trains a leaf that is no matrix, which LoRA can't express")
    roles = {"in_axes": slot.axes("in"), "out_axes": slot.axes("out", "part")}
    batch = tuple(sorted((*slot.stacked, *slot.axes("expert"))))
    return replace(site, **roles, batch_axes=batch, kind="gather" if slot.kind == "embedding" else "dot")


def _delta(method: Method) -> Callable[[View], jax.Array]:
    def delta(view: View) -> jax.Array:
        weight = method.weight(view)
        return weight - view.w.astype(weight.dtype)

    return delta
