"""Skeleton: copy this file to start a method. The contract runs it, so it can't rot; it is no public method.

1. Copy it to `jlora/methods/<name>.py`, rename the class, and add `from jlora.methods.<name> import <Name> as <Name>` to
   `jlora/methods/__init__.py`. Nothing else has to change.
2. State the formula and the number of trained values in the docstring; the contract evaluates that number.
3. Delete what the method does not need: only `family`, `axes`, `start`, `weight` and `CASES` are required.
4. Run `pytest tests/contract -k <Name> -m ""`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jlora.core.protocol.hyperparameters import NOT_ZERO, check_hyperparameters, check_rank
from jlora.core.protocol.method import Factors, Method, Site, Start, View
from jlora.methods.lora import kaiming, trained_dtype


@dataclass(frozen=True)
class Skeleton(Method):
    """One line that says what it is: `w + strength * a @ b` with `a [in, rank]` frozen and `b [rank, out]` trained.

    Trains `rank * out` values a matrix. Then when to choose it, and what it costs.

    Args:
        rank: rows of `b`; at most the smaller side of the matrix.
        strength: factor of `a @ b`.

    Raises:
        ValueError: for a rank that is no positive whole number, or a strength of 0.

    Reference:
        Author et al. 2000, arXiv:0000.00000.
    """

    rank: int = 4
    strength: float = 1.0

    # Where the pages list the method: one of jlora.disk.catalog.FAMILIES.
    family: ClassVar[str] = "LoRA and its variants"
    # Roles along which a slice of the weight needs only the same slice of the fields (not so where a norm runs over it).
    local: ClassVar[frozenset[str]] = frozenset({"in", "out"})

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("rank",), {"strength": NOT_ZERO})

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The role of each axis of each field, trained and frozen: from it follows the sharding."""
        return {"a": ("in", "rank"), "b": ("rank", "out")}

    def check(self, site: Site) -> None:
        """Refuses a matrix that is too small; the core adds the path and the shape."""
        check_rank(self, site)

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """The arrays to begin with: trained ones in `params`, constants in `frozen`."""
        dtype = trained_dtype(w)
        a, b = kaiming(key, (w.shape[0], self.rank), dtype), jnp.zeros((self.rank, w.shape[1]), dtype)
        return Start(params={"b": b}, frozen={"a": a})

    def weight(self, view: View) -> jax.Array:
        """`w + strength * a @ b`, which defines the method. The cast keeps a 16-bit base from rounding the update."""
        a, b = view.frozen["a"], view.params["b"]
        return view.w.astype(b.dtype) + self.strength * (a @ b)

    def factors(self, view: View) -> Factors:
        """The same for products that do not form the weight, for low-rank methods only; the contract compares both."""
        return Factors(view.frozen["a"], self.strength * view.params["b"])

    def labels(self, site: Site) -> dict[str, str]:
        """The learning-rate group of each trained field, one of `GROUPS` in `jlora/optimize/optimizer.py`."""
        return {"b": "b"}


Skeleton.CASES = (Skeleton(), Skeleton(rank=2, strength=0.5))
