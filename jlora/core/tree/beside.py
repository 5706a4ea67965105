"""The leaves beside an adapted one that its method changes too, such as the bias beside a kernel."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora import _compat
from jlora.core.protocol.method import Site


def keys_of(site: Site) -> dict[str, tuple[str, ...]]:
    """The keys of the leaves that the site's method names, whether or not the tree has them."""
    return {name: (*site.keys[:-1], name) for name in site.method.beside}


def present(site: Site, leaves: Container[tuple[str, ...]]) -> tuple[str, ...]:
    """Which of the leaves that the site's method names the tree has: `Site.beside`."""
    return tuple(name for name, keys in keys_of(site).items() if keys in leaves)


def _axes(site: Site) -> list[int]:
    """The axes of the adapted leaf that a leaf beside it has too, in its order."""
    return sorted((*site.batch_axes, *site.out_axes))


def _order(site: Site) -> list[int]:
    """Where the batch axes, then the output axes, are among those of a leaf beside."""
    return [_axes(site).index(axis) for axis in (*site.batch_axes, *site.out_axes)]


def fold(site: Site, leaf: jax.Array) -> jax.Array:
    """A leaf beside the site's as `[*batch, out]`."""
    leaf = leaf.reshape([site.shape[axis] for axis in _axes(site)])
    return jnp.transpose(leaf, _order(site)).reshape(*site.batch_shape, site.out_size)


def unfold(site: Site, folded: jax.Array) -> jax.Array:
    """The inverse of `fold`."""
    order = _order(site)
    shape = [site.shape[axis] for axis in (*site.batch_axes, *site.out_axes)]
    return jnp.transpose(folded.reshape(shape), [order.index(n) for n in range(len(order))])


def check(sites: tuple[Site, ...], leaves: dict[tuple[str, ...], Any]) -> None:
    """Refuses leaves beside an adapted one that are not one value for each of its outputs, or that are adapted too.

    Raises:
        ValueError: with the path.
    """
    adapted = {site.keys: site for site in sites}
    owners: dict[tuple[str, ...], Site] = {}
    for site in sites:
        for keys in keys_of(site).values():
            if keys not in leaves:
                continue
            path, leaf, wanted = "/".join(keys), leaves[keys], tuple(site.shape[axis] for axis in _axes(site))
            if (owner := owners.setdefault(keys, site)) is not site:
                raise ValueError(
                    f"{path}: {site.method} of {site.path} and {owner.method} of {owner.path} would both change it; adapt one "
                    "of them by a method that leaves it alone"
                )
            if keys in adapted:
                raise ValueError(
                    f"{path} is adapted by {adapted[keys].method}, but {site.method} of {site.path} changes it too; take "
                    "it out of the spec"
                )
            if (
                not _compat.is_array(leaf)
                or not jnp.issubdtype(leaf.dtype, jnp.floating)
                or _sized(leaf.shape) != _sized(wanted)
            ):
                got = f"shape {tuple(leaf.shape)} of {leaf.dtype}" if _compat.is_array(leaf) else repr(leaf)
                raise ValueError(
                    f"{path}: {site.method} of {site.path} changes it too and wants a float for each output, shape {wanted}, "
                    f"got {got}; leave the leaf out of the spec, or adapt it by a method that leaves {path} alone"
                )


def _sized(shape: Sequence[int]) -> list[int]:
    """A shape without axes of size 1, which a bias may have for those of the activation."""
    return [size for size in shape if size > 1]
