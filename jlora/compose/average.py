"""The mean of several adapters, by what they add to the weight and not by their factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jlora import paths
from jlora.compose.combine import combine
from jlora.core.tree.adapted import Adapted, Plan
from jlora.methods.lora import LoRA


def average(adapters: Sequence[Adapted], weights: Sequence[float] | None = None, *, rank: int | None = None) -> Adapted:
    """The mean of adapters of one base, `w + sum of p_i * delta_i`, as plain `LoRA`: federated averaging.

    The mean of the factors is another thing: `mean(a) @ mean(b)` is not `mean(a @ b)`. This is `combine` with weights whose
    sum is 1: the factors side by side, which is the mean itself, of the sum of the ranks; or with `rank` the nearest product
    of that rank. A leaf that one of them leaves alone counts as not changed by it. Leaves that `Full` trains get the mean of
    their values. The result can be trained further: it has the scale and dropout of the first adapter, where that is LoRA's,
    and a rank that the mean does not need has a column of unit length in `a` and zeros in `b`, as LoRA starts.

    Args:
        adapters: of one base.
        weights: of each, such as its number of examples; they are divided by their sum. By default all are equal.
        rank: of the result, at most; by default the sum of the ranks.

    Returns:
        An `Adapted` on the base of the first one, without a context.

    Raises:
        ValueError: for no adapters, weights of another number or not positive, and as `combine`.
        TypeError: for a method that has no factors, without `rank`, and as `combine`.

    Example:
        >>> clients = [jlora.adapterize(params, {r".*/q_proj/kernel": jlora.LoRA(rank)}) for rank in (2, 4)]
        >>> merged = jlora.merge(jlora.average(clients, weights=[1000, 250], rank=4))

    Reference:
        FedAvg: McMahan et al. 2017, arXiv:1602.05629; by stacked factors: FLoRA, Wang et al. 2024, arXiv:2409.05976; by
        decomposition: FlexLoRA, Bai et al. 2024, arXiv:2402.11505; why not by factors: FedEx-LoRA, Singhal et al. 2024,
        arXiv:2410.09432.
    """
    given = [1.0] * len(adapters) if weights is None else list(weights)
    if not adapters or len(given) != len(adapters):
        raise ValueError(f"average takes adapters and a weight for each, got {len(adapters)} and {len(given)}")
    if not all(0 < weight < float("inf") for weight in given):
        raise ValueError(f"average's weights must be positive numbers, got {given}")
    shares = [float(weight) / sum(given) for weight in given]
    mean = combine(adapters, shares, "cat") if rank is None else combine(adapters, shares, "svd", rank=rank)
    return _scaled_as(adapters[0], mean)


def _scaled_as(first: Adapted, mean: Adapted) -> Adapted:
    """The same adapter with the scale and dropout that the first one's LoRA has at a leaf."""
    methods = {site.keys: site.method for site in first.plan.sites}
    params: dict[str, Any] = {}
    sites = []
    for site in mean.plan.sites:
        fields, like = paths.lookup(mean.params, site.keys), methods.get(site.keys)
        if type(site.method) is LoRA and type(like) is LoRA:
            rank = site.method.rank
            site = replace(site, method=LoRA(rank, like.scale * rank, dropout=like.dropout))
            fields = {"a": fields["a"], "b": fields["b"] / like.scale}
        paths.insert(params, site.keys, fields)
        sites.append(site)
    return mean.replace(params=params, plan=Plan(tuple(sites)))
