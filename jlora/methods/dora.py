"""DoRA: magnitude and direction, around any method that has a weight."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora.core.products.update import Update
from jlora.core.protocol.method import Method, Site, Start, View, states_peft
from jlora.core.protocol.peft import Peft
from jlora.core.protocol.statistics import RESIDUAL
from jlora.core.protocol.wrapping import Around
from jlora.methods.chain import Chain
from jlora.methods.lora import LoRA, trained_dtype


@dataclass(frozen=True)
class DoRA(Around):
    """Weight-decomposed adaptation: `m / n * v`, with `v [in, out]` the inner method's weight.

    `m [out]` is trained and starts as the column norms of `w`; `n [out]` are the column norms of `v`, a constant for the
    gradient. So the output starts at the base's, and a column's length is always `m`. Trains `count(inner) + out` values a
    matrix. The norm of a low-rank weight is found without forming it. For a column of zeros `n` is 1. Where the inner method
    starts from a residual, `m` starts as the norms of `v`, and so the output where the inner method's does.

    Worth trying where LoRA at a small rank falls short of full fine-tuning.

    Args:
        inner: any method with an effective weight: `LoRA(...)`, ...

    Raises:
        TypeError: for an inner method that adapts no matrix (such as `Full`), is DoRA itself, or is a chain.

    Example:
        >>> jlora.DoRA(jlora.LoRA(rank=8, alpha=16))

    Reference:
        Liu et al. 2024, arXiv:2402.09353. The column norms are one per output, over the inputs, as in both reference codes.
    """

    inner: Method = field(default_factory=LoRA)

    family: ClassVar[str] = "Weight decomposition"

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Method) or not self.inner.matrix or isinstance(self.inner, DoRA):
            raise TypeError(f"DoRA goes around a method that adapts a matrix, such as LoRA(8); got {self.inner!r}")
        if not self.inner.mergeable or self.inner.beside:
            raise TypeError(
                "DoRA needs an inner method that is a weight and nothing else; "
                f"{self.inner!r} changes the bias too, or has no weight"
            )
        if self.inner.uses_key and self.form is None:
            raise TypeError(
                f"DoRA forms the weight of {self.inner}, in which no dropout can act; put it outside: Dropout(DoRA(...))"
            )
        if isinstance(self.inner, Chain):
            raise TypeError(
                "DoRA can't go around Chain: a link of DoRA is no sum of low rank; use jlora.restart on DoRA(LoRA(8)) and "
                "a float32 base"
            )

    @property
    def local(self) -> frozenset[str]:  # type: ignore[override]
        """Columns may be cut; rows may not, since the norm runs over them."""
        return self.inner.local & {"out"}

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        return {**self.inner.axes, "m": ("out",)}

    @property
    def form(self) -> type[Update] | None:  # type: ignore[override]
        """The inner method's, where that finds column norms and takes a scale."""
        form = self.inner.form
        return form if form is not None and form.owns("norms") and form.owns("scaled") else None

    def start(self, key: jax.Array, w: jax.Array, site: Site, **statistics: jax.Array) -> Start:
        """The inner start, and the column norms of the matrix."""
        inner = self.inner.start(key, w, site, **statistics)
        corrected = RESIDUAL in self.inner.needs
        first = self.inner.weight(View(w, inner.params, inner.frozen, site)) if corrected else w
        m = column_norms(first).astype(trained_dtype(w))
        return Start({**inner.params, "m": m}, inner.frozen)

    def weight(self, view: View) -> jax.Array:
        """`m / n * v`."""
        v = self.inner.weight(view)
        return v * _ratio(view.params["m"], column_norms(v)).astype(v.dtype)

    def update(self, view: View) -> Update | None:
        """The inner update with `m / n` as the scale."""
        inner = self.inner.update(view)
        if inner is None:
            return None
        norms = jax.lax.stop_gradient(inner).norms(jax.lax.stop_gradient(view.w))
        return inner.scaled(_ratio(view.params["m"], norms))

    def peft(self, params: Any, frozen: Any, shared: Any) -> Peft | None:
        """PEFT's `use_dora`, around what is PEFT's LoRA."""
        inner = self.inner.peft(params, frozen, shared) if states_peft(self.inner) else None
        if inner is None or inner.kind != "lora":
            return None
        return replace(inner, arrays={**inner.arrays, "m": params["m"]})

    def labels(self, site: Site) -> dict[str, str]:
        """The magnitude learns as B does and never decays, since decay would shrink the base."""
        return {**self.inner.labels(site), "m": "vector"}


def column_norms(w: jax.Array) -> jax.Array:
    """`sqrt(sum over in of w²)`, `[out]`, in float32 at least."""
    w = w.astype(trained_dtype(w))
    return jnp.sqrt(jnp.sum(w * w, axis=0))


def _ratio(m: jax.Array, norms: jax.Array) -> jax.Array:
    norms = jax.lax.stop_gradient(norms)
    return m / jnp.where(norms > 0, norms, 1).astype(m.dtype)


DoRA.CASES = (DoRA(LoRA(rank=4, alpha=8)), DoRA(LoRA(rank=2, scaling="rslora", dropout=0.25)))
