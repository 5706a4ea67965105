"""Tied pairs: the update of one matrix is the transpose of that of another."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.protocol.hyperparameters import check_hyperparameters, check_rank, integer, one_of
from jlora.core.protocol.job import Recipe
from jlora.core.protocol.layers import layer_paths
from jlora.core.protocol.method import Arrays, Factors, Method, Site, Start, View
from jlora.methods.lora import SCALINGS, lora_scale, shared_dtype


@dataclass(frozen=True)
class TiedPair(Method):
    """LoRA whose factors two matrices share: `w1 + s * a @ b`, `w2 + s * (a @ b).T`.

    Of a pair `w1 [d, h]`, `w2 [h, d]` in one layer, such as the two of a feed-forward network, `a [d, rank]` and `b [rank, h]`
    serve both, so that half of LoRA's values are trained. `s = alpha / rank`, or `alpha / sqrt(rank)`. `a` starts as LoRA's,
    `b` at zero. Between oblong matrices the one with more outputs is `w1`; between square ones it is what `first` matches, or
    the first of the two.

    Trains `0` values a matrix. Shares `pairs * rank * (in + out)` trained values. Where pairs differ in size, all have room for
    the largest.

    Worth trying on feed-forward networks of two matrices. The paper ties the weights of networks that are trained from
    scratch; to tie updates of pretrained weights is jlora's, and nothing is known of how well it does.

    Args:
        rank: columns of `a`.
        alpha: numerator of the scale.
        scaling: "standard" or "rslora".
        first: a regex that matches the whole paths of the `w1`, given together with `second`. By default pairs are found by
            shape, where a layer has no more than two matrices of a shape and its transpose.
        second: a regex that matches the whole paths of the `w2`.
        unpaired: whether a matrix may be without a partner; it then has factors of its own, as in LoRA.
        dropout: probability of dropping an entry of the input of the adapter's path, where a key is given.

    Raises:
        ValueError: for a hyperparameter out of range, or a regex that is none; for a matrix with no partner, or with several.

    Example:
        >>> spec = {r".*/(up|down)_proj/kernel": jlora.TiedPair(rank=8)}

    Reference:
        The tie of row and column spaces is that of arXiv:2401.16438 (2024).
    """

    rank: int = 8
    alpha: float = 8.0
    scaling: str = "standard"
    first: str | None = None
    second: str | None = None
    unpaired: bool = False
    dropout: float = 0.0

    family: ClassVar[str] = "Shared tensors"

    # The two matrices of a feed-forward block, without its gate.
    recipe: ClassVar[Recipe] = Recipe(
        targets=r".*/((up|down)_proj|intermediate/dense|(?<!attention/)output/dense)/kernel"
    )

    def __post_init__(self) -> None:
        bounds = {"rank": integer(1, "a positive integer"), "scaling": one_of(SCALINGS)}
        check_hyperparameters(self, bounds=bounds, of=TiedPair, regexes=("first", "second"))
        if (self.first is None) != (self.second is None):
            raise ValueError(f"TiedPair takes first and second together, got {self.first!r} and {self.second!r}")

    @property
    def scale(self) -> float:
        """`s`."""
        return lora_scale(self.alpha, self.rank, self.scaling)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Those of two numbers: of the matrix's pair, and whether it is the second of a square one."""
        return {"pair": (), "turned": ()}

    @property
    def uses_key(self) -> bool:
        return self.dropout > 0

    @property
    def shared_fields(self) -> tuple[str, ...]:
        """The factors of all pairs, one behind another."""
        return ("a", "b")

    def check(self, site: Site) -> None:
        """Refuses a rank above the matrix's sides."""
        check_rank(self, site)

    def shared(self, key: jax.Array, sites: tuple[Site, ...]) -> Start:
        """`a [pairs, d, rank]`, uniform within `1 / sqrt(d)` of each pair's own `d`, and `b [pairs, rank, h]`."""
        pairs = _pairs(self, sites)
        dtype = shared_dtype(sites)
        sides = np.array([_sides(sites[pair[0][0]]) for pair in pairs])
        bounds = jnp.asarray(1 / np.sqrt(sides[:, 0]), dtype)[:, None, None]
        a = bounds * jax.random.uniform(key, (len(pairs), sides[:, 0].max(), self.rank), dtype, -1, 1)
        return Start({"a": a, "b": jnp.zeros((len(pairs), self.rank, sides[:, 1].max()), dtype)})

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """Nothing of its own but the numbers, which `together` fills in."""
        return Start({}, {name: jnp.zeros((), jnp.int32) for name in self.axes})

    def together(self, key: jax.Array, starts: list[Start], sites: tuple[Site, ...]) -> list[Start]:
        """The numbers of every matrix."""
        numbers = [{name: np.zeros(site.batch_shape, np.int32) for name in self.axes} for site in sites]
        for pair, members in enumerate(_pairs(self, sites)):
            for turned, (leaf, index) in enumerate(members):
                numbers[leaf]["pair"][index], numbers[leaf]["turned"][index] = pair, turned
        found = [{name: jnp.asarray(array) for name, array in each.items()} for each in numbers]
        return [replace(start, frozen=frozen) for start, frozen in zip(starts, found, strict=True)]

    def factors(self, view: View) -> Factors:
        """`a @ b`, or `b.T @ a.T`, for one matrix."""
        rows, columns = view.w.shape
        a = view.shared["a"][view.frozen["pair"]][: min(rows, columns)]
        b = view.shared["b"][view.frozen["pair"]][:, : max(rows, columns)]
        left, right = (b.T, a.T) if rows > columns else (a, b)
        if rows == columns:
            turned = view.frozen["turned"] == 1
            left, right = jnp.where(turned, b.T, a), jnp.where(turned, a.T, b)
        return Factors(left, self.scale * right, dropout=self.dropout)

    def weight(self, view: View) -> jax.Array:
        """`w + s * a @ b`, or its transpose for `w2`."""
        return self.factors(view).weight(view.w)

    def labels(self, site: Site) -> dict[str, str]:
        """None: a leaf trains nothing of its own."""
        return {}

    def shared_labels(self, trained: Arrays) -> dict[str, str]:
        """LoRA's."""
        return {"a": "a", "b": "b"}


