"""GeLoRA: a rank for each layer, chosen before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import numpy as np

from jlora.core.protocol.gated import Gated, ranked
from jlora.core.protocol.hyperparameters import check_hyperparameters
from jlora.core.protocol.job import Calibration, Recipe
from jlora.core.protocol.layers import layer_numbers
from jlora.core.protocol.method import Site, Start
from jlora.methods.lora import LoRA


@dataclass(frozen=True)
class GeLoRA(Gated):
    """LoRA with a rank for each layer: `w + s * (a * gate) @ b`, with `a [in, rank]`, `b [rank, out]`.

    `s = alpha / mean of ranks`, the same in all layers, and `gate` is 1 for the ranks of the matrix's layer. In a stack of
    layers every matrix has the arrays of the largest rank among them; beyond its own rank `gate` is 0, and the factors start
    at zero and have no gradient, so that nothing moves them. A leaf that is not stacked has arrays of its own rank. Trains
    `ranks * (in + out)` values a matrix, with the rank of its layer.

    The paper takes the ranks from the intrinsic dimensions of hidden states (`jlora.intrinsic_dimensions` and
    `jlora.gelora_ranks`): a layer that raises the dimension by some number needs at least so many directions. Other
    ranks may be given.

    Costs forward passes over some rows of data before training, and in a step what LoRA of the largest rank costs.

    The first axis along which a leaf is stacked counts layers; else the first number at the end of a key of its path does.

    Args:
        ranks: one a layer, or one for all; None where they are still to be found (which `adapterize` refuses).
        alpha: numerator of the scale.
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given.

    Raises:
        ValueError: for a hyperparameter out of range, and (by `adapterize`) for another number of layers.

    Example:
        >>> dimensions = [7.2, 9.9, 8.8]  # before the layers, and after the last, by jlora.intrinsic_dimensions
        >>> jlora.GeLoRA(ranks=jlora.gelora_ranks(dimensions), alpha=4)
        GeLoRA(ranks=(4, 1), alpha=4, dropout=0.0)

    Reference:
        Ed-dib et al. 2024, arXiv:2412.09250.
    """

    ranks: int | tuple[int, ...] | None = None
    alpha: float = 8.0
    dropout: float = 0.0

    family: ClassVar[str] = "Rank allocation"

    recipe: ClassVar[Recipe] = Recipe(takes=frozenset({"rank", "alpha", "dropout"}), rank_means="mean rank")
    measured: ClassVar[str] = "ranks"

    def __post_init__(self) -> None:
        given = () if self.ranks is None else self.ranks if isinstance(self.ranks, tuple) else (self.ranks,)
        if (given == () and self.ranks is not None) or any(type(rank) is not int or rank < 1 for rank in given):
            raise ValueError(
                f"GeLoRA's ranks must be a positive whole number, or a tuple of one a layer, got {self.ranks!r}"
            )
        check_hyperparameters(self)

    @classmethod
    def job(cls, rank: int, steps: int | None, **options: Any) -> GeLoRA:
        """The mean rank everywhere, until `found`."""
        return cls(rank, **options)

    def found(self, data: Calibration) -> GeLoRA:
        """With the ranks that the dimensions of hidden states ask for."""
        most = min(min(site.in_size, site.out_size) for site in data.sites)
        return replace(self, ranks=gelora_ranks(data.dimensions(), data.budget, most))

    @property
    def scale(self) -> float:
        """`s = alpha / mean of ranks`; the mean counts as 1 while the ranks are still to be found."""
        ranks = self.ranks if isinstance(self.ranks, tuple) else (self.ranks or 1,)
        return self.alpha * len(ranks) / sum(ranks)

    def check(self, site: Site) -> None:
        """Refuses a method without ranks, and one rank for all that is above the matrix's sides."""
        if self.ranks is None:
            raise ValueError(
                "GeLoRA's ranks come from data: find them by jlora.intrinsic_dimensions(fn, params, patterns, batches) and "
                "jlora.gelora_ranks(dimensions), and give them as GeLoRA(ranks=...)"
            )
        if isinstance(self.ranks, int):
            LoRA(self.ranks).check(site)

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """LoRA's factors of the largest rank, which `together` cuts."""
        assert self.ranks is not None
        return LoRA(max(self.ranks) if isinstance(self.ranks, tuple) else self.ranks).start(key, w, site)

    def together(self, key: jax.Array, starts: list[Start], sites: tuple[Site, ...]) -> list[Start]:
        """Gives every matrix its layer's rank.

        Raises:
            ValueError: for ranks of another number of layers, or above a matrix's sides.
        """
        layers, count = layer_numbers(sites)
        ranks = self.ranks if isinstance(self.ranks, tuple) else (self.ranks,) * count
        if len(ranks) != count:
            raise ValueError(
                f"GeLoRA has ranks for {len(ranks)} layers, but {sites[0].path} and the like are in {count}"
            )
        return ranked(starts, sites, [np.asarray(ranks)[layer] for layer in layers], np.ones_like)


def gelora_ranks(
    dimensions: Sequence[float] | np.ndarray, budget: int | None = None, most: int | None = None
) -> tuple[int, ...]:
    """GeLoRA's rank of every layer, `max(round(d[l + 1] - d[l]), 0) + 1`, from `intrinsic_dimensions`.

    Args:
        dimensions: before every layer, and after the last.
        budget: mean rank of a layer. The ranks are then spread in proportion to the paper's, each at least 1, with exactly
            `budget * layers` in all, by the largest remainder (of equal ones the first). This is jlora's addition, to compare
            methods at equal sizes.
        most: the largest rank of a layer, such as the smaller side of the smallest matrix.

    Raises:
        ValueError: for fewer than two dimensions, or a budget below 1 or above `most`.

    Example:
        >>> jlora.gelora_ranks([3.0, 5.2, 4.0, 7.1], budget=4)
        (5, 1, 6)
    """
    dimensions = np.asarray(dimensions, np.float64)
    if dimensions.ndim != 1 or len(dimensions) < 2 or not np.isfinite(dimensions).all():
        raise ValueError(f"gelora_ranks needs the dimensions before and after every layer, got {dimensions!r}")
    own = [max(round(step), 0) + 1 for step in np.diff(dimensions).tolist()]
    bound = sum(own) * (budget or 1) if most is None else most
    if budget is None:
        return tuple(min(rank, bound) for rank in own)
    if not isinstance(budget, int) or isinstance(budget, bool) or not 1 <= budget <= bound:
        raise ValueError(
            f"budget, the mean rank of a layer, must be a whole number from 1 to {most or 'any'}, got {budget!r}"
        )
    return tuple(_spread(own, budget * len(own), bound))


def _spread(own: list[int], total: int, most: int) -> list[int]:
    """Whole numbers from 1 to `most` with an exact total, in proportion to `own` by the largest remainder."""
    # A layer's share is `total * rank / whole`. All is compared in whole numbers, times `whole`, so that ties are exact.
    whole = sum(own)
    ranks = [min(max(total * rank // whole, 1), most) for rank in own]
    while sum(ranks) != total:
        rest = [total * rank - given * whole for rank, given in zip(own, ranks)]
        if sum(ranks) < total:
            ranks[max((n for n in range(len(own)) if ranks[n] < most), key=lambda n: rest[n])] += 1
        else:
            ranks[min((n for n in range(len(own)) if ranks[n] > 1), key=lambda n: rest[n])] -= 1
    return ranks


GeLoRA.CASES = (GeLoRA(ranks=4), GeLoRA(ranks=2, alpha=3, dropout=0.25))
