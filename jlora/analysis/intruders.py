"""Intruder dimensions: directions that are prominent in a tuned weight and strange to the pretrained one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import paths
from jlora.core.protocol.method import Site
from jlora.core.protocol.readings import Sites
from jlora.core.protocol.stored import decoded
from jlora.core.transforms.observe import watch
from jlora.core.tree.adapted import Adapted
from jlora.core.tree.merge import merge
from jlora.core.tree.spec import ALL_LINEAR

SIDES = ("out", "in")


@dataclass(frozen=True)
class LeafIntruders:
    """What was found at one leaf, batch axes in front.

    Attributes:
        cosines: for each of the first singular vectors of the tuned weight the largest `|cos|` with any of the pretrained
            weight's, `[*batch, k]`.
        values: the singular values of these vectors, `[*batch, k]`.
        intruders: which of them are intruders, truths `[*batch, k]`.
        cosine_of_all: the `|cos|` of each of these vectors with each of the pretrained weight's, `[*batch, k, min(in, out)]`.
        pretrained: the singular vectors of the pretrained weight, `[*batch, min(in, out), side]`.
    """

    cosines: np.ndarray
    values: np.ndarray
    intruders: np.ndarray
    cosine_of_all: np.ndarray = field(repr=False)
    pretrained: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Intruders:
    """The intruder dimensions of a model; made by `jlora.intruder_dimensions`.

    Attributes:
        leaves: what was found, by path.
        top: how many singular vectors of each matrix were looked at.
        threshold: the `|cos|` below which one is an intruder.
        side: whose singular vectors: "out" or "in".
    """

    leaves: dict[str, LeafIntruders]
    top: int
    threshold: float
    side: str

    @property
    def count(self) -> int:
        """How many there are in all matrices."""
        return sum(int(leaf.intruders.sum()) for leaf in self.leaves.values())

    @property
    def counts(self) -> dict[str, int]:
        """How many there are, by path."""
        return {path: int(leaf.intruders.sum()) for path, leaf in self.leaves.items()}

    def count_below(self, threshold: float) -> int:
        """How many there would be with another threshold."""
        return sum(int((leaf.cosines < threshold).sum()) for leaf in self.leaves.values())

    def __str__(self) -> str:
        looked_at = sum(leaf.cosines.size for leaf in self.leaves.values())
        return f"{self.count} intruder dimensions among the first {self.top} of each matrix ({looked_at} in all)"


def intruder_dimensions(
    before: Any,
    after: Any = None,
    patterns: Any = ALL_LINEAR,
    sites: Sites | None = None,
    *,
    top: int = 10,
    threshold: float = 0.5,
    side: str = "out",
    known: Intruders | None = None,
) -> Intruders:
    """Which of the first singular vectors of each tuned weight are nearly orthogonal to all of the pretrained weight's.

    With `w0 = Σ σ_i u_i v_iᵀ` and `w1 = Σ τ_j y_j z_jᵀ` (`w [in, out]`, singular values falling), `z_j` is an intruder where
    `max_i |z_j · v_i|` is below `threshold`, for `j` among the first `top`. The authors find that LoRA makes such directions,
    that full fine-tuning does not, and that models with many forget more.

    Where singular values nearly agree, single vectors mean little: any mixture of them is as good.

    Args:
        before: an `Adapted`, whose base and merged params are compared at all adapted matrices; or the pretrained params.
        after: with pretrained params the tuned ones, such as of full fine-tuning, a tree of the same structure.
        patterns: with two trees, which weights, as for `jlora.watch`.
        sites: with two trees, how a function reads its weights, as for `jlora.adapterize`: needed for leaves of three axes.
        top: how many singular vectors of each tuned matrix are looked at; all, where a matrix has fewer.
        threshold: the authors' epsilon.
        side: "out" compares singular vectors of the output side, as the authors do; "in" of the input side.
        known: what this function found earlier for the same pretrained weights and side, whose singular vectors are used again,
            as where intruders are counted over a training.

    Singular values are taken in float32 at least, of a base in another form of its decoded weights.

    Raises:
        ValueError: for an `Adapted` without a matrix or with a method that is no weight, trees of other shapes, values that are
            not finite, or numbers out of range.
        TypeError: for an `Adapted` together with a second tree, or one tree alone.

    Example:
        >>> adapted = jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.LoRA(rank=2, init="random")})
        >>> found = jlora.intruder_dimensions(adapted)
        >>> print(found.count, found.counts)

    Reference:
        Shuttleworth et al. 2024, arXiv:2410.21228.
    """
    if side not in SIDES:
        raise ValueError(f"side must be one of {SIDES}, got {side!r}")
    if type(top) is not int or top < 1 or not 0 < threshold <= 1:
        raise ValueError(
            f"top must be a positive whole number and threshold above 0 and at most 1, got {top!r}, {threshold!r}"
        )
    if known is not None and known.side != side:
        raise ValueError(f"known is of the {known.side} side, and {side!r} is asked for")
    found = {}
    for site, w0, w1 in _pairs(before, after, patterns, sites):
        old = None if known is None else known.leaves.get(site.path)
        vectors = None if old is None else jnp.asarray(old.pretrained)
        cosines, values, pretrained = jax.device_get(_compared(w0, w1, vectors, min(top, *w0.shape[-2:]), side))
        if not np.isfinite(cosines).all():
            raise ValueError(f"{site.path}: a weight has values that are not finite, and so no singular vectors")
        most = cosines.max(-1)
        found[site.path] = LeafIntruders(most, values, most < threshold, cosines, pretrained)
    return Intruders(found, top, float(threshold), side)


def without_intruders(
    before: Any,
    found: Intruders,
    after: Any = None,
    patterns: Any = ALL_LINEAR,
    sites: Sites | None = None,
    *,
    keep: float = 0.75,
) -> Any:
    """The tuned params with intruder dimensions scaled away: `w1 + (keep - 1) * Σ_j τ_j y_j z_jᵀ` over the intruders `j`.

    The authors find that this brings back what the model knew before, at little cost for the task.

    Args:
        before, after, patterns, sites: as `intruder_dimensions` got them.
        found: what it found.
        keep: the share of each intruder that stays: 1 changes nothing, 0 takes it out. (The formula of the authors' code and of
            PEFT's, whose words call it the share that is taken.)

    Returns:
        Params of the structure and dtypes of the tuned (of an `Adapted`: as `jlora.merge` gives them), on which the function
        runs as it is. Leaves that have no intruder are the very same.

    Raises:
        ValueError: for leaves that were not looked at, or whose weights have changed since.
        TypeError: as for `intruder_dimensions`.

    Example:
        >>> adapted = jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.LoRA(rank=2, init="random")})
        >>> tuned = jlora.without_intruders(adapted, jlora.intruder_dimensions(adapted), keep=0.5)

    Reference:
        Shuttleworth et al. 2024, arXiv:2410.21228.
    """
    if not math.isfinite(keep):
        raise ValueError(f"keep must be a finite number, such as 0.75, got {keep}")
    tuned, new = merge(before) if isinstance(before, Adapted) else after, {}
    leaves = dict(paths.flatten_with_keys(tuned)[0])
    for site, _, w1 in _pairs(before, after, patterns, sites):
        if site.path not in found.leaves:
            raise ValueError(
                f"{site.path}: intruder_dimensions has not looked at this leaf; call it with the same weights"
            )
        here = found.leaves[site.path]
        scaled, values = jax.device_get(_scaled(w1, jnp.asarray(here.intruders), keep))
        if not np.allclose(values[..., : here.values.shape[-1]], here.values, rtol=1e-3, atol=1e-6):
            raise ValueError(f"{site.path}: the weight is another than the one in which intruders were found")
        if here.intruders.any():
            leaf = leaves[site.keys]
            new[site.keys] = site.unfold(jnp.asarray(scaled)).astype(leaf.dtype)
    flat, treedef = paths.flatten_with_keys(tuned)
    return jax.tree.unflatten(treedef, [new.get(keys, leaf) for keys, leaf in flat])


def _pairs(before: Any, after: Any, patterns: Any, sites: Sites | None) -> list[tuple[Site, jax.Array, jax.Array]]:
    """The matrices that are compared, `[*batch, in, out]`."""
    if isinstance(before, Adapted):
        if after is not None:
            raise TypeError("an Adapted has both weights, base and merged: leave the second tree away")
        first, tuned = before, merge(before)
    elif after is None:
        raise TypeError("intruders are found between two weights: pass an Adapted, or pretrained params and tuned ones")
    else:
        first, tuned = watch(before, patterns, sites), after
    chosen = [site for site in first.plan.sites if site.method.matrix]
    if not chosen:
        raise ValueError("nothing here is an adapted matrix, whose singular vectors could be compared")
    old, new = dict(paths.flatten_with_keys(first.base)[0]), dict(paths.flatten_with_keys(tuned)[0])
    pairs = []
    for site in chosen:
        leaves = [_array(tree.get(site.keys)) for tree in (old, new)]
        shapes = [getattr(leaf, "shape", None) for leaf in leaves]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{site.path}: the pretrained weight has shape {shapes[0]}, the tuned one {shapes[1]}")
        pairs.append((site, *(site.fold(leaf) for leaf in leaves)))
    return pairs


def _array(leaf: Any) -> Any:
    return leaf if leaf is None else jnp.asarray(decoded(leaf))


def _wide(w: jax.Array) -> jax.Array:
    return w.astype(jnp.promote_types(w.dtype, jnp.float32))


@jax.jit
def _vectors(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Singular vectors of the output side as rows, and singular values."""
    _, values, vectors = jnp.linalg.svd(_wide(w), full_matrices=False)
    return vectors, values


def _compared(w0: jax.Array, w1: jax.Array, known: jax.Array | None, count: int, side: str) -> Any:
    """`|cos|` `[*batch, count, all]`, the tuned singular values `[*batch, count]`, and the pretrained vectors."""
    if side == "in":
        w0, w1 = jnp.matrix_transpose(w0), jnp.matrix_transpose(w1)
    pretrained = _vectors(w0)[0] if known is None else known
    vectors, values = _vectors(w1)
    cosines = jnp.einsum("...jo,...io->...ji", vectors[..., :count, :], pretrained, precision="highest")
    return jnp.abs(cosines), values[..., :count], pretrained


@jax.jit
def _scaled(w: jax.Array, intruders: jax.Array, keep: float) -> tuple[jax.Array, jax.Array]:
    """`w + (keep - 1) * Σ τ_j y_j z_jᵀ` over the intruders, and the singular values."""
    u, values, vectors = jnp.linalg.svd(_wide(w), full_matrices=False)
    count = intruders.shape[-1]
    taken = (keep - 1) * jnp.where(intruders, values[..., :count], 0)
    part = jnp.einsum("...ij,...j,...jo->...io", u[..., :count], taken, vectors[..., :count, :], precision="highest")
    return _wide(w) + part, values
