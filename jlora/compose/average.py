"""The mean of several adapters, by what they add to the weight and not by their factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora import paths
from jlora.compose.plain import exact
from jlora.core.protocol.method import Arrays, Method, Site
from jlora.core.tree import placement
from jlora.core.tree.adapted import Adapted, Plan
from jlora.core.walk.weight import Weight
from jlora.disk.fingerprint import fingerprint
from jlora.methods.full import Full
from jlora.methods.lora import LoRA

# Singular values below this part of the largest are rounding errors of factors in float32.
_NOTHING = 1e-6


def average(adapters: Sequence[Adapted], weights: Sequence[float] | None = None, *, rank: int | None = None) -> Adapted:
    """The mean of adapters of one base, `w + sum of p_i * a_i @ b_i`, as plain `LoRA`: federated averaging.

    The mean of the factors is another thing: `mean(a) @ mean(b)` is not `mean(a @ b)`. Here the factors are laid side by side,
    `[p_1 a_1, p_2 a_2, ...] @ [b_1; b_2; ...]`, which is the mean itself, of the sum of the ranks. Ranks, scales and methods
    may differ; the result has the dropout of the first adapter, and its scale, if that is LoRA's, else 1. Leaves that `Full`
    trains get the mean of their values.

    With `rank` the mean is cut to the nearest product of that rank: QR of both factors, and a singular value decomposition of
    the small product between them, on the host in float64. `a` and `b` share the singular values evenly. A rank that the mean
    does not need has a column of unit length in `a` and zeros in `b`, as LoRA starts: it can be trained further.

    Args:
        adapters: of one base, with the same adapted leaves.
        weights: of each, such as its number of examples; they are divided by their sum. By default all are equal.
        rank: of the result, at most; by default the sum of the ranks.

    Returns:
        An `Adapted` on the base of the first one, without a context.

    Raises:
        ValueError: for no adapters, weights of another number or not positive, a rank that is not positive; leaves that one of
            them lacks or reads otherwise; a method that is no product of factors, such as DoRA or IA3, or changes a bias too;
            bases of other values (where they are arrays), by fingerprint.
        TypeError: with `rank` under `jit`.

    Example:
        >>> clients = [jlora.adapterize(params, {r".*/q_proj/kernel": jlora.LoRA(rank)}) for rank in (2, 4)]
        >>> merged = jlora.merge(jlora.average(clients, weights=[1000, 250], rank=4))

    Reference:
        FedAvg: McMahan et al. 2017, arXiv:1602.05629; by stacked factors: FLoRA, Wang et al. 2024, arXiv:2409.05976; by
        decomposition: FlexLoRA, Bai et al. 2024, arXiv:2402.11505; why not by factors: FedEx-LoRA, Singhal et al. 2024,
        arXiv:2410.09432.
    """
    shares = _shares(adapters, weights)
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"average's rank must be a positive whole number or None, got {rank!r}")
    first = adapters[0]
    _check_bases(adapters)
    members = [{weight.name: weight for weight in adapted.weights()} for adapted in adapters]
    _check_leaves(members)
    leaves = dict(paths.flatten_with_keys(first.base)[0])
    params: dict[str, Any] = {}
    sites = []
    for site in first.plan.sites:
        method, fields = _mean([each[site.path] for each in members], shares, rank)
        sites.append(replace(site, method=method, beside=()))
        paths.insert(params, site.keys, _placed(sites[-1], leaves[site.keys], fields))
    return Adapted(first.base, params, {}, {}, Plan(tuple(sites)))


def _shares(adapters: Sequence[Adapted], weights: Sequence[float] | None) -> list[float]:
    """The weights, divided by their sum."""
    given = [1.0] * len(adapters) if weights is None else list(weights)
    if not adapters or len(given) != len(adapters):
        raise ValueError(f"average takes adapters and a weight for each, got {len(adapters)} and {len(given)}")
    if not all(0 < weight < float("inf") for weight in given):
        raise ValueError(f"average's weights must be positive numbers, got {given}")
    return [float(weight) / sum(given) for weight in given]


def _check_bases(adapters: Sequence[Adapted]) -> None:
    """Refuses bases of other values; what is traced has none."""
    first = adapters[0].base
    for number, adapted in enumerate(adapters[1:], 2):
        leaves, others = (jax.tree.leaves(tree) for tree in (first, adapted.base))
        if len(leaves) == len(others) and all(one is other for one, other in zip(leaves, others)):
            continue
        if any(isinstance(leaf, Tracer | jax.ShapeDtypeStruct) for leaf in (*leaves, *others)):
            continue
        if (one := fingerprint(first)) != (other := fingerprint(adapted.base)):
            raise ValueError(
                f"average: adapter {number} was made on another base than adapter 1: fingerprint {other}, not {one}"
            )


def _check_leaves(members: list[dict[str, Weight]]) -> None:
    """Refuses adapters of other leaves, or that read one otherwise."""

    def bare(weight: Weight) -> Site:
        assert weight.site is not None
        return replace(weight.site, method=Method(), beside=(), kind="")

    for number, each in enumerate(members[1:], 2):
        for name in sorted(members[0].keys() ^ each.keys()):
            raise ValueError(
                f"{name} is adapted by {1 if name in members[0] else number} and not by both of 1 and {number}"
            )
        for name, weight in members[0].items():
            if bare(weight) != bare(each[name]):
                raise ValueError(
                    f"{name}: adapters 1 and {number} read it differently, {bare(weight)} and {bare(each[name])}"
                )


def _mean(members: list[Weight], shares: list[float], rank: int | None) -> tuple[Method, Arrays]:
    """The method and the trained arrays of a leaf's mean."""
    if all(isinstance(weight.method, Full) for weight in members):
        terms = [share * weight.params["w"] for share, weight in zip(shares, members)]
        return members[0].method, {"w": sum(terms[1:], terms[0])}
    plain = [_plain(weight) for weight in members]
    wide = jnp.float32
    a = jnp.concatenate([share * each.params["a"].astype(wide) for share, each in zip(shares, plain)], -1)
    b = jnp.concatenate([each.params["b"].astype(wide) for each in plain], -2)
    if rank is not None and rank < a.shape[-1]:
        a, b = _cut(members[0].name, a, b, rank)
    size, first, lora = a.shape[-1], members[0].method, plain[0].method
    assert isinstance(lora, LoRA)
    scale = first.scale if type(first) is LoRA else 1.0
    return LoRA(size, scale * size, dropout=lora.dropout), {"a": a, "b": b / scale}


