"""Matrices that chains of small cores make: tensor trains, and columns that stay orthonormal whatever values they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp


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


def side(size: int, rank: int, split: bool) -> list[Core]:
    """The cores of a side of a matrix, from its far end to the singular values.

    Args:
        size: rows of the side.
        rank: columns that it ends with, and the most that a core passes on.
        split: whether the side is split into its prime factors; else it is one core.
    """
    if not split:
        return [Core(size, rank, True)]
    found, rows = [], 1
    for mode in prime_factors(size):
        if rows > rank:  # else the core would only turn what comes before it
            found.append(Core(rows, rank, False))
        rows = min(rows, rank) * mode
    return [*found, Core(rows, rank, True)]


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


def contracted(cores: Sequence[jax.Array]) -> jax.Array:
    """The matrix that cores `[bond, row digit, column digit, bond]` make; digits further left count more."""
    whole = cores[-1][..., 0]
    for core in reversed(cores[:-1]):  # so that stretches of a row stay together, the longer the larger the array
        joined = jnp.einsum("bijc,ckl->bikjl", core, whole, precision="highest")
        whole = joined.reshape(core.shape[0], core.shape[1] * whole.shape[1], core.shape[2] * whole.shape[2])
    return whole[0]
