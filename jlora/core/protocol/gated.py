"""What methods with a gate on every rank have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.protocol.hyperparameters import check_rank
from jlora.core.protocol.method import Arrays, Factors, Method, Site, Start, View, factor_labels
from jlora.core.protocol.plain import PlainLoRA


@dataclass(frozen=True)
class Gated(Method):
    """Base of methods with the weight `w + scale * (a * gates) @ b`, with `a [in, r]`, `gates [r]`, `b [r, out]`.

    A subclass has the hyperparameters `alpha` and `dropout`, and `rank` unless it overrides `scale`.

    Class attributes:
        gate: name of the field that the gates come from, trained or constant.
    """

    gate: ClassVar[str] = "gate"
    local: ClassVar[frozenset[str]] = frozenset({"in", "out"})

    @property
    def scale(self) -> float:
        """`alpha / rank`, with the rank at the start, however many ranks are in use later."""
        return self.alpha / self.rank  # type: ignore[attr-defined]

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        return {"a": ("in", "rank"), self.gate: ("rank",), "b": ("rank", "out")}

    @property
    def uses_key(self) -> bool:
        return self.dropout > 0  # type: ignore[attr-defined]

    def check(self, site: Site) -> None:
        """Refuses ranks above the matrix's sides."""
        check_rank(self, site)

    def gates(self, fields: Arrays) -> jax.Array:
        """The gates `[r]`, zero for ranks that are out of use: `jlora.compact` drops these ranks, whatever their factors hold.

        Args:
            fields: the method's arrays by name, trained and constant.
        """
        return fields[self.gate]

    def weight(self, view: View) -> jax.Array:
        """`w + scale * (a * gates) @ b`."""
        a, gates, b = self._parts(view)
        return view.w.astype(a.dtype) + self.scale * ((a * gates[None, :]) @ b)

    def factors(self, view: View) -> Factors:
        """`a` and `b`, of which the one with fewer values takes `scale * gates`."""
        a, gates, b = self._parts(view)
        gates, dropout = self.scale * gates, self.dropout  # type: ignore[attr-defined]
        if a.shape[0] <= b.shape[1]:
            return Factors(a * gates[None, :], b, dropout=dropout)
        return Factors(a, gates[:, None] * b, dropout=dropout)

    def plain(self, view: View) -> PlainLoRA:
        """The same, with the gates apart."""
        a, gates, b = self._parts(view)
        return PlainLoRA(a, gates, b, self.scale, self.dropout)  # type: ignore[attr-defined]

    def _parts(self, view: View) -> tuple[jax.Array, jax.Array, jax.Array]:
        return view.params["a"], self.gates({**view.frozen, **view.params}), view.params["b"]

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups of the factors."""
        return factor_labels(site, {"a": "a", "b": "b"})


def ranked(
    starts: list[Start], sites: tuple[Site, ...], ranks: list[np.ndarray], value: Callable[[np.ndarray], Any]
) -> list[Start]:
    """Gives every matrix a rank of its own: of starts with factors of a larger rank makes such with constant gates.

    Matrices of a stack keep arrays of one shape, so a leaf's factors are cut to the largest rank among its matrices. For the
    ranks beyond a matrix's own the factors and the gate are zero.

    Args:
        starts: of all leaves, with factors `a [*batch, in, r]`, `b [*batch, r, out]`.
        sites: the leaves.
        ranks: for each leaf `[*batch]`, the rank of every matrix.
        value: gives the gate of a rank in use, from the matrix's rank.

    Raises:
        ValueError: for a rank above a matrix's sides.
    """
    cut = []
    for start, site, rank in zip(starts, sites, ranks, strict=True):
        width, side = int(np.max(rank)), min(site.in_size, site.out_size)
        if width > side:
            raise ValueError(
                f"{site.path}, shape {site.shape}: its layer's rank {width} is above the smaller side of the "
                f"{site.in_size} x {site.out_size} matrix; use {side} or less"
            )
        used = np.arange(width) < rank[..., None]
        a, b = start.params["a"][..., :width], start.params["b"][..., :width, :]
        fields = {"a": jnp.where(used[..., None, :], a, 0), "b": jnp.where(used[..., :, None], b, 0)}
        gate = jnp.asarray(np.where(used, np.asarray(value(rank))[..., None], 0), a.dtype)
        cut.append(replace(start, params={**start.params, **fields}, frozen={**start.frozen, "gate": gate}))
    return cut
