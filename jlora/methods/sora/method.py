"""SoRA: a gate on every rank, which a soft threshold closes where the rank is not needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.protocol.gated import Gated
from jlora.core.protocol.hyperparameters import NOT_NEGATIVE, check_hyperparameters, one_of
from jlora.core.protocol.job import Recipe, half_as_many_again
from jlora.core.protocol.method import Site, Start
from jlora.methods.lora import kaiming, trained_dtype
from jlora.methods.sora.rule import SoRARule
from jlora.optimize.allocate.budget import Phases


@dataclass(frozen=True)
class SoRA(Gated):
    """Rank by sparse gates: `w + s * (a * g) @ b`, with `a [in, rank]`, gates `g [rank]`, `b [rank, out]`, `s = alpha / rank`.

    After every step `u` of your optimizer the gates take the proximal step of an L1 norm: `g` becomes `T(g + u)`, with
    `T(x) = sign(x) max(|x| - threshold, 0)`. A gate within the threshold is exactly zero, and its rank is out of use until a
    step larger than the threshold opens it again. The threshold is one number a step, not multiplied by the learning rate,
    and may rise in stages, as the paper's schedule has it. Gates never decay (with an optimizer of your own, see to it).
    Trains `rank * (in + out + 1)` values a matrix.

    How many ranks are left depends on the threshold, the number of steps and the learning rate. With `target` it is exact
    (jlora's addition, for comparisons at equal budgets): at step `steps - final_steps` the `target` largest `|g|` a matrix, on
    average over all that share these hyperparameters, are kept for good, and the thresholds end; the others stay zero.

    Costs next to nothing: a comparison for every gate.

    Worth trying where the number of ranks should follow from the task rather than from a budget.

    Args:
        rank: ranks of every matrix at the start.
        alpha: numerator of the scale, which never changes.
        threshold: what a step takes from every gate; with stages that of the last.
        first_threshold: of the first stage, where there are several.
        stages: number of equally long stages between `start_steps` and `steps - final_steps`.
        spacing: how thresholds rise from stage to stage: "linear", by equal amounts, or "log", by equal factors.
        l1: weight of the mean of `|g|` over all gates, whose gradient is added to yours; the reference's `sparse_lambda`.
        target: None, or ranks a matrix at the end, on average.
        steps: optimizer steps of the whole run; the training job fills in its own.
        start_steps: steps before the first stage, with its threshold.
        final_steps: steps after the last stage: with its threshold, or without one where a target is given.
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given.

    Raises:
        ValueError: for a hyperparameter out of range, or phases that leave no step for the stages.

    Example:
        >>> jlora.SoRA(rank=8, alpha=16, threshold=7e-4, first_threshold=0.0, stages=7, l1=1e-3, steps=1000)

    Reference:
        Ding et al. 2023, arXiv:2311.11696. The formula is the paper's, written down from memory, with the threshold a number of
        its own, as in the reference code. The code itself does otherwise: its three masked assignments in a row set all gates
        up to twice the threshold to zero. Defaults, start and the L1 term are the code's.
    """

    rank: int = 8
    alpha: float = 16.0
    threshold: float = 3e-4
    first_threshold: float | None = None
    stages: int = 1
    spacing: str = "linear"
    l1: float = 10.0
    target: int | None = None
    steps: int | None = None
    start_steps: int = 0
    final_steps: int = 0
    dropout: float = 0.0

    family: ClassVar[str] = "Rank allocation"
    gate: ClassVar[str] = "g"
    # The middle of what its paper's and AdaLoRA's scripts have, 5e-4 to 1.2e-3; no run here chose it.
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-3, rank_means="mean rank at the end")

    def __post_init__(self) -> None:
        bounds = dict.fromkeys(("threshold", "first_threshold", "l1"), NOT_NEGATIVE)
        bounds |= {"spacing": one_of(("linear", "log"), "'linear' or 'log'")}
        check_hyperparameters(self, ("rank", "stages", "target"), bounds)
        if self.target is not None and self.target > self.rank:
            raise ValueError(f"SoRA's target ({self.target}) is above the rank that it starts with ({self.rank})")
        self._check_thresholds()

    def _check_thresholds(self) -> None:
        if self.first_threshold is not None and self.first_threshold > self.threshold:
            raise ValueError(
                f"SoRA's first_threshold ({self.first_threshold}) is above its threshold ({self.threshold}): they rise"
            )
        if self.first_threshold is not None and self.stages == 1:
            raise ValueError("SoRA's first_threshold is that of the first of several stages: give stages too")
        if self.first_threshold is None and self.stages > 1:
            raise ValueError(f"SoRA's {self.stages} stages rise from a first_threshold: give that too, such as 0.0")
        if self.spacing == "log" and not self.thresholds[0] > 0:
            raise ValueError("SoRA's spacing 'log' multiplies thresholds: give a first_threshold above 0")

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The threshold of every stage."""
        first = self.threshold if self.first_threshold is None else self.first_threshold
        if self.spacing == "linear" or first == 0:
            return tuple(np.linspace(first, self.threshold, self.stages).tolist())
        return tuple(np.geomspace(first, self.threshold, self.stages).tolist())

    @classmethod
    def job(cls, rank: int, steps: int | None, **options: Any) -> SoRA:
        """`rank` is what is left on average; the thresholds end three tenths before the end."""
        final = 3 * (steps or 0) // 10
        # A third of normal gates is within 0.43: over the run the threshold alone would close those.
        shrink = {"threshold": 0.43 / (steps - final)} if steps else {}
        start = half_as_many_again(rank)
        return cls(rank=start, target=rank, l1=0.0, steps=steps, final_steps=final, **shrink, **options)

    @property
    def phases(self) -> Phases:
        """When thresholds rise."""
        return Phases(self.steps, self.start_steps, self.final_steps, 1)

    @property
    def optimizer_rule(self) -> SoRARule:
        """The thresholds; one L1 term and one target for all sites that agree in everything but rank, alpha and dropout."""
        return SoRARule(self.phases, self.thresholds, self.l1, self.target)

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """`a` kaiming, `b` zero, gates standard normal."""
        key_a, key_g = jax.random.split(key)
        dtype = trained_dtype(w)
        a = kaiming(key_a, (w.shape[0], self.rank), dtype)
        g = jax.random.normal(key_g, (self.rank,), dtype)
        return Start({"a": a, "g": g, "b": jnp.zeros((self.rank, w.shape[1]), dtype)})

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups; gates are vectors, which never decay."""
        return {**super().labels(site), "g": "vector"}


SoRA.CASES = (
    SoRA(rank=4, threshold=1e-5, l1=1e-3, steps=2000),
    SoRA(
        rank=3, alpha=5, threshold=1e-5, first_threshold=0.0, stages=3, l1=0.0, target=3, steps=2000, final_steps=800,
        dropout=0.25,
    ),
)  # fmt: skip
