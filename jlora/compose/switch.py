"""Sparse adapters in a fused base: in place and back, bit for bit, by overwriting entries; several of them fused.

Adding an update and subtracting it again does not restore a weight: sums are rounded. So a `Pack` holds what the entries
*are* with the adapter, and `switch` hands back what they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jlora import paths
from jlora.core.products.sparse import Sparse
from jlora.core.protocol.code import Code
from jlora.core.protocol.method import Method, Site
from jlora.core.protocol.stored import Stored
from jlora.core.tree import placement
from jlora.core.tree.adapted import Adapted
from jlora.core.walk import weight as weights


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pack:
    """Some entries of some leaves, by path; made by `pack` and `fuse`, put in place by `switch`.

    Attributes:
        index: for each leaf `[*batch, k]`, flat positions in the folded matrix.
        values: for each leaf `[*batch, k]` in the leaf's dtype: what stands there.
        sites: the leaves; static, and without their methods, so that packs of equal sizes share one compiled switch.
    """

    index: dict[str, jax.Array]
    values: dict[str, jax.Array]
    sites: tuple[Site, ...] = field(metadata={"static": True})


def pack(adapted: Adapted, scale: float = 1.0) -> Pack:
    """The adapted entries as they stand in the merged weight: `w[index] + scale * values`, rounded once.

    Args:
        adapted: all of whose leaves have sparse methods, on a base that holds no other adapter.
        scale: strength of the adapter.

    Raises:
        ValueError: for a leaf whose method changes other entries than a few.

    Example:
        >>> poet = jlora.pack(jlora.adapterize(params, {r".*/q_proj/kernel": jlora.SHiRA("weight")}))
        >>> served = jax.tree.map(jnp.copy, params)
        >>> served, saved = jlora.switch(served, poet)
        >>> served = jlora.restore(served, saved)
    """
    return fuse([adapted], [scale])


def fuse(adapters: Sequence[Adapted], strengths: Sequence[float] | None = None) -> Pack:
    """Several adapters of one base as one pack: `w + sum of strength * update`, at the entries that any of them changes.

    The adapters may share entries, and may adapt different leaves. The base is that of the first adapter that adapts a
    leaf; all must have been made on the same one.

    Args:
        adapters: as for `pack`.
        strengths: one for each adapter; by default 1.

    Raises:
        ValueError: for a leaf whose method changes other entries than a few, for adapters that read a leaf differently, for
            no adapters, or another number of strengths.

    Example:
        >>> poet, coder = (jlora.adapterize(params, {r".*/q_proj/kernel": jlora.SHiRA(offset=n)}) for n in (0, 1))
        >>> both = jlora.fuse([poet, coder], [0.7, 0.5])
    """
    strengths = [1.0] * len(adapters) if strengths is None else strengths
    if not adapters or len(strengths) != len(adapters):
        raise ValueError(f"fuse takes adapters and a strength for each, got {len(adapters)} and {len(strengths)}")
    found: dict[str, tuple[list[weights.Weight], list[float]]] = {}
    for adapted, strength in zip(adapters, strengths, strict=True):
        for weight in adapted.weights():
            members, each = found.setdefault(weight.name, ([], []))
            _check_member(weight, members)
            members.append(weight)
            each.append(strength)
    entries = {name: _sums(members, each) for name, (members, each) in found.items()}
    sites = tuple(_bare(members[0]) for members, _ in found.values())
    return Pack({name: e[0] for name, e in entries.items()}, {name: e[1] for name, e in entries.items()}, sites)


def _bare(weight: weights.Weight) -> Site:
    assert weight.site is not None
    return replace(weight.site, method=Method())


def _check_member(weight: weights.Weight, before: list[weights.Weight]) -> None:
    """Refuses what can't be packed, alone or with the members before."""
    if weight.code is not None:
        raise ValueError(f"{weight.name}: {_kept(weight.code)}")
    few: Any = weight.method.form is Sparse and jax.eval_shape(weights.update, weight)
    if not few or few.scale is not None:
        raise ValueError(
            f"{weight.name}: {weight.method} changes more than a few entries; pack adapters of SHiRA alone, or merge"
        )
    if before and _bare(before[0]) != _bare(weight):
        raise ValueError(f"{weight.name}: the adapters have it as {_bare(before[0])} and as {_bare(weight)}")


