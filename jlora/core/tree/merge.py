"""`merge`: an `Adapted` back to ordinary params."""

from __future__ import annotations

from typing import Any

import jax
from jax.core import Tracer

from jlora import _compat, paths
from jlora.core.protocol.method import View
from jlora.core.tree import beside
from jlora.core.tree.adapted import Adapted
from jlora.core.walk import weight as weights
from jlora.core.walk.weight import Weight


def merge(adapted: Adapted) -> Any:
    """Ordinary params for the unmodified function: every adapted leaf replaced by its effective weight.

    Differentiable with respect to `adapted.params`; dtype and sharding of each leaf are kept, and leaves that are not
    adapted are the base's own arrays. A leaf beside an adapted one that the method changes too, such as a bias, is replaced
    as well. Where the base is an `Adapted` again, that is merged too.

    Raises:
        ValueError: for a leaf whose method no weight can stand for, such as a network beside the product.

    Example:
        >>> model.apply({"params": jlora.merge(adapted)}, tokens)
    """
    found = adapted.weights()
    check_mergeable(found)
    merged: dict[tuple[str, ...], Any] = {}
    for weight in found:
        assert weight.site is not None
        merged[weight.site.keys] = _placed_like(effective_leaf(weight), weight.array)
        merged |= merged_beside(adapted, weight)
    params = adapted.with_replaced(merged)
    is_adapted = lambda node: isinstance(node, Adapted)  # noqa: E731
    return jax.tree.map(lambda node: merge(node) if is_adapted(node) else node, params, is_leaf=is_adapted)


def check_mergeable(found: list[Weight]) -> None:
    """Refuses leaves whose method no weight can stand for.

    Raises:
        ValueError: with the path and the method.
    """
    for weight in found:
        if not weight.method.mergeable:
            raise ValueError(
                f"{weight.name} can't be merged: {weight.method} acts in a way that no weight in its place does; keep the "
                "adapters (jlora.save) and run the function by jlora.lift"
            )


def leaves_beside(adapted: Adapted, found: list[Weight]) -> dict[tuple[str, ...], Any]:
    """The leaves beside those of `found` that a function must get as their methods change them, by their keys.

    Whatever it does with them is then what it does with merged params. Not those of leaves that act alone, whose `apply` adds
    what changes.
    """
    changed: dict[tuple[str, ...], Any] = {}
    for weight in found:
        changed |= {} if weight.acts_alone else merged_beside(adapted, weight)
    return changed


def merged_beside(adapted: Adapted, weight: Weight) -> dict[tuple[str, ...], Any]:
    """The leaves beside an adapted one as its method changes them, in their form and dtype."""
    site = weight.site
    if site is None or not weight.beside:
        return {}
    leaves, keys, merged = dict(paths.flatten_with_keys(adapted.base)[0]), beside.keys_of(site), {}
    for name in weight.beside:
        leaf = leaves[keys[name]]

        def changed(weight: Weight, name: str = name) -> jax.Array:
            return weights.over_batch(lambda view: _given(weight, view, name), weight)

        unfolded = lambda weight, changed=changed: beside.unfold(site, changed(weight))  # noqa: E731
        array = _compat.automatic(unfolded, jax.typeof(leaf))(weight).astype(leaf.dtype).reshape(leaf.shape)
        merged[keys[name]] = _placed_like(array, leaf)
    return merged


def _given(weight: Weight, view: View, name: str) -> jax.Array:
    merged = weight.method.merged_beside(view)
    if name not in merged:
        raise TypeError(
            f"{weight.name}: {weight.method} names {name!r} in beside, but its merged_beside gives {sorted(merged)}"
        )
    return merged[name]


def effective_leaf(weight: Weight) -> jax.Array:
    """The effective weight of a leaf, in its form and dtype, on meshes with explicit axes too."""
    return _compat.automatic(weights.effective, jax.typeof(weight.array))(weight)


def _placed_like(array: Any, leaf: Any) -> Any:
    concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
    if not concrete or isinstance(array, Tracer) or array.sharding == leaf.sharding:
        return array
    return jax.device_put(array, leaf.sharding)
