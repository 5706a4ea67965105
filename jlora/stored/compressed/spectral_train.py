"""SpectralTrain: a singular value decomposition whose sides are tensor trains of orthonormal cores."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jlora.core.products.trains import Core, reflected, side, train
from jlora.core.protocol.code import Arrays, Code
from jlora.core.protocol.hyperparameters import check_hyperparameters, integer, one_of
from jlora.stored.compressed import factoring


@dataclass(frozen=True)
class SpectralTrain(Code):
    """A spectral tensor train: `w ~ u @ diag(sigma) @ v.T` with orthonormal `u [in, rank]` and `v [out, rank]`.

    The sides are products of Householder reflections, of whose vectors `left` and `right` are the values, as in
    `jlora.SpectralTensorTrain`; so they stay orthonormal when these are trained (`jlora.Fields`), and `abs(sigma)` are the
    singular values of what is kept. With `cores="svd"` each side is one core, and this is the truncated singular value
    decomposition with `rank (in + out - rank)` numbers, as many as a matrix of this rank has degrees of freedom. With "tt" each
    is a tensor train over the prime factors of its size, whose cores pass on at most `rank` ranks: far fewer numbers, and a
    squared error of at most the sum over the cores of the squared singular values that were left out there. At full rank both
    are exact, with `in out` numbers. A side that is a prime is one core.

    The paper divides `sigma` by its largest, and trains from scratch.

    Args:
        rank: singular values that are kept, and the most that a core passes on; at most the smaller side of the matrix.
        cores: "svd" or "tt".

    Raises:
        ValueError: for a hyperparameter out of range, a rank above the matrix's sides, or a side of 1.

    Example:
        >>> base = jlora.quantize(params, {r".*/q_proj/kernel": jlora.SpectralTrain(rank=4)})

    Reference:
        Obukhov et al. 2021, arXiv:2103.04217.
    """

    rank: int = 8
    cores: str = "tt"

    def __post_init__(self) -> None:
        check_hyperparameters(self, bounds={"rank": integer(1), "cores": one_of(("svd", "tt"))})

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The values of a side's cores one after the other."""
        return {"left": ("",), "right": ("",), "sigma": ("",)}

    @property
    def trained(self) -> frozenset[str]:
        """All."""
        return frozenset(self.axes)

    @property
    def local(self) -> frozenset[str]:
        """Nowhere: a value of a reflection is part of all rows."""
        return frozenset()

    def check(self, rows: int, columns: int) -> None:
        """Refuses a rank above the matrix's sides, and a side of 1, which has nothing to turn."""
        factoring.check_rank(self, rows, columns)
        if min(rows, columns) == 1:
            raise ValueError(
                f"the {rows} x {columns} matrix has a side of 1, with nothing to turn; leave it out of the spec"
            )

    def encode(self, w: jax.Array) -> Arrays:
        """All cores but those beside the singular values from both ends, then these."""
        rows, columns = (self._side(size) for size in w.shape)
        left, middle = _from_the_end(w, rows)
        right, middle = _from_the_end(middle.T, columns)
        u, _, v = factoring.truncated(middle.T, self.rank)
        (first, u), (last, v) = turned(u, rows[-1]), turned(v.T, columns[-1])
        sigma = jnp.diagonal(factoring.product(u.T, middle.T, v))
        return {"left": jnp.concatenate([*left, first]), "right": jnp.concatenate([*right, last]), "sigma": sigma}

    def decode(self, fields: Arrays, rows: int, columns: int) -> jax.Array:
        """`u @ diag(sigma) @ v.T`."""
        return factoring.product(*self.factored(fields, rows, columns))

    def factored(self, fields: Arrays, rows: int, columns: int) -> tuple[jax.Array, ...]:
        """`u @ diag(sigma)` and `v.T`, which the reflections make."""
        u, v = train(fields["left"], self._side(rows)), train(fields["right"], self._side(columns))
        return u * fields["sigma"], v.T

    def _side(self, size: int) -> list[Core]:
        return side(size, self.rank, self.cores == "tt")


def _from_the_end(w: jax.Array, cores: list[Core]) -> tuple[list[jax.Array], jax.Array]:
    """The values of all cores of a side but the last, and what is left of a matrix whose rows are the side's."""
    found, x = [], w
    for core in cores[:-1]:
        x = x.reshape(core.rows, -1)
        values, q = turned(factoring.truncated(x, core.columns)[0], core)
        found.append(values)
        x = jnp.matmul(q.T, x, precision="highest")
    return found, x.reshape(cores[-1].rows, w.shape[1])


def turned(q: jax.Array, core: Core) -> tuple[jax.Array, jax.Array]:
    """The values of reflections that make orthonormal columns, and what they make.

    That is `q` with columns of other signs for a full core, and else another basis of their space: one whose top is an upper
    triangle, so that each reflection's vector is zero between its one and the square top's end.
    """
    columns = core.columns
    if not core.full:
        turn = jnp.linalg.qr(q[:columns][::-1].T)[0][:, ::-1]
        q = jnp.matmul(q, turn, precision="highest")
    vectors = jnp.linalg.qr(q, mode="raw")[0].T
    top = [vectors[jnp.tril_indices(columns, -1)]] if core.full else []
    values = jnp.concatenate([vectors[columns:].reshape(-1), *top])
    return values, reflected(values, core)


SpectralTrain.CASES = (SpectralTrain(2), SpectralTrain(3, "svd"))
