"""AdaLoRA: a rank budget that falls while training, spent where it matters most."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora.allocate.adalora import AdaLoRARule
from jlora.allocate.budget import Phases
from jlora.method import Arrays, Factors, Method, Site, Start, View
from jlora.methods.lora import trained_dtype


@dataclass(frozen=True)
class AdaLoRA(Method):
    """Rank allocation by pruning: `w + s * (a * e) @ b`, with `a [in, rank]`, `e [rank]`, `b [rank, out]`, `s = alpha / rank`.

    Every matrix starts with `rank` ranks. The optimizer of `jlora.optimizer` scores them by smoothed sensitivity times
    uncertainty, over all matrices that share these hyperparameters, and sets `e` to zero at the worst, so that the number
    left follows `b_t = b_T + (b_0 - b_T) (1 - p)³`, `p` from 0 to 1 between `start_steps` and `steps - final_steps`. In the
    end exactly `target` ranks a matrix are left on average, more where they matter, none where they don't. The scale never
    changes. A penalty keeps `a` and `b` close to orthonormal; its gradient is added to yours. Trains `rank * (in + out + 1)`
    values a matrix.

    Costs two averages of every trained value, and for the penalty products of `rank² * (in + out)` a matrix in every step.

    Worth trying where the total size of the adapters is tight: the ranks go where they matter.

    Args:
        rank: ranks of every matrix at the start; half as much again as `target` in the paper.
        target: ranks a matrix at the end, on average.
        alpha: numerator of the scale.
        steps: optimizer steps of the whole run; the training job fills in its own.
        start_steps: steps before the first rank is taken away.
        final_steps: steps after the last one, with the ranks that are left.
        interval: steps from one choice of ranks to the next.
        beta1: memory of the smoothed sensitivity.
        beta2: memory of the smoothed uncertainty.
        orthogonality: weight of the penalty.
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given.

    Raises:
        ValueError: for a hyperparameter out of range, or phases that leave no step for allocation.

    Example:
        >>> jlora.AdaLoRA(rank=12, target=8, alpha=16, steps=1000, start_steps=100, final_steps=300, interval=10)

    Reference:
        Zhang et al. 2023, arXiv:2303.10512. Defaults, the order of the operations and the mean (not the sum) in the penalty
        are PEFT's.
    """

    rank: int = 12
    target: int = 8
    alpha: float = 8.0
    steps: int | None = None
    start_steps: int = 0
    final_steps: int = 0
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5
    dropout: float = 0.0

    local: ClassVar[frozenset[str]] = frozenset({"in", "out"})

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("rank", "target"))
        if self.target > self.rank:
            raise ValueError(f"AdaLoRA's target ({self.target}) is above the rank that it starts with ({self.rank})")

    @property
    def scale(self) -> float:
        """`s`; the references add 1e-5 to the rank."""
        return self.alpha / self.rank

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Roles of the factors' axes."""
        return AXES

    @property
    def uses_key(self) -> bool:
        """Dropout draws."""
        return self.dropout > 0

    @property
    def phases(self) -> Phases:
        """When ranks are allocated."""
        return Phases(self.steps, self.start_steps, self.final_steps, self.interval)

    @property
    def optimizer_rule(self) -> AdaLoRARule:
        """One budget for all sites that agree in everything but rank, alpha and dropout."""
        return AdaLoRARule(self.phases, self.beta1, self.beta2, self.orthogonality, self.target)

    def check(self, site: Site) -> None:
        """Refuses a rank above the matrix's sides."""
        check_rank("rank", self.rank, site)

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """`a` and `b` normal with deviation 0.02, `e` zero."""
        return Start(drawn(key, w, self.rank))

    def weight(self, view: View) -> jax.Array:
        """`w + s * (a * e) @ b`."""
        return weight(view, self.scale, view.params["e"])

    def factors(self, view: View) -> Factors:
        """Two factors, with `s * e` in the smaller one."""
        return factors(view, self.scale, view.params["e"], self.dropout)

    def gates(self, params: Arrays) -> jax.Array:
        """`e`."""
        return params["e"]

    def labels(self, site: Site) -> dict[str, str]:
        """As the reference has it, `e` learns and decays as `a` does."""
        return labels(site)


