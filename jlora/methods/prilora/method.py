"""PRILoRA: ranks that grow from the first layer to the last, and a pruned `a`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np

from jlora.core.protocol.gated import Gated, ranked
from jlora.core.protocol.hyperparameters import check_hyperparameters, integer, one_of
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.layers import layer_numbers
from jlora.core.protocol.method import Site, Start
from jlora.methods.lora import LoRA
from jlora.methods.prilora.rule import PRILoRARule


@dataclass(frozen=True)
class PRILoRA(Gated):
    """LoRA with ranks that rise over the layers, pruned: `w + alpha * (a * gate) @ b` with `gate` 1 / rank.

    A layer's rank is `first + layer * (last - first) / (layers - 1)`, rounded so that layers at equal distances from both
    ends add up to `first + last`; a model of one layer has the mean. In a stack of layers every matrix has the arrays of the
    largest rank among them; beyond its own rank `gate` is 0, and the factors start at zero and have
    no gradient.

    Every `every` steps the optimizer prunes `a`: of each `group` entries that follow each other in a column, the `pruned`
    with the smallest `|a| * x` become zero, and so do their moments. `x [in]` is the moving average of the norms of the
    layer's input features, which `jlora.observe(fn, jlora.input_norms)` takes in the forward pass; hand them over by
    `tx.update(gradients, opt_state, params, inputs=seen)`. Trains `round((first + last) / 2) * (in + out)` values a matrix
    on average. Costs a sum of the squares of every input in each forward pass, and a sort of the groups in each pruning.

    Worth trying where later layers matter more, as they mostly do in classification.

    Args:
        first: rank of the first layer.
        last: rank of the last layer.
        alpha: numerator of the scale; each layer divides it by its own rank.
        every: steps from one pruning to the next.
        pruned: entries pruned of each group; 0 prunes nothing, and needs no inputs.
        group: entries of a group, along the inputs.
        beta: memory of the average of the inputs' norms.
        mode: "zero": pruned entries learn on from zero; "freeze": they stay zero.
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given.

    Raises:
        ValueError: for a hyperparameter out of range.

    Example:
        >>> jlora.adapterize(params, {r".*/q_proj/kernel": jlora.PRILoRA(first=2, last=6, alpha=8)})

    Reference:
        Benedek & Wolf 2024, arXiv:2401.11316, of which only the abstract was read: the defaults are the paper's as far as that
        tells them.
    """

    first: int = 4
    last: int = 12
    alpha: float = 8.0
    every: int = 40
    pruned: int = 2
    group: int = 4
    beta: float = 0.9
    mode: str = "zero"
    dropout: float = 0.0

    family: ClassVar[str] = "Rank allocation"

    recipe: ClassVar[Recipe] = Recipe(takes=frozenset({"rank", "alpha", "dropout"}), rank_means="mean rank")

    def __post_init__(self) -> None:
        modes = one_of(("zero", "freeze"), '"zero" or "freeze"')
        bounds = {"pruned": integer(0, "a whole number of at least 0"), "mode": modes}
        check_hyperparameters(self, ("first", "last", "every", "group"), bounds)
        if self.pruned >= self.group:
            raise ValueError(f"PRILoRA's pruned ({self.pruned}) must be below its group ({self.group})")

    @classmethod
    def job(cls, rank: int, steps: int | None, **options: Any) -> PRILoRA:
        """From half the rank to one and a half, as in the paper's 4 to 12; pruned ten times at least."""
        first, every = max(1, rank // 2), 40 if steps is None else max(1, min(40, steps // 10))
        return cls(first, 2 * rank - first, every=every, **options)

    @property
    def scale(self) -> float:
        """`alpha` alone: each layer's gate divides by the layer's rank."""
        return self.alpha

    @property
    def optimizer_rule(self) -> PRILoRARule | None:
        """The pruning of `a`; None where nothing is pruned."""
        return PRILoRARule(self.every, self.pruned, self.group, self.beta, self.mode) if self.pruned else None

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """LoRA's factors of the largest rank, which `together` cuts."""
        return LoRA(max(self.first, self.last)).start(key, w, site)

    def together(self, key: jax.Array, starts: list[Start], sites: tuple[Site, ...]) -> list[Start]:
        """Gives every matrix its layer's rank."""
        layers, count = layer_numbers(sites)
        ranks = linear_ranks(self.first, self.last, count)
        return ranked(starts, sites, [ranks[layer] for layer in layers], lambda rank: 1 / rank)


def linear_ranks(first: int, last: int, layers: int) -> np.ndarray:
    """Ranks from `first` to `last` in equal steps; a half is rounded up in the first half of the layers, down in the other."""
    if layers == 1:
        return np.array([round((first + last) / 2)])
    # In whole numbers, since float steps would round some halves to the wrong side.
    twice = 2 * (first * (layers - 1) + np.arange(layers) * (last - first))
    up = (twice + layers - 1) // (2 * (layers - 1))
    down = -((-twice + layers - 1) // (2 * (layers - 1)))
    return np.where(2 * np.arange(layers) < layers, up, down)


PRILoRA.CASES = (
    PRILoRA(first=2, last=6, every=400),
    PRILoRA(first=3, last=2, alpha=5, every=400, pruned=1, group=3, mode="freeze", dropout=0.25),
)
