"""A method whose update is multiplied by a number that is an array, so that runs of one program can differ in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax

from jlora.core.products.low_rank import Factors
from jlora.core.protocol.method import Start, View
from jlora.core.protocol.wrapping import Around

#: The constant that holds the number.
GAIN = "gain"


@dataclass(frozen=True)
class Scaled(Around):
    """`w + gain * a @ b` around a method that gives factors, with `gain` a constant of each matrix.

    `jlora.stack` puts it around methods that differ in their scale; nobody saves it.
    """

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        return {**self.inner.axes, GAIN: ()}

    def start(self, key: jax.Array, w: jax.Array, site: Any, **statistics: jax.Array) -> Start:
        """Refuses: it is put around arrays that are there."""
        raise NotImplementedError("jlora.stack makes it of adapters that are there")

    def weight(self, view: View) -> jax.Array:
        """That of the factors."""
        return self.factors(view).weight(view.w)

    def factors(self, view: View) -> Factors:
        """The inner factors, `b` times the gain."""
        inner = self.inner.factors(replace(view, site=replace(view.site, method=self.inner)))
        assert inner is not None
        return replace(inner, b=view.frozen[GAIN] * inner.b)
