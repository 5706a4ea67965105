"""Spectral tensor train: a singular value decomposition that is trained as such, its sides as tensor trains or whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.products.trains import Core, side, train
from jlora.core.protocol.hyperparameters import NOT_ZERO, check_hyperparameters, check_rank, one_of
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Factors, Method, Site, Start, View
from jlora.methods.lora import trained_dtype

CORES = ("svd", "tt")


@dataclass(frozen=True)
class SpectralTensorTrain(Method):
    """Spectral tensor train parametrization, as an adapter: `w + scale * u @ diag(sigma) @ v.T`.

    `u [in, rank]` and `v [out, rank]` have orthonormal columns for whatever values are trained: they are products of
    Householder reflections, whose vectors are. So `scale * abs(sigma)` are the singular values of the update. Two forms:

    `cores="svd"`: `u` and `v` are one core each, with as many values as a matrix of that rank has degrees of freedom,
    `rank * (in + out - rank)`: as LoRA, less what LoRA has twice.

    `cores="tt"`: each of `u` and `v` is a tensor train. Its side is split into its prime factors, and row `(i1, i2, ..)` of
    `u` is the product of the slices `i1`, `i2`, .. of small cores, which pass on at most `rank` ranks; modes are joined
    where a core would pass on all it gets. The number of values then grows with the logarithm of the sides; a prime side is
    one core, as in "svd".

    Trains `rank * (in + out - rank) if cores == "svd" else number(in, out)` values a matrix; `number` adds up, over the
    cores, `(rows - columns) * columns`, and `rank`, and `rank * (rank - 1)` for the two cores beside the singular values.
    For 768 x 768 and rank 8 these are 12,224 for "svd" and 960 for "tt"; at full rank both are 768 * 768.

    `sigma` starts at zero, so the start is the base's output, and the cores have no gradient in the first step. The paper
    instead trains the layer itself in this form, divides `sigma` by its largest, and starts at one. The other values start
    where the columns of a core are uniformly random ("tt": nearly so), and not near the identity as in the paper, since the
    first update would lie in the first `rank` inputs and outputs.

    Worth trying where LoRA is wanted without its redundancy, with singular values that can be read and bounded, or with
    very few values ("tt"). It merges, and ships as plain LoRA. The reflections cost `(in + out) * rank**2` operations a
    step and matrix.

    Args:
        rank: columns of `u` and `v`; at most the smaller side of the matrix.
        scale: factor of the update.
        cores: "svd" or "tt".

    No weight decay: it would turn the reflections, and shrink nothing.

    Raises:
        ValueError: for a hyperparameter out of range, or a rank above the matrix's sides.

    Reference:
        Obukhov et al. 2021, arXiv:2103.04217.
    """

    rank: int = 8
    scale: float = 1.0
    cores: str = "svd"

    family: ClassVar[str] = "Structured updates"

    # One step moves the update's norm by the rate itself, and LoRA's by some 0.6 * sqrt(out) of it. No run here chose it.
    recipe: ClassVar[Recipe] = Recipe(rank=8, learning_rate=5e-3)

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("rank",), {"scale": NOT_ZERO, "cores": one_of(CORES)})

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The values of a side's cores one after the other, the same number of which makes more or fewer rows."""
        return {"left": ("",), "right": ("",), "sigma": ("rank",)}

    def check(self, site: Site) -> None:
        """Refuses a rank above the matrix's sides, and a side of one."""
        check_rank(self, site)
        if min(site.in_size, site.out_size) == 1:
            raise ValueError("a side of 1 has no orthonormal columns to turn; leave the leaf out, or use jlora.Full()")

    def side(self, size: int) -> list[Core]:
        """The cores of a side, from its far end to the singular values."""
        return side(size, self.rank, self.cores == "tt")

    def number(self, rows: int, columns: int) -> int:
        """Trained values of a matrix `[rows, columns]`."""
        return self.rank + sum(core.size for size in (rows, columns) for core in self.side(size))

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """Singular values of zero between random cores."""
        dtype, keys = trained_dtype(w), jax.random.split(key)
        left, right = (_values(key, self.side(size), dtype) for key, size in zip(keys, w.shape))
        return Start({"left": left, "right": right, "sigma": jnp.zeros(self.rank, dtype)})

    def sides(self, view: View) -> tuple[jax.Array, jax.Array]:
        """`u [in, rank]` and `v [out, rank]`."""
        rows, columns = view.w.shape
        return train(view.params["left"], self.side(rows)), train(view.params["right"], self.side(columns), last=False)

    def weight(self, view: View) -> jax.Array:
        """`w + scale * u @ diag(sigma) @ v.T`."""
        u, v = self.sides(view)
        return view.w.astype(u.dtype) + (u * (self.scale * view.params["sigma"])) @ v.T

    def factors(self, view: View) -> Factors:
        """`u` and `diag(scale * sigma) @ v.T`."""
        u, v = self.sides(view)
        return Factors(u, (self.scale * view.params["sigma"])[:, None] * v.T)


def _values(key: jax.Array, cores: list[Core], dtype: jnp.dtype) -> jax.Array:
    """Those of reflections that turn the columns of a Gaussian matrix onto the axes, one after the other."""
    found = []
    for core, own in zip(cores, jax.random.split(key, len(cores))):
        drawn = jnp.tril(jax.random.normal(own, (core.rows, core.columns), dtype))
        diagonal, length = jnp.diagonal(drawn), jnp.linalg.norm(drawn, axis=0)
        # The larger of two ways to reflect: then no vector is longer than the square root of two.
        drawn = drawn / (diagonal + jnp.where(diagonal < 0, -length, length))
        found.append(drawn[core.columns :].reshape(-1))
        if core.full:
            found.append(drawn[jnp.tril_indices(core.columns, -1)])
    return jnp.concatenate(found)


SpectralTensorTrain.CASES = (SpectralTensorTrain(rank=3), SpectralTensorTrain(rank=3, scale=2.0, cores="tt"))
