"""XGBLoRA: adapters of rank 1 on a random part of the layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.hyperparameters import check_hyperparameters, number, one_of
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.layers import layer_numbers
from jlora.core.protocol.method import Factors, Method, Site, Start, View
from jlora.methods.chain import chained
from jlora.methods.lora import LoRA


@dataclass(frozen=True)
class XGBLoRA(Method):
    """Boosting with weak adapters: `w + mask * s * a @ b`, LoRA of rank 1 where `mask` is 1, and nothing where it is 0.

    `s = alpha / rank`. `mask` is 1 for a random part of the layers, drawn for all leaves of the method together: layers, not
    leaves, so that the query and the value of a layer are drawn as one. The first stacked axis counts layers, or the first
    number in a leaf's path says its layer; a leaf with neither is a layer of its own. Where `mask` is 0, gradients and
    update are exactly zero. Trains `rank * (in + out)` values a matrix, of which only the drawn layers' change the output.
    Costs arrays and products for all layers, drawn or not, so that every link has the same shapes.

    Meant for a chain: `jlora.restart` (or `Chain(XGBLoRA(...))`) ends a round of boosting, and draws other layers. The
    penalty on the factors' size that the paper adds is the optimizer's weight decay here.

    Args:
        rank: columns of `a`.
        alpha: numerator of the scale.
        layers: how many layers a link has: a number, or a share of all (0 to 1; at least one layer). The default, a
            third, stands for 11 of 32 layers, which the paper found best according to a review of it.
        init: how `a` is drawn, as in LoRA: "kaiming", "gaussian" or "orthonormal"; `b` is zero.
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given.

    Raises:
        ValueError: for a rank, alpha, dropout, share or init out of range, or more layers than there are.

    Example:
        >>> jlora.Chain(jlora.XGBLoRA(rank=1, layers=0.5), links=8)

    Reference:
        Zhang et al. 2024, arXiv:2410.19694.
    """

    rank: int = 1
    alpha: float = 1.0
    layers: float = 1 / 3
    init: str = "kaiming"
    dropout: float = 0.0

    family: ClassVar[str] = "Chains of adapters"
    local: ClassVar[frozenset[str]] = frozenset({"in", "out"})

    def __post_init__(self) -> None:
        init = one_of(("kaiming", "gaussian", "orthonormal"), '"kaiming", "gaussian" or "orthonormal"')
        layers = number(
            lambda v: v > 0 and (isinstance(v, int) or v <= 1),
            "a number of layers (1, 2, ..) or a share (above 0.0, up to 1.0)",
        )
        check_hyperparameters(self, ("rank",), {"init": init, "layers": layers}, XGBLoRA)

    @classmethod
    def recipes(cls) -> dict[str, Recipe]:
        """In a chain: boosting has many weak links, where the others have a few long ones."""
        return chained("xgblora", cls, rank=1, links=8)

    @property
    def _plain(self) -> LoRA:
        return LoRA(self.rank, self.alpha, init=self.init, dropout=self.dropout)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """LoRA's, and the mask's: one number a matrix."""
        return {**self._plain.axes, "mask": ()}

    @property
    def uses_key(self) -> bool:
        return self.dropout > 0

    def check(self, site: Site) -> None:
        """Refuses a rank above the matrix's sides."""
        self._plain.check(site)

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """LoRA's factors; `together` sets the mask."""
        start = self._plain.start(key, w, site)
        return Start(start.params, {"mask": jnp.ones((), start.params["a"].dtype)})

    def together(self, key: jax.Array, starts: list[Start], sites: tuple[Site, ...]) -> list[Start]:
        """Draws the layers of the link.

        Raises:
            ValueError: for more layers than there are.
        """
        numbers, count = layer_numbers(sites)
        if isinstance(self.layers, int) and self.layers > count:
            raise ValueError(f"{self} asks for {self.layers} layers, but {sites[0].path} and the like are in {count}")
        drawn = self.layers if isinstance(self.layers, int) else max(1, round(self.layers * count))
        mask = (jax.random.permutation(key, count) < drawn).astype(starts[0].frozen["mask"].dtype)
        masks = [mask[jnp.asarray(number)] for number in numbers]
        return [replace(s, frozen={**s.frozen, "mask": own}) for s, own in zip(starts, masks, strict=True)]

    def weight(self, view: View) -> jax.Array:
        """`w + mask * s * a @ b`."""
        a, b = view.params["a"], view.params["b"]
        return view.w.astype(a.dtype) + self._plain.scale * (a @ (view.frozen["mask"] * b))

    def factors(self, view: View) -> Factors:
        """`a` and `mask * s * b`."""
        b = self._plain.scale * view.frozen["mask"] * view.params["b"]
        return Factors(view.params["a"], b, dropout=self.dropout)

    def labels(self, site: Site) -> dict[str, str]:
        return self._plain.labels(site)


XGBLoRA.CASES = (XGBLoRA(rank=1, layers=1.0), XGBLoRA(rank=2, alpha=4, layers=0.7, init="orthonormal", dropout=0.25))
