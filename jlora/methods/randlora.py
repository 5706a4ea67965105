"""RandLoRA: a sum of frozen random low-rank matrices that all leaves share, each scaled by trained vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.hyperparameters import check_hyperparameters, integer, one_of
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Arrays, Factors, Method, Site, Start, View
from jlora.core.protocol.peft import PeftKind, PeftSetting, PeftShared, PeftTensor
from jlora.methods.lora import shared_dtype, trained_dtype

BASES = ("dense", "sparse", "very_sparse")


@dataclass(frozen=True)
class RandLoRA(Method):
    """Full-rank adaptation by random bases: `w + s * sum over n of B[n] @ (lambda[:, n] * A * gamma[n])`.

    `s = alpha / rank`. For a matrix with `in > out` there are `ceil(out / rank)` products of `B[n]`, `[in, rank]`, and `A`,
    `[rank, out]`, so many that the sum has full rank; else it is the transpose of the same with `in` and `out` changed.
    `lambda [rank, bases]` and `gamma [bases, min(in, out)]` are trained. `lambda` starts at zero, so that the start is the
    base's output, and `gamma` has no gradient in the first step. Trains
    `(rank + min(in, out)) * -(-min(in, out) // rank)` values a matrix: as many as a LoRA of about half the rank
    `min(in, out) / rank`.

    In the sum each row of `A` meets the column of `B` that PEFT pairs it with: row `k` under base `n` has the number
    `k * bases + n` there, and column `k` of base `n` the number `n * rank + k`. So the bases of PEFT's sum are not those of
    the paper, but as random as they are.

    The bases are the first rows and columns of one frozen pair that all leaves of the method share, as large as the largest
    needs. It is drawn from `projection_key` alone, so that adapters of one model that were trained apart share it. It lies
    in `adapted.frozen["~shared"]["RandLoRA"]`, whole on every device of a mesh, and is saved with the adapters, since no
    generator is promised to stay the same forever.

    Worth trying where LoRA of every affordable rank falls short of full fine-tuning. With its full rank a step costs
    what it does for a LoRA of rank `min(in, out)`; for a 32-bit base weight and many tokens it is formed instead.

    Args:
        rank: rank of each base. A smaller one means more bases, and more trained values.
        alpha: numerator of `s`; PEFT advises 20 times the rank.
        bases: how the shared pair is drawn; each of the two is divided by its standard deviation.
            "dense": uniform.
            "sparse": -1, 0 and 1 with the probabilities 1/6, 2/3 and 1/6.
            "very_sparse": -1 and 1 with the probability `1 / (2 sqrt(d))` each, `d` the smaller side of the pair.
        projection_key: the number that the shared pair is drawn from.
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given.

    Raises:
        ValueError: for a hyperparameter out of range.

    Example:
        >>> jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.RandLoRA(rank=32)})

    Reference:
        Albert et al. 2025, arXiv:2502.00987; shapes, pairing and starting values as in PEFT.
    """

    rank: int = 32
    alpha: float = 640.0
    bases: str = "dense"
    projection_key: int = 0
    dropout: float = 0.0

    family: ClassVar[str] = "Shared random projections"

    # LoRA's rate: the scale makes up for the size that `gamma` starts at. No run here chose it.
    recipe: ClassVar[Recipe] = Recipe(
        rank=32, alpha=20.0, rank_means="rank of every random base: a smaller one trains more"
    )

    peft_kind: ClassVar[PeftKind] = PeftKind(
        "RANDLORA",
        tensors=(PeftTensor("randlora_lambda", "lambda"), PeftTensor("randlora_gamma", "gamma")),
        settings=(
            PeftSetting("r", "rank", 32),
            PeftSetting("randlora_alpha", "alpha", 640.0),
            PeftSetting("projection_prng_key", "projection_key", 0),
            PeftSetting("randlora_dropout", "dropout", 0.0),
        ),
        shared=(
            PeftShared("randlora_A", "a", larger=(2,), repeated=True),
            PeftShared("randlora_B", "b", larger=(0, 1), repeated=True),
        ),
        only={"save_projection": True},
        unused=("sparse", "very_sparse"),  # how the pair was drawn, which is stored
        own_biases="randlora_only",
        fan_in_fan_out=True,
    )

    def __post_init__(self) -> None:
        bounds = {"rank": integer(1), "bases": one_of(BASES), "projection_key": integer(0)}
        check_hyperparameters(self, bounds=bounds)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Which side `gamma` belongs to differs from matrix to matrix, so it lies whole on every device of a mesh."""
        return {"lambda": ("rank", ""), "gamma": ("", "")}

    @property
    def alike(self) -> frozenset[str]:
        """`gamma` starts at one value."""
        return frozenset({"gamma"})

    @property
    def uses_key(self) -> bool:
        return self.dropout > 0

    @property
    def shared_fields(self) -> tuple[str, ...]:
        """The pair `A` and `B`."""
        return ("a", "b")

    def number(self, side: int) -> int:
        """How many bases make a matrix with this smaller side of full rank."""
        return -(-side // self.rank)

    def shared(self, key: jax.Array, sites: tuple[Site, ...]) -> Arrays:
        """Draws `a [rank, 1, smaller]` and `b [larger, bases, rank]` for the largest input and output (PEFT's shapes)."""
        # As VeRA's: by a named generator and without `key`, which differs between adapters that must share the pair.
        keys = jax.random.split(jax.random.key(self.projection_key, impl="threefry2x32"))
        smaller, larger = sorted((max(site.in_size for site in sites), max(site.out_size for site in sites)))
        dtype = shared_dtype(sites)
        shapes = {"a": (self.rank, 1, smaller), "b": (larger, self.number(smaller), self.rank)}
        return {name: self._draw(key, shape, dtype, smaller) for key, (name, shape) in zip(keys, shapes.items())}

    def _draw(self, key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, smaller: int) -> jax.Array:
        """One of the pair, of standard deviation 1."""
        drawn = jax.random.uniform(key, shape, dtype, -1, 1)
        if self.bases != "dense":
            share = 1 / (3.0 if self.bases == "sparse" else math.sqrt(smaller))
            drawn = jnp.where(jnp.abs(drawn) > 1 - share, jnp.sign(drawn), 0)
        return drawn / jnp.std(drawn, ddof=1)

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """`lambda` zero, `gamma` one over the larger of its sides; nothing is drawn here."""
        dtype, side = trained_dtype(w), min(w.shape)
        shape = (self.number(side), side)
        return Start(
            {"lambda": jnp.zeros((self.rank, shape[0]), dtype), "gamma": jnp.full(shape, 1 / max(shape), dtype)}
        )

    def weight(self, view: View) -> jax.Array:
        """`w + s * a @ b` with the two sides of the sum."""
        a, b = self._sides(view)
        return view.w.astype(a.dtype) + self.alpha / self.rank * (a @ b)

    def factors(self, view: View) -> Factors:
        """The two sides of the sum, of which the trained one has the scale."""
        a, b = self._sides(view, self.alpha / self.rank)
        return Factors(a, b, dropout=self.dropout)

    def _sides(self, view: View, scale: float = 1.0) -> tuple[jax.Array, jax.Array]:
        """`[in, rank * bases]` and `[rank * bases, out]`, the trained one, which has the matrix's smaller side, scaled."""
        lam, gamma, (rows, columns) = view.params["lambda"], view.params["gamma"], view.w.shape
        (bases, smaller), larger = gamma.shape, max(rows, columns)
        a, b = (view.shared[name].astype(gamma.dtype) for name in ("a", "b"))
        trained = (scale * lam[:, :, None] * a[:, :, :smaller] * gamma).reshape(self.rank * bases, smaller)
        fixed = b[:larger, :bases].reshape(larger, bases * self.rank)
        return (trained.T, fixed.T) if rows <= columns else (fixed, trained)

    def labels(self, site: Site) -> dict[str, str]:
        """`lambda` starts at zero, as `b` does in LoRA."""
        return {"lambda": "b", "gamma": "a"}


RandLoRA.CASES = (
    RandLoRA(rank=3, alpha=6.0),
    RandLoRA(rank=4, alpha=4.0, bases="sparse", projection_key=3, dropout=0.25),
)
