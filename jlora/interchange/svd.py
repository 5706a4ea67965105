"""The best low-rank factors of a matrix."""

from __future__ import annotations

import numpy as np


def truncate(delta: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`a [*batch, in, rank]` and `b [*batch, rank, out]` with the smallest `|delta - a @ b|` (Eckart and Young).

    Args:
        delta: `[*batch, in, out]`.
        rank: at most the smaller side.

    Returns:
        The factors, each with half of the singular values, and the residual `|delta - a @ b| / |delta|` of each matrix (0
        where delta is 0), all in delta's dtype.
    """
    a = np.zeros((*delta.shape[:-1], rank), delta.dtype)
    b = np.zeros((*delta.shape[:-2], rank, delta.shape[-1]), delta.dtype)
    residual = np.zeros(delta.shape[:-2], np.float64)
    for index in np.ndindex(*delta.shape[:-2]):
        u, s, v = np.linalg.svd(delta[index].astype(np.float64), full_matrices=False)
        root = np.sqrt(s[:rank])
        a[index], b[index] = u[:, :rank] * root, root[:, None] * v[:rank]
        total = np.sqrt(np.sum(s**2))
        residual[index] = np.sqrt(np.sum(s[rank:] ** 2)) / total if total else 0.0
    return a, b, residual
