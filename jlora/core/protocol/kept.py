"""A leaf of the base that nothing adapts and that a walk has to follow all the same."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jlora.core.products.low_rank import Factors
from jlora.core.protocol.code import Code
from jlora.core.protocol.method import Method, Site, Start, View


@dataclass(frozen=True, repr=False)
class Kept(Method):
    """The weight as it is: of leaves that are looked at (`jlora.watch`), or kept in the form of a code.

    Args:
        code: the code in whose form the leaf is to be kept, for its checks; None where it is what it is already.
        entry: the number of the spec's entry that says so, for codes that take leaves of one entry together.
    """

    code: Code | None = None
    entry: int = 0
    local = frozenset({"in", "out"})

    def __repr__(self) -> str:
        """The code, of which messages speak."""
        return "Kept()" if self.code is None else str(self.code)

    __str__ = __repr__

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """No fields."""
        return {}

    def check(self, site: Site) -> None:
        """Whether the code can hold the leaf.

        Raises:
            ValueError: for an embedding, of which single rows are read, no values, and a size that the code refuses.
        """
        if self.code is None:
            return
        if not math.prod(site.shape):
            raise ValueError(f"it holds no values, of which {self.code} could take the scale; leave it out")
        if site.kind == "gather":
            raise ValueError(
                f"the function looks up rows of it (an embedding), and {self.code} decodes whole matrices; leave it out"
            )
        self.code.check(site.in_size, site.out_size)

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """Nothing to train."""
        return Start({})

    def weight(self, view: View) -> jax.Array:
        """`w`."""
        return view.w

    def factors(self, view: View) -> Factors:
        """Factors of rank 0, by which it shares a product with factored methods beside it."""
        rows, columns = view.w.shape
        return Factors(jnp.zeros((rows, 0), view.w.dtype), jnp.zeros((0, columns), view.w.dtype))
