"""TransposedPair: two matrices, of which one is kept as the transpose of the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jlora.core.protocol.code import Arrays, Code
from jlora.core.protocol.hyperparameters import check_hyperparameters
from jlora.stored.compressed import factoring


@dataclass(frozen=True)
class TransposedPair(Code):
    """One matrix for the two of a pair `w1 [d, h]`, `w2 [h, d]`, such as those of a feed-forward network.

    `w1 ~ w`, `w2 ~ w.T` with the mean `w [d, h] = (w1 + w2.T) / 2`, which has the least sum of squared errors, `|w1 -
    w2.T|^2 / 2`: half the numbers. A pair is the two matrices that one entry of a spec matches in a layer; `w1` is the
    first of them in the tree.

    The paper trains networks in this form from scratch. Two pretrained matrices that were not trained so have little in
    common with each other's transposes: their mean is far from both, and this is a start for training, or the form of a model
    that was trained so. (`jlora.TiedPair` ties updates, and leaves the weights.)

    Args:
        dtype: of what is kept: "float32", "bfloat16" or "float16".

    Raises:
        ValueError: for another dtype, or a layer in which the entry matches no such pair.

    Example:
        >>> base = jlora.quantize(params, {r".*/(q|v)_proj/kernel": jlora.TransposedPair()})

    Reference:
        arXiv:2401.16438 (2024).
    """

    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_hyperparameters(self, bounds={"dtype": factoring.DTYPE})

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """None: what runs along the inputs of one runs along the outputs of the other."""
        return {"matrix": ("", ""), "turned": ()}

    @property
    def trained(self) -> frozenset[str]:
        """The matrix."""
        return frozenset({"matrix"})

    @property
    def local(self) -> frozenset[str]:
        """Nowhere."""
        return frozenset()

    @property
    def over(self) -> str:
        """The leaves of a layer."""
        return "leaves"

    @property
    def common(self) -> frozenset[str]:
        """The matrix."""
        return frozenset({"matrix"})

    def check_group(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Refuses all but two matrices, of which one has the shape of the other's transpose."""
        if len(sizes) != 2 or sizes[0] != sizes[1][::-1]:
            got = ", ".join(f"[{rows}, {columns}]" for rows, columns in sizes)
            raise ValueError(f"a pair is two matrices [d, h] and [h, d] in one layer, got {got}")

    def encode_together(self, matrices: Sequence[jax.Array]) -> list[Arrays]:
        """The mean, and which of the two is turned."""
        first, second = matrices
        mean = ((first + second.T) / 2).astype(self.dtype)
        return [{"matrix": mean, "turned": jnp.bool_(turned)} for turned in (False, True)]

    def decode(self, fields: Arrays, rows: int, columns: int) -> jax.Array:
        """The matrix or its transpose."""
        w = fields["matrix"].astype(jnp.float32)
        if rows != columns:
            return w if w.shape == (rows, columns) else w.T
        return jnp.where(fields["turned"], w.T, w)


TransposedPair.CASES = (TransposedPair(),)
