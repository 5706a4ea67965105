"""`Stored`: a base leaf that is kept in the form of a code, and stands in the params tree where its array stood."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from jlora import _compat, paths
from jlora.core.protocol.code import Arrays, Code
from jlora.core.protocol.roles import Folded


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False, eq=False)
class Stored(paths.Whole, Folded):
    """A leaf in the form of a code; made by `quantize`, understood by `lift`.

    For jlora it is one leaf with the shape and dtype of the array that it stands for; for JAX a node that holds the fields.

    Attributes:
        fields: the code's arrays, batch axes in front.
        code: the code; static.
        shape: of the decoded leaf; static.
        dtype: of the decoded leaf; static.
        in_axes, out_axes, batch_axes: roles of its axes, as those of a `Site`; static.
        common: fields that all matrices of the leaf have in common, without batch axes.
        group: a name for the leaves that have the code's `common` fields in common, which are the same arrays in all of
            them; empty where the code has none. Static.
    """

    fields: Arrays
    code: Code = field(metadata={"static": True})
    shape: tuple[int, ...] = field(metadata={"static": True})
    dtype: Any = field(metadata={"static": True})
    in_axes: tuple[int, ...] = field(metadata={"static": True})
    out_axes: tuple[int, ...] = field(metadata={"static": True})
    batch_axes: tuple[int, ...] = field(default=(), metadata={"static": True})
    common: Arrays = field(default_factory=dict)
    group: str = field(default="", metadata={"static": True})

    @property
    def ndim(self) -> int:
        """Number of axes of the decoded leaf."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def roles(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The in, out and batch axes."""
        return self.in_axes, self.out_axes, self.batch_axes

    @property
    def nbytes(self) -> int:
        """Bytes of the fields."""
        return sum(map(_bytes, (self.fields | self.common).values()))

    @property
    def sharding(self) -> Any:
        """Where the leaf lies: on a mesh cut as its fields are, else where the fields lie; None of shapes and tracers."""
        found = [getattr(array, "sharding", None) for array in self.fields.values()]
        meshes = [sharding.mesh for sharding in found if isinstance(sharding, NamedSharding)]
        return NamedSharding(meshes[0], self._spec(found)) if meshes else found[0]

    def _spec(self, shardings: list[Any]) -> PartitionSpec:
        """How the leaf is cut, by the shardings of its fields."""
        entries: list[Any] = [None] * self.ndim
        for roles, sharding in zip(self._roles(), shardings, strict=True):
            if isinstance(sharding, NamedSharding):
                for role, entry in zip(roles, sharding.spec):
                    if entry is not None and role is not None:
                        entries[role] = entry
        return PartitionSpec(*entries)

    def _roles(self) -> list[list[int | None]]:
        """For each field the leaf's axis that each of the field's axes is cut by, or None."""
        first = {"in": self._first(self.in_axes), "out": self._first(self.out_axes)}
        axes = self.code.axes
        return [[*self.batch_axes, *(first.get(role) for role in axes[name])] for name in self.fields]

    def _first(self, folded: tuple[int, ...]) -> int | None:
        return next((axis for axis in folded if self.shape[axis] > 1), None)

    def check(self, path: str = "a leaf") -> None:
        """Whether the fields are those of a leaf of this shape.

        Raises:
            ValueError: where they were cut or joined, as by `jax.tree.map`, with the leaf's path.
        """
        for name, array in self.fields.items():
            batch, wanted = jnp.shape(array)[: len(self.batch_axes)], len(self.batch_axes) + len(self.code.axes[name])
            if batch != self.batch_shape or jnp.ndim(array) != wanted:
                raise ValueError(
                    f"{path}, shape {self.shape}, is kept as {self.code}, but its field {name} has the shape "
                    f"{jnp.shape(array)}: it was cut or joined outside of a lifted function, which such a leaf can't take"
                )

    def decoded(self) -> jax.Array:
        """The leaf as an array of its shape and dtype.

        Raises:
            ValueError: as `check`.
        """
        self.check()

        def one(fields: Arrays) -> jax.Array:
            return self.code.decode(fields | self.common, self.in_size, self.out_size)

        for _ in self.batch_axes:
            one = jax.vmap(one)

        def whole(fields: Arrays) -> jax.Array:
            return self.unfold(one(fields).astype(self.dtype))

        return self.automatic(whole)(self.fields)

    def automatic(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that gives an array of the leaf's form, on meshes with explicit axes too: cut as the leaf is."""
        avals = [jax.typeof(array) for array in self.fields.values()]
        return _compat.automatic(function, avals[0], lambda _: self._spec([aval.sharding for aval in avals]))

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses to be taken for an array.

        Raises:
            TypeError: with what can be done.
        """
        raise TypeError(
            f"a leaf of shape {self.shape} is kept as {self.code} and is no array: run the function by jlora.lift(fn), which "
            "decodes it where it is used, or decode all leaves first by jlora.dequantize(params)"
        )

    __array__ = __jax_array__ = __getitem__ = astype = reshape = transpose = _refuse
    __matmul__ = __rmatmul__ = __mul__ = __rmul__ = __add__ = __radd__ = __sub__ = __rsub__ = __truediv__ = __neg__ = (
        _refuse
    )

    def __repr__(self) -> str:
        return f"Stored({self.code}, {self.dtype}{list(self.shape)})"


def kept_bytes(leaves: Iterable[Stored]) -> int:
    """Bytes of the fields of some leaves; those that a group has in common count once."""
    found: dict[Any, int] = {}
    for number, leaf in enumerate(leaves):
        for name, array in (leaf.fields | leaf.common).items():
            shared = bool(leaf.group) and name in leaf.code.common
            found[(leaf.group if shared else number, name)] = _bytes(array)
    return sum(found.values())


def _bytes(array: Any) -> int:
    return math.prod(array.shape) * jnp.dtype(array.dtype).itemsize


def decoded(leaf: Any) -> Any:
    """The array of a leaf that is kept in another form, cut over a mesh as that is; any other leaf as it is."""
    if not isinstance(leaf, Stored):
        return leaf
    array = leaf.decoded()
    on_mesh = not isinstance(array, Tracer) and isinstance(leaf.sharding, NamedSharding)
    return jax.device_put(array, leaf.sharding) if on_mesh else array
