"""LowRank: a product of two narrow matrices, or of more, along the first singular vectors."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jlora.core.protocol.code import Arrays, Code
from jlora.core.protocol.hyperparameters import check_hyperparameters, integer
from jlora.stored.compressed import factoring


@dataclass(frozen=True)
class LowRank(Code):
    """The first singular triplets `u S v` of a matrix, which no other matrix of this rank comes nearer to.

    Without inner factors `w ~ left @ right` with `left [in, rank] = u sqrt(S)`, `right [rank, out] = sqrt(S) v`. With some it
    is a deep linear network with a spectral start: `w ~ left @ inner[0] @ inner[1] .. @ right` with the singular vectors
    outside, `left = u`, `right = v`, and `inner [inner, rank, rank]` of diagonal matrices `S^(1 / inner)`.

    The error in Frobenius norm is that of the singular values that are left out, `sqrt(sum(S[rank:]^2))`. `(rank (in + out) +
    inner rank^2) / (in out)` numbers a weight: fewer than the matrix has below the rank `in out / (in + out)`.

    The paper trains such networks from scratch, its outer factors at a multiple of the others' learning rate:
    `jlora.Fields(multiples={"left": 2, "right": 2})`. Its inner factors start at a small multiple of the identity, and singular
    values are not used; here they are, so that the start is the weight.

    Args:
        rank: inner width; at most the smaller side of the matrix.
        inner: square factors between the two outer ones.
        dtype: of what is kept: "float32", "bfloat16" or "float16".

    Raises:
        ValueError: for a hyperparameter out of range, or a rank above the matrix's sides.

    Example:
        >>> base = jlora.quantize(params, {r".*/q_proj/kernel": jlora.LowRank(rank=4)})

    Reference:
        Eckart and Young 1936; Kwon et al. 2023, arXiv:2311.05061, for the inner factors.
    """

    rank: int = 8
    inner: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_hyperparameters(self, bounds={"rank": integer(1), "inner": integer(0), "dtype": factoring.DTYPE})

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Those of the outer factors run along the matrix."""
        inner = {"inner": ("", "", "")} if self.inner else {}
        return {"left": ("in", ""), **inner, "right": ("", "out")}

    @property
    def trained(self) -> frozenset[str]:
        """All."""
        return frozenset(self.axes)

    def check(self, rows: int, columns: int) -> None:
        """Refuses a rank above the matrix's sides."""
        factoring.check_rank(self, rows, columns)

    def encode(self, w: jax.Array) -> Arrays:
        """Singular vectors outside, singular values inside or on both sides."""
        u, s, v = factoring.truncated(w, self.rank)
        if not self.inner:
            return factoring.kept({"left": u * jnp.sqrt(s), "right": jnp.sqrt(s)[:, None] * v}, self.dtype)
        inner = jnp.broadcast_to(jnp.diag(s ** (1 / self.inner)), (self.inner, self.rank, self.rank))
        return factoring.kept({"left": u, "inner": inner, "right": v}, self.dtype)

    def decode(self, fields: Arrays, rows: int, columns: int) -> jax.Array:
        """The product."""
        return factoring.product(*self.factored(fields, rows, columns))

    def factored(self, fields: Arrays, rows: int, columns: int) -> tuple[jax.Array, ...]:
        """All factors."""
        return fields["left"], *fields.get("inner", ()), fields["right"]


LowRank.CASES = (LowRank(3), LowRank(3, inner=2), LowRank(3, dtype="bfloat16"))
