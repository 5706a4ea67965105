"""What codes of factors have in common: truncated singular values, products, and the dtype of what is kept."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jlora.core.protocol.code import Arrays
from jlora.core.protocol.hyperparameters import Bound, one_of

#: Of what is kept.
DTYPES = ("float32", "bfloat16", "float16")
DTYPE: Bound = one_of(DTYPES)


def truncated(w: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first singular triplets: `u [in, rank]`, `s [rank]`, `v [rank, out]`."""
    u, s, v = jnp.linalg.svd(w, full_matrices=False)
    return u[:, :rank], s[:rank], v[:rank]


def product(*factors: jax.Array) -> jax.Array:
    """The product of matrices in float32, from the right."""
    made = factors[-1].astype(jnp.float32)
    for factor in reversed(factors[:-1]):
        made = jnp.matmul(factor.astype(jnp.float32), made, precision="highest")
    return made


def kept(fields: Arrays, dtype: str) -> Arrays:
    """Fields as they are kept."""
    return {name: array.astype(dtype) for name, array in fields.items()}


def check_rank(code: Any, rows: int, columns: int) -> None:
    """Refuses a rank above the matrix's sides.

    Raises:
        ValueError: naming both.
    """
    if code.rank > min(rows, columns):
        raise ValueError(
            f"rank {code.rank} is above the smaller side of the {rows} x {columns} matrix; use {min(rows, columns)} or less"
        )
