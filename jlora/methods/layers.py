"""Layers: another method in some layers only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.products.acting import Acting
from jlora.core.products.added import Added
from jlora.core.products.low_rank import Factors
from jlora.core.products.sparse import Sparse
from jlora.core.products.update import Update
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.layers import numbered, stated_layers
from jlora.core.protocol.method import Arrays, Method, Site, Start, View
from jlora.core.protocol.statistics import RESIDUAL
from jlora.core.protocol.wrapping import Around, parts
from jlora.methods.dora import DoRA
from jlora.methods.hira import HiRA
from jlora.methods.lora import LoRA

#: Forms that are switched off without another product, or, for what acts, by one with the base's matrix.
_FORMS = (None, Factors, Sparse, Acting, Added)


@dataclass(frozen=True)
class Layers(Around):
    """Another method in some layers only: its weight `v [in, out]` there, and `w` in all others.

    In the others the output, the merged weight and the gradients are the base's, and the gradient of the method's own arrays is
    zero: they stay where they start, or shrink by weight decay, and neither is seen. Trains `count(inner)` values a matrix, and
    `jlora.summary` counts those of all layers, since the arrays of a stack have one shape. Costs one product with the base's
    matrix more where the inner method acts on its input.

    A layer is an index along the first axis of stacked leaves (scanned layers), or the first number at the end of a key of the
    path of a leaf that is not stacked, such as 10 in `layers_10/q_proj/kernel`; so one spec means the same for both. Where the
    layers are leaves of their own, a pattern that names some does as well, and the others then have no arrays at all. This is
    PEFT's `layers_to_transform`: `save_peft` writes the adapters of the layers in use, and no others.

    Args:
        inner: the method inside, which may be around another one, as in `Layers(DoRA(LoRA(8)), (0, 3))`.
        layers: numbers of the layers in use, from 0, each once.

    Raises:
        TypeError: for an inner method that takes a leaf as a whole, makes something for all its leaves together (ranks, pairs,
            drawn layers), follows a rule or schedule, keeps finished links, starts from a residual, or has a form of update
            that can't be switched off, such as `Dropout`'s.
        ValueError: for numbers that are none or repeat; and (by `adapterize`) for a leaf without a layer, a layer that no leaf
            is in, stacks that may be of layers or of experts, and `Layers` inside another method.

    Example:
        >>> spec = {r".*/(q|v)_proj/kernel": jlora.Layers(jlora.LoRA(rank=8), (0,))}

    Reference:
        The setting `layers_to_transform` of PEFT.
    """

    inner: Method
    layers: tuple[int, ...]

    family: ClassVar[str] = "Around another method"
    recipe: ClassVar[Recipe] = Recipe(asks=("layers",))

    def __post_init__(self) -> None:
        whole = isinstance(self.layers, tuple) and all(type(n) is int and n >= 0 for n in self.layers)
        if not whole or not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"Layers' layers must be different whole numbers from 0 on, got {self.layers!r}")
        if (reason := _unfit(self.inner)) is not None:
            raise TypeError(f"Layers can't go around {self.inner}: {reason}")

    @classmethod
    def job(cls, rank: int | None, steps: int | None, **options: Any) -> Method:
        """Around LoRA, in the first layer until `layers` is given, which the job asks for."""
        return cls(LoRA.job(rank, steps, **options), (0,))

    @property
    def form(self) -> type[Update] | None:  # type: ignore[override]
        """The inner method's."""
        return self.inner.form

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The inner method's, and whether a matrix is in a layer in use."""
        return {**self.inner.axes, "active": ()}

    def check(self, site: Site) -> None:
        """Refuses a leaf that is in no layer, and a method around this one, which would act in all layers."""
        if site.method != self:
            raise ValueError(
                f"Layers goes around all other methods, as in Layers(DoRA(LoRA(8)), (0, 3)); got {site.method}"
            )
        if not site.batch_axes and numbered(site.keys) is None:
            raise ValueError(
                "it is in no layer: it is not stacked, and no key of its path ends in a number; leave it out of the spec, or "
                "adapt it without Layers"
            )
        self.inner.check(replace(site, method=self.inner))

    def start(self, key: jax.Array, w: jax.Array, site: Site, **statistics: jax.Array) -> Start:
        """The inner method's; `together` says which matrices are in use."""
        return self.inner.start(key, w, replace(site, method=self.inner), **statistics)

    def together(self, key: jax.Array, starts: list[Start], sites: tuple[Site, ...]) -> list[Start]:
        """Finds the matrices of the layers in use.

        Raises:
            ValueError: for a layer that no leaf is in.
        """
        numbers = stated_layers(sites)
        there = sorted({int(number) for each in numbers for number in each.flat})
        if missing := sorted(set(self.layers) - set(there)):
            raise ValueError(
                f"{sites[0].path}: {self} names layer {missing[0]}, in which no leaf is that it adapts; they are in "
                f"{', '.join(map(str, there))}"
            )
        used = [jnp.asarray(np.isin(number, self.layers)) for number in numbers]
        return [
            replace(start, frozen={**start.frozen, "active": each}) for start, each in zip(starts, used, strict=True)
        ]

    def weight(self, view: View) -> jax.Array:
        """The inner method's weight, or `w`."""
        v = self.inner.weight(self._inside_view(view))
        return jnp.where(view.frozen["active"], v, view.w.astype(v.dtype))

    def apply(self, x: jax.Array, product: Callable[[jax.Array], jax.Array], view: View) -> jax.Array:
        """What the inner method makes of the input, or the base's product."""
        y = self.inner.apply(x, product, self._inside_view(view))
        return jnp.where(view.frozen["active"], y, product(x).astype(y.dtype))

    def merged_beside(self, view: View) -> Arrays:
        """What the inner method makes of the leaves beside, or these as they are."""
        changed = self.inner.merged_beside(self._inside_view(view))
        on = view.frozen["active"]
        return {name: jnp.where(on, leaf, view.beside[name].astype(leaf.dtype)) for name, leaf in changed.items()}

    def update(self, view: View) -> Update | None:
        """The inner update, with zeros for what it adds and 1 for its scale where it is not in use."""
        if self.form is None or issubclass(self.form, Acting):
            return None if self.form is None else self.form(view)
        found, on = self.inner.update(self._inside_view(view)), view.frozen["active"]
        assert isinstance(found, Factors | Sparse)
        scale = None if found.scale is None else jnp.where(on, found.scale, 1)
        if isinstance(found, Factors):
            return replace(found, b=jnp.where(on, found.b, 0), scale=scale)
        return replace(found, values=jnp.where(on, found.values, 0), scale=scale)

    def active(self, frozen: Arrays) -> jax.Array:
        return frozen["active"]

    def _inside_view(self, view: View) -> View:
        frozen = {name: array for name, array in view.frozen.items() if name != "active"}
        return replace(view, frozen=frozen, site=replace(view.site, method=self.inner))


def _unfit(inner: Any) -> str | None:
    """Why a method can't be confined to some layers; None where it can."""
    if not isinstance(inner, Method) or not inner.matrix:
        return "it adapts no matrix, so that nothing tells its layers"
    inside = parts(inner)
    if any(isinstance(each, Layers) for each in inside):
        return "it is confined to some layers already"
    if inner.kept_fields or inner.optimizer_rule is not None or inner.event is not None:
        return "it follows a rule or schedule, or keeps links, of all its leaves"
    if any(type(each).together not in (Method.together, Around.together) for each in inside):
        return "it makes something for all its leaves together, those of the other layers too"
    if RESIDUAL in inner.needs:
        return "what the base lost would be mended in some layers only, and jlora.loftq counts on all"
    if inner.form not in _FORMS:
        form = getattr(inner.form, "__name__", inner.form)
        return f"its update has the form {form}, which can't be switched off exactly"
    return None


Layers.CASES = (Layers(LoRA(rank=2, alpha=4), (0,)), Layers(DoRA(LoRA(rank=2)), (0,)), Layers(HiRA(rank=2), (0,)))
