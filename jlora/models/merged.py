"""Merged params one leaf at a time, so that a model is never twice in memory."""

from typing import Any

import numpy as np

from jlora.core.tree.adapted import Adapted
from jlora.core.tree.merge import merged_leaves
from jlora.core.walk import weight as weights
from jlora.core.walk.weight import Weight


class MergedLeaf:
    """Stands for the effective weight of a leaf; formed when its values are asked for.

    Args:
        weight: the leaf with its adapter.
        last: holds the leaf that was formed last, with its values; shared by all leaves of a tree, so that one is in memory.
    """

    def __init__(self, weight: Weight, last: dict["MergedLeaf", np.ndarray]):
        self._weight, self._last = weight, last
        self.shape, self.dtype, self.size = weight.leaf_shape, weight.array.dtype, weight.array.size

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values: formed now, unless this leaf was the last one formed."""
        if self not in self._last:
            self._last.clear()
            self._last[self] = np.asarray(weights.effective(self._weight))
        return np.array(self._last[self], dtype, copy=copy)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Some of the values, such as one layer's."""
        return np.asarray(self)[index]


def lazily_merged(adapted: Adapted) -> Any:
    """As `jlora.merge`, with leaves that are formed when read, for `jlora.models.save`.

    One leaf is held at a time, beside the base; `np.asarray` of a leaf forms it.

    Raises:
        ValueError: as `jlora.merge`.
    """
    last: dict[MergedLeaf, np.ndarray] = {}
    # Leaves beside are vectors, which cost no memory to speak of.
    kept = {weight.site.keys: MergedLeaf(weight, last) for weight in adapted.kept() if weight.site is not None}
    return adapted.with_replaced(kept | merged_leaves(adapted, lambda weight: MergedLeaf(weight, last)))
