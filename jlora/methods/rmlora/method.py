"""RM-LoRA: LoRA whose steps train a few ranks each, regularised towards orthonormal factors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from jlora.core.protocol.hyperparameters import check_hyperparameters
from jlora.core.protocol.job import Recipe
from jlora.methods.lora import LoRA
from jlora.methods.rmlora.rule import RMLoRARule


@dataclass(frozen=True)
class RMLoRA(LoRA):
    """Regularized and masked LoRA: `w + s * a @ b`, of whose `rank` ranks `updated`, drawn anew each step, get a gradient.

    The optimizer of `jlora.optimizer` adds the gradient of `orthogonality` times the mean of `‖aᵀa - 1‖` and `‖b bᵀ - 1‖`
    (Frobenius) over all matrices that share these hyperparameters, and then sets the gradient of all but `updated` ranks of
    each matrix to zero, in every step but the first. As in the reference this does not freeze them: moments and weight
    decay move them on, unless `freeze`. With Adam the mean step shrinks by about `sqrt(updated / rank)`. All else is LoRA;
    with `updated = rank` and `orthogonality = 0` every bit is LoRA's. Trains `rank * (in + out)` values a matrix.

    Costs in every step `rank² * (in + out)` multiply-adds a matrix for the penalty, and the random numbers of the masks.

    Worth trying where LoRA overfits, or where its ranks are nearly dependent.

    Args:
        rank: columns of `a`; at most the smaller side of the matrix.
        alpha: numerator of the scale.
        scaling: "standard" or "rslora".
        init: how the nonzero factor is drawn, by the same names as in `LoRA`.
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given.
        updated: ranks of each matrix that get a gradient in a step.
        independent: whether `a` and `b` draw ranks of their own (the reference's v2) or share them (its v1).
        orthogonality: weight of the penalty.
        freeze: whether the other ranks stay what they were, exactly; their moments fade all the same.
        seed: from which the masks are drawn.

    Raises:
        ValueError: for a hyperparameter out of range.

    Example:
        >>> jlora.RMLoRA(rank=8, alpha=32, updated=4, independent=True)

    Reference:
        Mao et al. 2024, arXiv:2407.12074, by its code, but for one thing: the code also zeroes the gradients of everything
        trained that is no adapter, such as a head, after the first step; here masks are for the adapters alone.
    """

    alpha: float = 16.0
    updated: int = 4
    independent: bool = False
    orthogonality: float = 0.1
    freeze: bool = False
    seed: int = 0

    family: ClassVar[str] = "LoRA and its variants"

    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-3)  # as AdaLoRA's, for the same reason
    peft = LoRA.peft  # the weight is LoRA's

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("rank", "updated"))
        super().__post_init__()
        if self.updated > self.rank:
            raise ValueError(f"RMLoRA's updated ({self.updated}) is above its rank ({self.rank})")

    @classmethod
    def job(cls, rank: int, steps: int | None, **options: Any) -> RMLoRA:
        """Half of the ranks in a step."""
        return cls(rank, updated=math.ceil(rank / 2), **options)

    @property
    def optimizer_rule(self) -> RMLoRARule:
        """One mean of the penalty for all sites that agree in everything but LoRA's own hyperparameters."""
        return RMLoRARule(self.updated, self.independent, self.orthogonality, self.freeze, self.seed)


RMLoRA.CASES = (
    RMLoRA(rank=4, alpha=8, updated=2, orthogonality=0.0),
    RMLoRA(rank=4, alpha=8, updated=3, independent=True, orthogonality=1e-4, freeze=True, dropout=0.25),
)
