"""`merge`: an `Adapted` back to ordinary params."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer

from jlora import _compat, paths
from jlora.core.protocol.method import View
from jlora.core.protocol.stored import Stored, decoded
from jlora.core.tree import beside
from jlora.core.tree.adapted import Adapted
from jlora.core.walk import weight as weights
from jlora.core.walk.weight import Weight


def merge(adapted: Adapted) -> Any:
    """Ordinary params for the unmodified function: every adapted leaf replaced by its effective weight.

    Differentiable with respect to `adapted.params`; dtype and sharding of each leaf are kept, and leaves that are not
    adapted are the base's own arrays; those that are kept in the form of a code are decoded. A leaf beside an adapted one that
    the method changes too, such as a bias, is replaced as well. Where the base is an `Adapted` again, that is merged too.

    Raises:
        ValueError: for a leaf whose method no weight can stand for, such as a network beside the product.

    Example:
        >>> model.apply({"params": jlora.merge(adapted)}, tokens)
    """
    leaves = dict(paths.flatten_with_keys(adapted.base)[0])

    def formed(weight: Weight) -> Any:
        assert weight.site is not None
        return _placed_like(effective_leaf(weight), leaves[weight.site.keys])

    params = adapted.with_replaced(merged_leaves(adapted, formed))
    is_node = lambda node: isinstance(node, Adapted | Stored)  # noqa: E731
    plain = lambda node: merge(node) if isinstance(node, Adapted) else decoded(node)  # noqa: E731
    return jax.tree.map(plain, params, is_leaf=is_node)


def merged_leaves(adapted: Adapted, formed: Callable[[Weight], Any]) -> dict[tuple[str, ...], Any]:
    """What stands in merged params in the place of leaves of the base, by their keys.

    Args:
        adapted: the adapters on their base.
        formed: of an adapted leaf what stands in its place. A leaf beside that its method changes is formed here.

    Raises:
        ValueError: for a leaf whose method no weight can stand for, with the path and the method.
    """
    found = adapted.weights()
    for weight in found:
        if not weight.method.mergeable:
            raise ValueError(
                f"{weight.name} can't be merged: {weight.method} acts in a way that no weight in its place does; keep the "
                "adapters (jlora.save) and run the function by jlora.lift"
            )
    own = dict(zip((site.keys for site in adapted.plan.sites), map(formed, found), strict=True))
    return own | _beside(adapted, found)


def leaves_beside(adapted: Adapted, found: list[Weight]) -> dict[tuple[str, ...], Any]:
    """The leaves beside those of `found` that a function must get as their methods change them, by their keys.

    Whatever it does with them is then what it does with merged params. Not those of leaves that act alone, whose `apply` adds
    what changes.
    """
    return _beside(adapted, [weight for weight in found if not weight.acts_alone])


def _beside(adapted: Adapted, found: list[Weight]) -> dict[tuple[str, ...], Any]:
    """The leaves beside some adapted ones as their methods change them, by their keys, in their form and dtype."""
    changing = [weight for weight in found if weight.beside]
    leaves = dict(paths.flatten_with_keys(adapted.base)[0]) if changing else {}
    changed: dict[tuple[str, ...], Any] = {}
    for weight in changing:
        assert weight.site is not None
        for name, keys in beside.keys_of(weight.site).items():
            if name in weight.beside:
                changed[keys] = _changed(weight, name, leaves[keys])
    return changed


def _changed(weight: Weight, name: str, leaf: Any) -> Any:
    """A leaf beside an adapted one as its method changes it."""

    def unfolded(weight: Weight) -> jax.Array:
        assert weight.site is not None
        folded = weights.over_batch(lambda view: _given(weight, view, name), weight)
        return beside.unfold(weight.site, folded).astype(leaf.dtype).reshape(leaf.shape)

    return _placed_like(_compat.automatic(unfolded, jax.typeof(leaf))(weight), leaf)


def _given(weight: Weight, view: View, name: str) -> jax.Array:
    merged = weight.method.merged_beside(view)
    if name not in merged:
        raise TypeError(
            f"{weight.name}: {weight.method} names {name!r} in beside, but its merged_beside gives {sorted(merged)}"
        )
    return merged[name]


def effective_leaf(weight: Weight) -> jax.Array:
    """The effective weight of a leaf, in its form and dtype, on meshes with explicit axes too."""
    if weight.code is None:
        return _compat.automatic(weights.effective, weight.aval)(weight)
    site = weight.site
    assert site is not None
    roles = (site.in_axes, site.out_axes, site.batch_axes)
    return Stored(weight.codes, weight.code, site.shape, site.dtype, *roles).automatic(weights.effective)(weight)


def _placed_like(array: Any, leaf: Any) -> Any:
    sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    if sharding is None or isinstance(array, Tracer) or array.sharding == sharding:
        return array
    return jax.device_put(array, sharding)
