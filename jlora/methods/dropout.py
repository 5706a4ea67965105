"""Dropout around another method, for those that have none of their own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import jax

from jlora.core.products.dropped import Dropped
from jlora.core.products.formed import Formed
from jlora.core.products.low_rank import Factors
from jlora.core.products.update import Update
from jlora.core.protocol.hyperparameters import BELOW_ONE, check_hyperparameters
from jlora.core.protocol.method import Arrays, Method, Site, Start, View
from jlora.core.protocol.wrapping import Around
from jlora.methods.hira import HiRA


@dataclass(frozen=True)
class Dropout(Around):
    """Dropout of the update's input, around a method: `x @ w + (x' @ v - x' @ w)` with `v [in, out]` the inner method's weight.

    `x'` is `x` with each entry dropped with probability `rate`, and the others divided by `1 - rate`, where the call gives a
    key, `adapted.replace(context={"dropout": key})`; without one it is the inner method. The base sees the whole input.
    Trains `count(inner)` values. Costs one product with the base's matrix more in a step with dropout.

    Args:
        inner: the method inside: one that forms its weight or acts on its input. Methods with factors, such as LoRA, have a
            `dropout` of their own, which costs less.
        rate: probability of dropping an entry of the input.

    Raises:
        TypeError: for an inner method that has factors, or takes a leaf as a whole.
        ValueError: for a rate out of range.

    Example:
        >>> jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.Dropout(jlora.HiRA(rank=8), rate=0.1)})

    Reference:
        Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 15; on the update
        alone as in LoRA's reference code.
    """

    inner: Method = field(default_factory=HiRA)
    rate: float = 0.1

    family: ClassVar[str] = "Around another method"
    form = Dropped

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Method) or not self.inner.matrix or self.inner.uses_key:
            raise TypeError(
                f"Dropout goes around a method that adapts a matrix and has no dropout of its own; got {self.inner}"
            )
        if self.inner.form is Factors:
            raise TypeError(
                f"Dropout is for methods without factors; {self.inner} has some: give it its own dropout=..."
            )
        check_hyperparameters(self, bounds={"rate": BELOW_ONE}, of=Dropout)

    @property
    def uses_key(self) -> bool:
        return self.rate > 0

    def start(self, key: jax.Array, w: jax.Array, site: Site, **statistics: jax.Array) -> Start:
        """The inner method's."""
        return self.inner.start(key, w, site, **statistics)

    def weight(self, view: View) -> jax.Array:
        """The inner method's weight."""
        return self.inner.weight(self._inside_view(view))

    def merged_beside(self, view: View) -> Arrays:
        """What the inner method makes of the leaves beside."""
        return self.inner.merged_beside(self._inside_view(view))

    def update(self, view: View) -> Update:
        """The inner update, or what forms the inner weight, with dropout around it."""
        inside = self._inside_view(view)
        update = Formed(inside) if self.inner.form is None else self.inner.update(inside)
        assert update is not None
        return Dropped(update, self.rate)

    def _inside_view(self, view: View) -> View:
        return replace(view, site=replace(view.site, method=self.inner))


Dropout.CASES = (Dropout(HiRA(rank=2), rate=0.25),)
