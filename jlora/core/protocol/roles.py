"""The roles of a leaf's axes, and the matrix to which they fold it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


class Folded:
    """What has a shape whose axes are `in_axes`, `out_axes` and `batch_axes`: the base of `Site` and `Stored`."""

    shape: tuple[int, ...]
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    batch_axes: tuple[int, ...]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return tuple(self.shape[axis] for axis in self.batch_axes)

    @property
    def in_size(self) -> int:
        """Rows of the folded matrix."""
        return math.prod(self.shape[axis] for axis in self.in_axes)

    @property
    def out_size(self) -> int:
        """Columns of the folded matrix."""
        return math.prod(self.shape[axis] for axis in self.out_axes)

    def fold(self, leaf: jax.Array) -> jax.Array:
        """The leaf as `[*batch, in, out]`."""
        order = (*self.batch_axes, *self.in_axes, *self.out_axes)
        return jnp.transpose(leaf, order).reshape(*self.batch_shape, self.in_size, self.out_size)

    def unfold(self, matrix: jax.Array) -> jax.Array:
        """The inverse of `fold`."""
        order = (*self.batch_axes, *self.in_axes, *self.out_axes)
        folded = matrix.reshape([self.shape[axis] for axis in order])
        return jnp.transpose(folded, [order.index(axis) for axis in range(len(order))])

    def specs(self, axes: Mapping[str, tuple[str, ...]], spec: PartitionSpec) -> dict[str, PartitionSpec]:
        """The partition specs of fields whose axes have the given roles, beside a leaf that is cut by `spec`.

        Batch axes, which all fields have in front, are cut as the leaf's; `in` and `out` axes as the outermost of the leaf's
        axes that are folded into them, since a cut of an inner one is no cut of the folded axis; everything else is replicated.
        """
        entries = (*spec, *([None] * (len(self.shape) - len(spec))))
        cut = {"in": self.outermost(self.in_axes, entries), "out": self.outermost(self.out_axes, entries)}
        batch = [entries[axis] for axis in self.batch_axes]
        return {name: PartitionSpec(*batch, *(cut.get(role) for role in roles)) for name, roles in axes.items()}

    def outermost(self, folded: tuple[int, ...], entries: tuple[Any, ...]) -> Any:
        """What cuts the outermost of the folded axes that are longer than 1, which alone cuts the folded axis."""
        wide = [axis for axis in folded if self.shape[axis] > 1]
        return entries[wide[0]] if wide else None