@jax.jit
def _sums(members: list[weights.Weight], strengths: list[float]) -> tuple[jax.Array, jax.Array]:
    """The changed positions, and the values of the fused weight there.

    A position that several updates change comes several times, each time with the sum of all.
    """
    updates: list[Any] = [weights.update(weight) for weight in members]
    index = jnp.concatenate([update.index for update in updates], axis=-1)
    values = jnp.concatenate([update.values * s for update, s in zip(updates, strengths, strict=True)], axis=-1)

    def sums(index: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        order = jnp.argsort(index, stable=True)
        index, values = index[order], values[order]
        group = jnp.cumsum(jnp.diff(index, prepend=index[:1]) != 0)
        return index, jax.ops.segment_sum(values, group, index.size, indices_are_sorted=True)[group]

    first = members[0]
    assert first.site is not None
    if len(updates) > 1:
        for _ in first.batch:
            sums = jax.vmap(sums)
        index, values = sums(index, values)
    before = weights.base(first)[_coordinates(first.site, index)]
    return index, (before.astype(values.dtype) + values).astype(before.dtype)


def _coordinates(site: Site, index: jax.Array) -> tuple[jax.Array, ...]:
    """Flat positions `[*batch, k]` of the folded matrices as coordinates in the leaf itself.

    With a coordinate for each axis XLA cuts a scatter as the leaf is cut, and moves no more than `k` values.
    """
    row, column = jnp.divmod(index, jnp.int32(site.out_size))
    found: dict[int, jax.Array] = {}
    for axes, flat in ((site.in_axes, row), (site.out_axes, column)):
        sizes = tuple(site.shape[axis] for axis in axes)
        found |= dict(zip(axes, jnp.unravel_index(flat, sizes)))
    for at, axis in enumerate(site.batch_axes):
        found[axis] = jax.lax.broadcasted_iota(jnp.int32, index.shape, at)
    return tuple(found[axis] for axis in range(len(site.shape)))


def switch(params: Any, pack: Pack, saved: Pack | None = None) -> tuple[Any, Pack]:
    """Puts a pack in place, after taking away the one before.

    The leaves are overwritten in place: their memory is reused, and the arrays that `params` held (and every other tree that
    holds the same arrays, such as `adapted.base`) can't be used any more. Leaves of which a pack says nothing stay the same
    objects. Packs of equal sizes share their compiled programs.

    Args:
        params: the base, perhaps with a pack in place.
        pack: what to put in place.
        saved: what the last `switch` returned, where its pack is to be taken away first.

    Returns:
        The params, and the entries as they were before the pack: for `restore`, or the next `switch`.

    Raises:
        ValueError: for a leaf that params lack, or have in another shape or dtype; then nothing was changed.
    """
    leaves, treedef = paths.flatten_with_keys(params)
    by_name = {"/".join(keys): leaf for keys, leaf in leaves}
    packs = [each for each in (saved, pack) if each is not None]
    for each in packs:
        _check(each, by_name)
    changed = {site.path: jnp.asarray(by_name[site.path]) for each in packs for site in each.sites}
    shardings = {name: placement.named_sharding(leaf) for name, leaf in changed.items()}
    if saved is not None:
        changed |= _write({site.path: changed[site.path] for site in saved.sites}, saved)
    touched = {site.path: changed[site.path] for site in pack.sites}
    before = _read(touched, pack)
    changed |= _write(touched, pack)
    # XLA may write an equal sharding in another way, for which a compiled step would be compiled anew.
    changed = {
        name: leaf if (s := shardings[name]) is None else jax.device_put(leaf, s) for name, leaf in changed.items()
    }
    new = [changed.get("/".join(keys), leaf) for keys, leaf in leaves]
    return jax.tree.unflatten(treedef, new), replace(pack, values=before)


def restore(params: Any, saved: Pack) -> Any:
    """Takes a pack away: the params as they were before `switch` put it in place, bit for bit.

    Uses up the arrays of `params` as `switch` does.
    """
    return switch(params, saved)[0]


@jax.jit
def _read(leaves: dict[str, jax.Array], pack: Pack) -> dict[str, jax.Array]:
    """The values of the leaves at a pack's entries."""
    return {
        site.path: leaves[site.path].at[_coordinates(site, pack.index[site.path])].get(mode="promise_in_bounds")
        for site in pack.sites
    }


@partial(jax.jit, donate_argnums=0)
def _write(leaves: dict[str, jax.Array], pack: Pack) -> dict[str, jax.Array]:
    """The leaves with a pack in place. A program of its own: beside a read of the same leaf XLA copies the leaf."""
    written = {}
    for site in pack.sites:
        at = leaves[site.path].at[_coordinates(site, pack.index[site.path])]
        # Positions that fused adapters share come several times, with the same value.
        written[site.path] = at.set(pack.values[site.path], mode="promise_in_bounds")
    return written


def _check(pack: Pack, by_name: dict[str, Any]) -> None:
    for site in pack.sites:
        leaf = by_name.get(site.path)
        if leaf is None:
            raise ValueError(f"the params have no leaf {site.path}, which the pack changes")
        if isinstance(leaf, Stored):
            raise ValueError(f"{site.path}: {_kept(leaf.code)}")
        dtype = pack.values[site.path].dtype
        if tuple(leaf.shape) != site.shape or leaf.dtype != dtype:
            raise ValueError(
                f"{site.path} has shape {tuple(leaf.shape)} and dtype {leaf.dtype}; the pack was made for {site.shape}, {dtype}"
            )


def _kept(code: Code) -> str:
    return (
        f"the base is kept as {code}, whose single entries can't be overwritten; decode it (jlora.dequantize), or lift the "
        "function with the adapters"
    )


def interference(first: Adapted, second: Adapted) -> dict[str, tuple[jax.Array, jax.Array]]:
    """How much the updates of two adapters overlap, for each leaf that both adapt: `(AWOM, AWOR)`, each `[*batch]`.

    With `d [in, out]` a leaf's update (the paper's `A` is its transpose), AWOM is the largest singular value of
    `d1 @ d2.T`, and AWOR the share of its entries that are zero. Two adapters without overlap have 0 and 1. Forms
    `[in, in]` matrices; meant for looking, not for training.

    Reference:
        Bhardwaj et al. 2024, arXiv:2406.13175, section 4.2.
    """

    @jax.jit
    def one(first: weights.Weight, second: weights.Weight) -> tuple[jax.Array, jax.Array]:
        d1, d2 = (weights.over_batch(weights_of_update, each) for each in (first, second))
        product = d1 @ jnp.swapaxes(d2, -1, -2)
        return jnp.linalg.norm(product, ord=2, axis=(-2, -1)), jnp.mean(product == 0, axis=(-2, -1))

    def weights_of_update(view: Any) -> jax.Array:
        wide = jnp.promote_types(view.w.dtype, jnp.float32)
        view = replace(view, w=view.w.astype(wide))
        return view.site.method.weight(view) - view.w

    others = {weight.name: weight for weight in second.weights()}
    return {weight.name: one(weight, others[weight.name]) for weight in first.weights() if weight.name in others}