def _plain(weight: Weight) -> Weight:
    """The leaf as LoRA of scale 1.

    Raises:
        ValueError: for a method that is no product of factors.
    """
    found = None if weight.beside else exact(weight)
    if found is None or type(found.method) is not LoRA:
        raise ValueError(
            f"{weight.name}: {weight.method} is no product of factors, of which a mean could be taken; average what is LoRA, "
            "or the merged params"
        )
    return found


def _cut(name: str, a: jax.Array, b: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The factors `[*batch, in, rank]` and `[*batch, rank, out]` whose product is nearest to `a @ b` (Eckart and Young)."""
    if isinstance(a, Tracer):
        raise TypeError(f"{name}: average cuts to a rank on the host: call it outside of jit")
    left, right = (np.asarray(placement.complete(each), np.float64) for each in (a, b))
    qa, ra = np.linalg.qr(left)
    qb, rb = np.linalg.qr(np.swapaxes(right, -1, -2))
    u, s, v = np.linalg.svd(ra @ np.swapaxes(rb, -1, -2), full_matrices=False)
    u, s, v = u[..., :rank], s[..., :rank], v[..., :rank, :]
    used = s > _NOTHING * np.max(s, axis=-1, keepdims=True)
    root = np.sqrt(np.where(used, s, 1.0))
    a = jnp.asarray((qa @ u) * root[..., None, :], a.dtype)
    return a, jnp.asarray((np.where(used, root, 0.0)[..., :, None] * v) @ np.swapaxes(qb, -1, -2), b.dtype)


def _placed(site: Site, leaf: Any, fields: Arrays) -> Arrays:
    """The arrays where the method's own would lie beside the base's leaf."""
    if any(isinstance(array, Tracer) for array in fields.values()):
        return fields
    shardings = placement.field_shardings(site, leaf)
    return fields if shardings is None else {name: jax.device_put(x, shardings[name]) for name, x in fields.items()}
