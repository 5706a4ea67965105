"""BeamLoRA: ranks as beams, which a score ranks, and of which the worst give way to copies of the best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.gated import Gated
from jlora.core.protocol.hyperparameters import ABOVE_ZERO_TO_ONE, POSITIVE, check_hyperparameters
from jlora.core.protocol.method import Arrays, Site, Start
from jlora.methods.beamlora import rule
from jlora.methods.beamlora.rule import BeamLoRARule
from jlora.methods.lora import kaiming, trained_dtype
from jlora.optimize.allocate.budget import Phases


@dataclass(frozen=True)
class BeamLoRA(Gated):
    """Ranks as beams: `w + s * (a * e) @ b` with `e = rank * softmax(score / temperature)` and `s = alpha / rank`.

    `a [in, rank]`, `score [rank]` and `b [rank, out]` are trained. All scores start at zero, where `e` is one and this is
    LoRA. The optimizer of `jlora.optimizer` keeps a snapshot of `a`, `b` and their moments, taken at the middle of every
    interval. At the end of an interval all ranks of all matrices that share these hyperparameters are ordered by `e`, largest
    first; the first ones whose `e` add up to the part `p_t` of the sum of all stay, the others are dropped, of each matrix at
    most half. A dropped rank is replaced by a copy, from the snapshot, of one of the best ranks of the same matrix; the
    original and the copy both get the mean of the two scores, and scores lose their moments. So the number of ranks stays,
    and the loss may jump. `p_t` rises from `top_p` to 1 over the first `steps - final_steps` steps as half a cosine. Trains
    `rank * (in + out + 1)` values a matrix.

    Costs a copy of the factors and their moments, and at the end of an interval one sort of all ranks.

    Worth trying at large ranks, where many of LoRA's ranks do little.

    Args:
        rank: ranks of every matrix; stays.
        alpha: numerator of the scale.
        temperature: of the softmax; the reference has 0.03 at learning rates below 1e-4.
        top_p: `p_t` at the first choice.
        steps: optimizer steps of the whole run; the training job fills in its own.
        final_steps: steps in which all ranks are kept; a third of the run in the reference.
        interval: steps from one choice to the next.
        seed: of the shuffling that says which best rank replaces which dropped one.
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given.

    Raises:
        ValueError: for a hyperparameter out of range, or phases that leave no step for a choice.

    Example:
        >>> jlora.BeamLoRA(rank=8, alpha=16, steps=1000, final_steps=333, interval=100)

    Reference:
        Gu et al. 2025, arXiv:2502.13604, by its code: the top-p runs over all matrices (the paper describes it for each).
        Moments of copied ranks are copied with them, as the paper means it; the code's copy writes into a temporary and has
        no effect. The code may drop more than half of a matrix, and then copies what it dropped.
    """

    rank: int = 64
    alpha: float = 128.0
    temperature: float = 0.05
    top_p: float = 0.95
    steps: int | None = None
    final_steps: int = 0
    interval: int = 3000
    seed: int = 0
    dropout: float = 0.0

    family: ClassVar[str] = "Rank allocation"
    gate: ClassVar[str] = "score"

    def __post_init__(self) -> None:
        bounds = {"temperature": POSITIVE, "top_p": ABOVE_ZERO_TO_ONE}
        check_hyperparameters(self, ("rank",), bounds)
        if self.interval < 2:
            raise ValueError(
                f"BeamLoRA's interval must be at least 2, for a snapshot at its middle, got {self.interval}"
            )
        if self.steps is not None and 2 * self.interval > max(4, self.steps):
            raise ValueError(
                f"BeamLoRA's interval ({self.interval}) leaves none of the {self.steps} steps for a choice: it needs twice as "
                "many"
            )

    @classmethod
    def job(cls, rank: int, steps: int | None, **options: Any) -> BeamLoRA:
        """The reference's shares of its run: a choice every twelfth, and all ranks kept in the last third."""
        number = steps or 0
        return cls(rank, steps=steps, final_steps=number // 3, interval=max(2, number // 12), **options)

    @property
    def phases(self) -> Phases:
        """When ranks are dropped."""
        return Phases(self.steps, 0, self.final_steps, self.interval)

    @property
    def optimizer_rule(self) -> BeamLoRARule:
        """The choices, by one order of the ranks of all sites that agree in everything but rank, alpha and dropout."""
        return BeamLoRARule(self.phases, self.temperature, self.top_p, self.seed)

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """`a` kaiming, `b` and the scores zero."""
        dtype = trained_dtype(w)
        a = kaiming(key, (w.shape[0], self.rank), dtype)
        return Start({"a": a, "score": jnp.zeros(self.rank, dtype), "b": jnp.zeros((self.rank, w.shape[1]), dtype)})

    def gates(self, fields: Arrays) -> jax.Array:
        """`e = rank * softmax(score / temperature)`, `[rank]`."""
        score = fields["score"]
        return rule.gates(score, self.temperature).astype(score.dtype)

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups; scores are vectors, which never decay."""
        return {**super().labels(site), "score": "vector"}


BeamLoRA.CASES = (
    BeamLoRA(rank=4, alpha=8, temperature=1.0, steps=2000, interval=1000),
    BeamLoRA(rank=3, alpha=5, temperature=0.5, steps=2000, interval=900, dropout=0.25),
)
