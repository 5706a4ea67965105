"""Fields: a leaf that is kept in the form of a code is trained in that form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora.core.products.chain import Chain
from jlora.core.products.refactored import Refactored
from jlora.core.protocol.hyperparameters import POSITIVE
from jlora.core.protocol.method import Arrays, Method, Site, Start, View, default_label
from jlora.core.protocol.stored import Stored


@dataclass(frozen=True)
class Fields(Method):
    """Trains the fields of a leaf that is kept as a product of small arrays, such as `jlora.LowRank`: `w = decode(fields)`.

    Starts as the fields are, in float32 at least, and so at the base's output. Trains what the code names as trained, of its
    fields or of those that `learn` names. An array that a group of leaves has in common is trained as one, its gradient the sum
    over them. `jlora.requantize(adapted)` gives the trained fields back in their form.

    Where the code makes the weight of matrices, as `jlora.LowRank` does, a product in 32 bits goes through them if that takes
    fewer multiply-adds. Else it forms the weight in every pass, with its dense gradient.

    Args:
        learn: names of the fields to train; all that can be, by default.
        multiples: for some of them the multiple of the learning rate at which they learn, as in `{"left": 2.0, "right": 2.0}`
            (the two learning rates of compressed deep linear networks).
        roles: found by `adapterize`: the fields with the roles of their axes.
        common: found likewise: those that a group of leaves trains together.
        layered: found likewise: whether leaves share these matrix by matrix of their stacks.
        group: found likewise: the group's name.

    Raises:
        ValueError: for a multiple that is not positive; for a leaf that is not kept in the form of a code, or of one whose
            fields are not trained; for names that are no such fields; for a group of which other leaves are adapted otherwise.

    Example:
        >>> base = jlora.quantize(params, {r".*/q_proj/kernel": jlora.LowRank(rank=4, inner=1)})
        >>> spec = {r".*/q_proj/kernel": jlora.Fields(multiples={"left": 2.0, "right": 2.0})}
        >>> adapted = jlora.adapterize(base, spec)

    Reference:
        Ordinary training of a compressed model; two learning rates as in Kwon et al. 2023, arXiv:2311.05061.
    """

    learn: tuple[str, ...] = ()
    multiples: Mapping[str, float] | tuple[tuple[str, float], ...] = ()
    roles: tuple[tuple[str, tuple[str, ...]], ...] = ()
    common: tuple[str, ...] = ()
    layered: bool = False
    group: str = ""

    family: ClassVar[str] = "Trained leaves and rows"
    restarts: ClassVar[bool] = False
    form = Refactored

    def __post_init__(self) -> None:
        given = self.multiples.items() if isinstance(self.multiples, Mapping) else self.multiples
        object.__setattr__(self, "multiples", tuple(sorted((name, float(rate)) for name, rate in given)))
        for name, rate in self._multiples.items():
            if not POSITIVE[0](rate):
                raise ValueError(f"Fields' multiples must be {POSITIVE[1]}, got {rate} for {name}")

    @property
    def _multiples(self) -> dict[str, float]:
        return dict(self.multiples)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Those of the code; with `layered` the number of the matrix, which has no axes."""
        own = {name: roles for name, roles in self.roles if name not in self.common}
        return {**own, "layer": ()} if self.layered else own

    @property
    def shared_fields(self) -> tuple[str, ...]:
        """Those that a group has in common."""
        return self.common

    def __str__(self) -> str:
        """What the user said."""
        said = {"learn": self.learn, "multiples": self._multiples}
        return f"Fields({', '.join(f'{name}={value}' for name, value in said.items() if value)})"

    def of(self, leaf: Any) -> Fields:
        """The method for a leaf of the base, with the fields that it trains there.

        Raises:
            ValueError: saying what was wanted and what was got.
        """
        if not isinstance(leaf, Stored):
            raise ValueError(
                "Fields trains a leaf that is kept in the form of a code; quantize it first, or use jlora.Full()"
            )
        if not leaf.code.trained:
            raise ValueError(
                f"it is kept as {leaf.code}, whose fields are not trained, being numbers of few bits and their scales; "
                "adapt it by a method that stays beside it, such as jlora.LoRA"
            )
        can = [name for name in leaf.code.axes if name in leaf.code.trained]
        wanted = self.learn or tuple(can)
        if unknown := [name for name in wanted if name not in can]:
            raise ValueError(f"Fields can't train {unknown[0]!r} of {leaf.code}; there are {can}")
        if unknown := [name for name in self._multiples if name not in wanted]:
            raise ValueError(f"Fields' multiples name {unknown[0]!r}, but of {leaf.code} are trained {list(wanted)}")
        common = tuple(name for name in wanted if name in leaf.code.common)
        roles, layered = tuple((name, leaf.code.axes[name]) for name in wanted), bool(common) and not leaf.common
        return replace(self, roles=roles, common=common, layered=layered, group=leaf.group if common else "")

    def start(self, key: jax.Array, w: Any, site: Site, **statistics: jax.Array) -> Start:
        """The fields of the leaf itself, which `w` is here; batch axes in front."""
        numbers = {"layer": jnp.arange(math.prod(w.batch_shape)).reshape(w.batch_shape)} if self.layered else {}
        return Start({name: _copied(w.fields[name]) for name in self.axes if name not in numbers}, numbers)

    def start_in_common(self, leaf: Stored) -> Start:
        """The trained arrays of the group of a leaf; with `layered` those of all matrices, one behind another."""
        if not self.layered:
            return Start({name: _copied(leaf.common[name]) for name in self.common})
        depth = len(leaf.batch_axes)
        found = {name: leaf.fields[name] for name in self.common}
        return Start({name: _copied(array.reshape(-1, *array.shape[depth:])) for name, array in found.items()})

    def put_back(self, leaf: Stored, trained: Arrays, common: Arrays) -> Stored:
        """The leaf with trained arrays in the place of its fields, in their form and dtypes."""
        new = trained | common

        def put(name: str, array: jax.Array) -> jax.Array:
            return jnp.reshape(new.get(name, array), array.shape).astype(array.dtype)

        own = {name: put(name, array) for name, array in leaf.fields.items()}
        return replace(leaf, fields=own, common={name: put(name, array) for name, array in leaf.common.items()})

    def weight(self, view: View) -> jax.Array:
        """`decode(fields)`."""
        assert view.code is not None
        return view.code.decode(self._fields(view), *view.w.shape)

    def update(self, view: View) -> Refactored:
        """The weight, and the matrices that it is a product of, if any; where it is only described there is no code."""
        found = None if view.code is None else view.code.factored(self._fields(view), *view.w.shape)
        return Refactored(view, chain=None if found is None else Chain(found))

    def _fields(self, view: View) -> Arrays:
        """All fields of the code, the trained ones as they are now."""
        common = {name: view.shared[name] for name in self.common}
        if self.layered:
            common = {name: array[view.frozen["layer"]] for name, array in common.items()}
        return view.codes | view.params | common

    def labels(self, site: Site) -> dict[str, str]:
        """A vector's group for values that are one row, such as singular values, and LoRA's `a` for all others."""
        return {name: default_label(len(roles)) for name, roles in self.axes.items() if name != "layer"}

    def rates(self, site: Site) -> dict[str, float]:
        """The multiples of a leaf's own fields."""
        return {name: rate for name, rate in self._multiples.items() if name not in self.common}

    def shared_rates(self) -> dict[str, float]:
        """The multiples of those in common."""
        return {name: rate for name, rate in self._multiples.items() if name in self.common}


def _copied(array: Any) -> jax.Array:
    """An array that a step may take the memory of, in float32 at least."""
    return jnp.array(array, jnp.promote_types(array.dtype, jnp.float32), copy=True)
