"""`merge`: an `Adapted` back to ordinary params."""

from __future__ import annotations

from typing import Any

import jax
from jax.core import Tracer

from jlora import _compat
from jlora.core.tree.adapted import Adapted
from jlora.core.walk import weight as weights
from jlora.core.walk.weight import Weight


def merge(adapted: Adapted) -> Any:
    """Ordinary params for the unmodified function: every adapted leaf replaced by its effective weight.

    Differentiable with respect to `adapted.params`; dtype and sharding of each leaf are kept, and leaves that are not
    adapted are the base's own arrays. Where the base is an `Adapted` again, that is merged too.

    Example:
        >>> model.apply({"params": jlora.merge(adapted)}, tokens)
    """
    merged = [_placed_like(effective_leaf(weight), weight.array) for weight in adapted.weights()]
    params = adapted.with_leaves(merged)
    is_adapted = lambda node: isinstance(node, Adapted)  # noqa: E731
    return jax.tree.map(lambda node: merge(node) if is_adapted(node) else node, params, is_leaf=is_adapted)


def effective_leaf(weight: Weight) -> jax.Array:
    """The effective weight of a leaf, in its form and dtype, on meshes with explicit axes too."""
    return _compat.automatic(weights.effective, jax.typeof(weight.array))(weight)


def _placed_like(array: Any, leaf: Any) -> Any:
    concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
    if not concrete or isinstance(array, Tracer) or array.sharding == leaf.sharding:
        return array
    return jax.device_put(array, leaf.sharding)
