"""Spectral tensor train: a singular value decomposition that is trained as such, its sides as tensor trains or whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.hyperparameters import NOT_ZERO, check_hyperparameters, check_rank, one_of
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.method import Factors, Method, Site, Start, View
from jlora.methods.lora import trained_dtype

CORES = ("svd", "tt")


@dataclass(frozen=True)
class Core:
    """One core of a side: a matrix `[rows, columns]` with orthonormal columns.

    Attributes:
        rows: the columns of the core before, times the size of its mode.
        columns: the ranks that it passes on.
        full: whether its columns are free, or only the space that they span; the core beside the singular values is full.
    """

    rows: int
    columns: int
    full: bool

    @property
    def below(self) -> int:
        """Values under the square top of the reflections."""
        return (self.rows - self.columns) * self.columns

    @property
    def size(self) -> int:
        """Trained values: the dimension of the manifold that the core moves on."""
        return self.below + (self.columns * (self.columns - 1) // 2 if self.full else 0)


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
        if self.cores == "svd":
            return [Core(size, self.rank, True)]
        found, rows = [], 1
        for mode in prime_factors(size):
            if rows > self.rank:  # else the core would only turn what comes before it
                found.append(Core(rows, self.rank, False))
            rows = min(rows, self.rank) * mode
        return [*found, Core(rows, self.rank, True)]

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


def prime_factors(number: int) -> list[int]:
    """In rising order, each as often as it divides."""
    found, factor = [], 2
    while factor * factor <= number:
        while number % factor == 0:
            found, number = [*found, factor], number // factor
        factor += 1
    return [*found, number] if number > 1 else found


def reflected(values: jax.Array, core: Core) -> jax.Array:
    """The first columns of a product of Householder reflections: `[rows, columns]`, orthonormal.

    Reflection `k` has the vector `(0, .., 0, 1, t)` with the one at place `k`, and `values` are the `t`. With the vectors
    as the columns of `y`, the product is `1 - y @ inv(s) @ y.T`, `s` the upper triangle of `y.T @ y` with half its diagonal
    (the compact WY form), so that it is three products and a triangular solution, which all have derivatives.
    """
    rows, columns = core.rows, core.columns
    eye = jnp.eye(rows, columns, dtype=values.dtype)
    below = values[: core.below].reshape(rows - columns, columns)
    top = eye[:columns]
    if core.full:
        top = top.at[jnp.tril_indices(columns, -1)].set(values[core.below :])
    y = jnp.concatenate([top, below])
    upper = jnp.triu(jnp.ones_like(top)) - jnp.eye(columns, dtype=y.dtype) / 2
    s = upper * jnp.matmul(y.T, y, precision="highest")
    solved = jax.lax.linalg.triangular_solve(s, top.T, left_side=True)
    return eye - jnp.matmul(y, solved, precision="highest")


def train(values: jax.Array, cores: list[Core], last: bool = True) -> jax.Array:
    """The side `[size, rank]` that some cores make, its columns orthonormal.

    Args:
        values: of all the cores, one after the other.
        cores: from the far end to the singular values.
        last: whether the modes of the row's index come in the order of the cores, the far end first; else last.
    """
    made, at = jnp.ones((1, 1), values.dtype), 0
    for core in cores:
        slices = reflected(values[at : at + core.size], core).reshape(made.shape[1], -1, core.columns)
        at += core.size
        order = "ar,rmc->amc" if last else "ar,rmc->mac"
        made = jnp.einsum(order, made, slices, precision="highest").reshape(-1, core.columns)
    return made


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