#: One matrix: the number of its leaf, and its place in the leaf's stack.
Member = tuple[int, tuple[int, ...]]


def _sides(site: Site) -> tuple[int, int]:
    """The smaller and the larger side: `d` and `h`."""
    return min(site.in_size, site.out_size), max(site.in_size, site.out_size)


def _pairs(method: TiedPair, sites: Sequence[Site]) -> list[list[Member]]:
    """The pairs, in the order of the leaves: `w1` and `w2`, or a matrix alone.

    Raises:
        ValueError: for a matrix with no partner, or with several.
    """
    groups: dict[tuple, list[Member]] = {}
    for leaf, (site, layer) in enumerate(zip(sites, layer_paths(sites))):
        for index in np.ndindex(*site.batch_shape):
            groups.setdefault((layer, index, _sides(site)), []).append((leaf, index))
    return [pair for members in groups.values() for pair in _of_a_layer(method, sites, members)]


def _of_a_layer(method: TiedPair, sites: Sequence[Site], members: list[Member]) -> list[list[Member]]:
    """The pair among the matrices of a layer that have one shape or its transpose; those that are alone."""
    sides = [[member for member in members if _stands(method, sites, member, members, n)] for n in range(2)]
    names = ", ".join(f"{sites[leaf].path} [{sites[leaf].in_size}, {sites[leaf].out_size}]" for leaf, _ in members)
    if max(map(len, sides)) > 1 or (method.first is None and len(members) > len(sides[0]) + len(sides[1])):
        raise ValueError(
            f"{method} finds more than one pair among {names}: say by first and second which belong together"
        )
    (first, second) = sides
    if first and second and not _transposed(*(sites[pair[0][0]] for pair in sides)):
        raise ValueError(f"{method}: of {names} the first is not the transpose of the second in shape")
    paired = [*first, *second] if first and second else []
    alone = [member for member in members if member not in paired]
    if alone and not method.unpaired:
        site = sites[alone[0][0]]
        raise ValueError(
            f"{site.path}: TiedPair finds no matrix [{site.out_size}, {site.in_size}] in the same layer to tie this one of "
            f"[{site.in_size}, {site.out_size}] to; leave it out of the spec, or let it be alone by unpaired=True"
        )
    return [*([paired] if paired else []), *([member] for member in alone)]


def _stands(method: TiedPair, sites: Sequence[Site], member: Member, members: list[Member], place: int) -> bool:
    """Whether a matrix may stand first (place 0) or second (1) in a pair."""
    site, pattern = sites[member[0]], (method.first, method.second)[place]
    if pattern is not None:
        return re.fullmatch(pattern, site.path) is not None
    if site.in_size == site.out_size:
        return members.index(member) == place
    return (site.in_size > site.out_size) == bool(place)


def _transposed(first: Site, second: Site) -> bool:
    return (first.in_size, first.out_size) == (second.out_size, second.in_size)


TiedPair.CASES = (
    TiedPair(rank=4, first="heads|rows", second="output|columns", unpaired=True),
    TiedPair(2, 5, "rslora", "heads|manual_rows|u", "up|both|v", True, 0.25),
)
