"""JointLowRank: matrices of one input as products with one left factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import jax
import jax.numpy as jnp

from jlora.core.protocol.code import Arrays, Code
from jlora.core.protocol.hyperparameters import check_hyperparameters, integer, one_of
from jlora.stored.compressed import factoring


@dataclass(frozen=True)
class JointLowRank(Code):
    """Matrices with the same inputs, side by side, by the first singular triplets of all together.

    Of a group, `[w_1 | w_2 | ..] = u S v`; then `w_j ~ left @ right_j` with `left [in, rank] = u sqrt(S)`, which the group
    has in common, and `right_j [rank, out_j]`, its part of `sqrt(S) v`. No other common left factor of this rank gives a
    smaller sum of squared errors, which is `sum(S[rank:]^2)`. A group has `rank (in + sum out_j)` numbers: for two square
    matrices of side d fewer than they have below the rank `2 d / 3`, where two `LowRank` ones end at `d / 2`.

    It takes no data. The paper joins queries with keys, and gates with the matrices beside them. Its other use is to take
    noise out of a model: a rank near the full one, decoded again, as in `jlora.dequantize(jlora.quantize(params, spec))`.

    Args:
        rank: columns of the left factor; at most the inputs, and at most the outputs of a group together.
        over: "leaves": a group is what one entry of the spec matches in a layer, such as `.*/(q|k)_proj/kernel`; or "layers":
            all layers of one such leaf.
        dtype: of what is kept: "float32", "bfloat16" or "float16".

    Raises:
        ValueError: for a hyperparameter out of range, matrices of different inputs in a group, or a rank above its sides.

    Example:
        >>> base = jlora.quantize(params, {r".*/(q|v)_proj/kernel": jlora.JointLowRank(rank=4)})

    Reference:
        Peng et al. 2024, arXiv:2402.16319. It has no code; the left factor is the natural reading.
    """

    rank: int = 8
    over: str = "leaves"  # pyright: ignore[reportIncompatibleMethodOverride]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        bounds = {"rank": integer(1), "over": one_of(("leaves", "layers")), "dtype": factoring.DTYPE}
        check_hyperparameters(self, bounds=bounds)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Those of the factors run along the matrix."""
        return {"left": ("in", ""), "right": ("", "out")}

    @property
    def trained(self) -> frozenset[str]:
        """All."""
        return frozenset(self.axes)

    @property
    def common(self) -> frozenset[str]:
        """The left factor."""
        return frozenset({"left"})

    def check_group(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Refuses matrices of different inputs, and a rank above the sides of all together."""
        if len(found := sorted({rows for rows, _ in sizes})) > 1:
            raise ValueError(f"a group of matrices with one left factor must have one number of inputs, got {found}")
        factoring.check_rank(self, sizes[0][0], sum(columns for _, columns in sizes))

    def encode_together(self, matrices: Sequence[jax.Array]) -> list[Arrays]:
        """The triplets of all, `right` cut into the parts of each."""
        u, s, v = factoring.truncated(jnp.concatenate(matrices, axis=1), self.rank)
        ends = list(accumulate(w.shape[1] for w in matrices))[:-1]
        parts = jnp.split(jnp.sqrt(s)[:, None] * v, ends, axis=1)
        return [factoring.kept({"left": u * jnp.sqrt(s), "right": part}, self.dtype) for part in parts]

    def decode(self, fields: Arrays, rows: int, columns: int) -> jax.Array:
        """`left @ right`."""
        return factoring.product(*self.factored(fields, rows, columns))

    def factored(self, fields: Arrays, rows: int, columns: int) -> tuple[jax.Array, ...]:
        """Both."""
        return fields["left"], fields["right"]


JointLowRank.CASES = (JointLowRank(3), JointLowRank(3, "layers"))
