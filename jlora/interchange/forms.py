"""What PEFT has for each method: the arrays of a leaf, with the batch axes in front."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import mesh
from jlora.core.protocol.method import Factors, Method, Site, View
from jlora.core.walk import weight as weights
from jlora.core.walk.weight import Weight
from jlora.disk.serialize import is_own
from jlora.interchange import svd
from jlora.interchange.names import Slot
from jlora.methods import AdaLoRA, DoRA, Full, LoRA, RMLoRA, Rows, SHiRA, VeRA


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
    form = NATIVE.get(type(site.method))
    if form is None:
        return None
    arrays = {"params": _numpy(weight.params), "frozen": _numpy(weight.frozen), "shared": _numpy(weight.shared)}
    return form(site, site.method, arrays)


def _numpy(tree: Any) -> Any:
    return jax.tree.map(np.asarray, mesh.complete(tree) if jax.process_count() > 1 else tree)


def _lora(site: Site, method: Any, arrays: dict[str, Any]) -> Form:
    """LoRA; where it starts from a part of the weight, `[a | a0] @ [b; -b0]` of twice the rank."""
    a, b = arrays["params"]["a"], arrays["params"]["b"]
    fields, alpha = {"a": ("a",), "b": ("b",)}, method.alpha
    if method.from_weight:
        a = np.concatenate([a, arrays["frozen"]["a0"]], axis=-1)
        b = np.concatenate([b, -arrays["frozen"]["b0"]], axis=-2)
        fields = {"a": ("a", "a0"), "b": ("b", "b0")}
        alpha = alpha * (2**0.5 if method.scaling == "rslora" else 2)
    return Form(site, "lora", {"a": a, "b": b}, fields, alpha, method.scaling == "rslora", method.dropout)


def _dora(site: Site, method: Any, arrays: dict[str, Any]) -> Form | None:
    if type(method.inner) not in LORAS:
        return None
    inner = _lora(site, method.inner, arrays)
    return Form(
        site,
        "lora",
        {**inner.arrays, "m": arrays["params"]["m"]},
        {**inner.fields, "m": ("m",)},
        inner.alpha,
        inner.rslora,
        inner.dropout,
    )


def _whole(site: Site, method: Any, arrays: dict[str, Any]) -> Form:
    return Form(site, "whole", {"w": arrays["params"]["w"]}, {"w": ("w",)})


def _adalora(site: Site, method: Any, arrays: dict[str, Any]) -> Form:
    held = {name: arrays["params"][name] for name in ("a", "e", "b")}
    return Form(site, "adalora", held, {name: (name,) for name in held}, method.alpha, dropout=method.dropout)


def _vera(site: Site, method: Any, arrays: dict[str, Any]) -> Form:
    held = {name: arrays["params"][name] for name in ("d", "b")}
    return Form(site, "vera", held, {n: (n,) for n in held}, dropout=method.dropout, shared=arrays["shared"])


def _shira(site: Site, method: Any, arrays: dict[str, Any]) -> Form:
    values = arrays["params"]["values"]
    values = values if method.scale == 1 else values * values.dtype.type(method.scale)
    held = {"values": values, "index": arrays["frozen"]["index"]}
    return Form(site, "shira", held, {name: (name,) for name in held})


def _rows(site: Site, method: Any, arrays: dict[str, Any]) -> Form:
    return Form(site, "rows", {"rows": arrays["params"]["rows"]}, {"rows": ("rows",)})


#: The classes whose weight is LoRA's.
LORAS: tuple[type[Method], ...] = (LoRA, RMLoRA)

NATIVE: dict[type[Method], Callable[[Site, Any, dict[str, Any]], Form | None]] = {
    **dict.fromkeys(LORAS, _lora),
    DoRA: _dora,
    Full: _whole,
    AdaLoRA: _adalora,
    VeRA: _vera,
    SHiRA: _shira,
    Rows: _rows,
}


def as_lora(weight: Weight) -> Form | None:
    """The exact LoRA form, scale in `b`, of a method whose weight is `w + a @ b`; None for any other."""
    site = weight.site
    assert site is not None
    around = type(site.method) is DoRA
    method = site.method.inner if around else site.method  # type: ignore[attr-defined]
    if not method.matrix or method.form is not Factors:
        return None
    found: Factors | None = weights.over_batch(method.update, weight)
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
