"""Bases that qwix quantized: its `QArray` leaves as leaves that jlora takes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jlora import paths
from jlora.core.protocol.code import Arrays, Code
from jlora.core.protocol.kept import Kept
from jlora.core.protocol.method import Site
from jlora.core.protocol.readings import Sites
from jlora.core.protocol.stored import Stored
from jlora.core.tree.spec import resolve
from jlora.stored import packing
from jlora.stored.normal_float import NF4


@dataclass(frozen=True)
class Tiled(Code):
    """What qwix keeps: `(value - zero) * scale`, with a scale, and a zero if there is one, for each tile of the matrix.

    `values [in, out]` of any narrow dtype; `scales [in / tile[0], out / tile[1]]` and `zeros`, likewise tiled. Computed in the
    scales' dtype, as qwix does. It is read and not made: `encode` is qwix's own.

    Args:
        tile: sides of a scale's tile; 0 for a side that is the matrix's.
        zero_tile: sides of a zero's tile, likewise; None where there are no zeros.
        normal: whether the values are codes of NF4's levels.
    """

    tile: tuple[int, int]
    zero_tile: tuple[int, int] | None = None
    normal: bool = False

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Values run along the matrix, scales and zeros where there are several."""
        tiles = {"scales": self.tile} | ({"zeros": self.zero_tile} if self.zero_tile else {})
        along = {name: tuple(role if side else "" for role, side in zip(("in", "out"), t)) for name, t in tiles.items()}
        return {"values": ("in", "out"), **along}

    def encode(self, w: jax.Array) -> Arrays:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{self} is qwix's form, which jlora reads and does not make; quantize by one of jlora's codes"
        )

    def decode(self, fields: Arrays, rows: int, columns: int) -> jax.Array:
        """`(value - zero) * scale`."""
        values, scales = fields["values"], fields["scales"]
        if self.normal:
            values = packing.choose(values.astype(jnp.int32), NF4.levels)
        values = values.astype(scales.dtype)
        if self.zero_tile:
            values = values - _spread(fields["zeros"].astype(scales.dtype), self.zero_tile)
        return (values * _spread(scales, self.tile)).astype(jnp.float32)


def _spread(tiles: jax.Array, tile: tuple[int, int]) -> jax.Array:
    """One number for each entry of a tile; one side stays 1 where it is the matrix's."""
    for axis, side in enumerate(tile):
        tiles = jnp.repeat(tiles, side, axis=axis) if side else tiles
    return tiles


def from_qwix(params: Any, sites: Sites | None = None) -> Any:
    """Params of which qwix quantized some leaves (`QArray`), with leaves that jlora takes in their place.

    The quantized values stay as they are, and nothing is decoded or rounded again. Where a leaf of two axes is not `[in, out]`,
    or has more, trace the function on the params as they were before, of which shapes are enough:
    `sites = jlora.sites(model.apply, {"params": shapes}, tokens)`.

    Args:
        params: a tree with `QArray` leaves, as `qwix.quantize_params` gives.
        sites: as for `adapterize`.

    Returns:
        The same tree with `Stored` leaves, for `adapterize` and `lift`.

    Raises:
        ValueError: where no leaf is a `QArray`, a leaf's roles can't be known, or its scales have 8 bits.

    """
    leaves, treedef = paths.flatten_with_keys(params, _is_qarray)
    found = {keys: leaf for keys, leaf in leaves if _is_qarray(leaf)}
    if not found:
        raise ValueError("from_qwix found no QArray among the params")
    shapes = [
        (keys, jax.ShapeDtypeStruct(leaf.qvalue.shape, leaf.scale.dtype)) if keys in found else (keys, leaf)
        for keys, leaf in leaves
    ]
    kept = {site.keys: site for site in resolve(shapes, {re.escape("/".join(keys)): Kept() for keys in found}, sites)}
    new = [_stored(kept[keys], leaf) if keys in found else leaf for keys, leaf in leaves]
    return jax.tree.unflatten(treedef, new)


def _is_qarray(node: Any) -> bool:
    """Whether a node is qwix's, known by its name and fields, so that qwix need not be there."""
    return type(node).__name__ == "QArray" and all(hasattr(node, name) for name in ("qvalue", "scale", "zero_point"))


def _stored(site: Site, leaf: Any) -> Stored:
    normal = leaf.qtype == "nf4"
    if jnp.dtype(leaf.scale.dtype).itemsize < 2:
        raise ValueError(
            f"{site.path}: qwix's {leaf.qtype} has scales of {leaf.scale.dtype}, which jlora does not read"
        )
    scales, tile = _tiles(site, leaf.scale)
    fields, zero_tile = {"values": site.fold(leaf.qvalue), "scales": scales}, None
    if leaf.zero_point is not None:
        fields["zeros"], zero_tile = _tiles(site, leaf.zero_point)
    code = Tiled(tile, zero_tile, normal)
    roles = (site.in_axes, site.out_axes, site.batch_axes)
    return Stored(fields, code, site.shape, jnp.dtype(leaf.scale.dtype), *roles)


def _tiles(site: Site, scale: jax.Array) -> tuple[jax.Array, tuple[int, int]]:
    """Scales of a leaf whose axes they divide, folded, and the sides of a tile."""
    for axis in site.batch_axes:
        scale = jnp.repeat(scale, site.shape[axis] // scale.shape[axis], axis=axis)
    for axes in (site.in_axes, site.out_axes):
        if not _is_one_tile(site, scale, axes):
            for axis in axes:
                scale = jnp.repeat(scale, site.shape[axis] // scale.shape[axis], axis=axis)
    order = (*site.batch_axes, *site.in_axes, *site.out_axes)
    inside, outside = (math.prod(scale.shape[axis] for axis in axes) for axes in (site.in_axes, site.out_axes))
    folded = jnp.transpose(scale, order).reshape(*site.batch_shape, inside, outside)
    sides = [size // count if count > 1 else 0 for size, count in ((site.in_size, inside), (site.out_size, outside))]
    return folded, (sides[0], sides[1])


def _is_one_tile(site: Site, scale: jax.Array, axes: tuple[int, ...]) -> bool:
    """Whether what shares a scale lies together when axes are folded: whole axes first, then at most one in part, then ones."""
    cut = [axis for axis in axes if scale.shape[axis] < site.shape[axis]]
    return not cut or all(scale.shape[axis] == 1 for axis in axes[axes.index(cut[0]) + 1 :])