#: What the methods with three factors have in common.
AXES = {"a": ("in", "rank"), "e": ("rank",), "b": ("rank", "out")}


def drawn(key: jax.Array, w: jax.Array, rank: int) -> dict[str, jax.Array]:
    """The reference's start."""
    key_a, key_b = jax.random.split(key)
    dtype = trained_dtype(w)
    a = 0.02 * jax.random.normal(key_a, (w.shape[0], rank), dtype)
    return {"a": a, "e": jnp.zeros(rank, dtype), "b": 0.02 * jax.random.normal(key_b, (rank, w.shape[1]), dtype)}


def weight(view: View, scale: float, gates: jax.Array) -> jax.Array:
    """`w + scale * (a * gates) @ b`."""
    a, b = view.params["a"], view.params["b"]
    return view.w.astype(a.dtype) + scale * ((a * gates[None, :]) @ b)


def factors(view: View, scale: float, gates: jax.Array, dropout: float) -> Factors:
    """The two factors, with `scale * gates` in the smaller one."""
    a, e, b = view.params["a"], scale * gates, view.params["b"]
    if a.shape[0] <= b.shape[1]:
        return Factors(a * e[None, :], b, dropout=dropout)
    return Factors(a, e[:, None] * b, dropout=dropout)


def labels(site: Site) -> dict[str, str]:
    """Learning-rate groups: LoRA+'s, with `e` in that of `a`."""
    if site.kind == "gather":
        return dict.fromkeys("aeb", "embedding")
    return {"a": "a", "e": "a", "b": "b"}


def check_rank(name: str, rank: int, site: Site) -> None:
    """Refuses a rank above the matrix's sides.

    Raises:
        ValueError: naming both.
    """
    side = min(site.in_size, site.out_size)
    if rank > side:
        raise ValueError(
            f"{name} {rank} is above the smaller side of the {site.in_size} x {site.out_size} matrix; use {side} or less"
        )


#: What a number must be: a test, and the words for it.
POSITIVE = (lambda v: 0 < v < math.inf, "positive and finite")
NOT_NEGATIVE = (lambda v: 0 <= v < math.inf, "0 or more, and finite")
BELOW_ONE = (lambda v: 0 <= v < 1, "at least 0 and below 1")
_BOUNDS = {
    "alpha": POSITIVE,
    "beta1": BELOW_ONE,
    "beta2": BELOW_ONE,
    "orthogonality": NOT_NEGATIVE,
    "dropout": BELOW_ONE,
}


def check_hyperparameters(method: Any, counts: tuple[str, ...], bounds: dict[str, Any] | None = None) -> None:
    """Refuses values out of range: those that methods with a rule for the optimizer have in common, and the given.

    Args:
        method: with `phases`, unless it has no schedule.
        counts: fields that are positive whole numbers.
        bounds: for other fields that are numbers a test and the words for it.

    Raises:
        ValueError: naming the method and the hyperparameter.
    """
    name = type(method).__name__
    for field in counts:
        value = getattr(method, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}'s {field} must be a positive whole number, got {value!r}")
    for field, (holds, wanted) in {**_BOUNDS, **(bounds or {})}.items():
        value = getattr(method, field, 0.5)  # in all ranges
        if not isinstance(value, int | float) or isinstance(value, bool) or not holds(value):
            raise ValueError(f"{name}'s {field} must be {wanted}, got {value!r}")
    for field in fields(method):
        if isinstance(field.default, bool) and not isinstance(getattr(method, field.name), bool):
            raise ValueError(f"{name}'s {field.name} must be True or False, got {getattr(method, field.name)!r}")
    seed = getattr(method, "seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"{name}'s seed must be a whole number of at least 0, got {seed!r}")
    if hasattr(method, "phases"):
        method.phases.check(name)


AdaLoRA.CASES = (
    AdaLoRA(rank=4, target=2, steps=2000, start_steps=1000, orthogonality=0.01),
    AdaLoRA(rank=3, target=3, alpha=5, steps=500, interval=7, orthogonality=0.0, dropout=0.25),
)
