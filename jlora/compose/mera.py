"""MerA: several bottleneck adapters as one, their hidden neurons matched by optimal transport."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from jlora import paths
from jlora.compose.combine import check_one_base
from jlora.core.protocol.method import Arrays, Site
from jlora.core.tree.adapted import Adapted
from jlora.methods.bottleneck import Bottleneck

MATCHINGS = ("exact", "sinkhorn")


def mera(
    adapters: Sequence[Adapted], *, matching: str = "exact", entropy: float = 0.05, iterations: int = 200
) -> Adapted:
    """MerA: merges bottleneck adapters into one of the same width, to be trained on from there.

    The order of a network's hidden neurons means nothing, so those of every other adapter are first matched with the first
    one's. Neuron `i` has the feature `f_i = [d[:, i] | u[i, :]]`, the cost of a match is `C_ij = |f_i - g_j|²`, and `m` is
    `rank` times the transport plan of least cost between uniform weights. Merged are `d`, the mean of `d_k m_kᵀ`, and `u`, the
    mean of `m_k u_k`.

    Args:
        adapters: on equal bases, with the same `Bottleneck` at the same leaves, and nothing else.
        matching: "exact" makes each neuron the partner of one; "sinkhorn" takes the plan that entropy smooths.
        entropy: factor of the mean cost in the smoothing of "sinkhorn".
        iterations: of "sinkhorn", each over rows and columns.

    Returns:
        The adapter; a learned scale is multiplied into `u` and begins at 1 again.

    Raises:
        ValueError: for no adapter, other leaves or methods in one of them, different bases, and options out of range.

    Example:
        >>> spec = {".*/q_proj/kernel": jlora.Bottleneck(rank=4, init="normal")}
        >>> one, two = (jlora.adapterize(params, spec, jax.random.key(seed)) for seed in range(2))
        >>> merged = jlora.mera([one, two])

    Reference:
        He et al. 2023, arXiv:2308.15982, of which no code is known; the matching is that of Singh and Jaggi 2020 (OTFusion),
        arXiv:1910.05653, by the weights.
    """
    if not adapters or not entropy > 0 or iterations < 1:
        raise ValueError(
            f"wanted adapters, entropy and iterations above 0, got {len(adapters)}, {entropy} and {iterations}"
        )
    if matching not in MATCHINGS:
        raise ValueError(f"matching must be one of {MATCHINGS}, got {matching!r}")
    check_one_base(adapters)
    match = _exact if matching == "exact" else jax.jit(lambda cost: _sinkhorn(cost, entropy, iterations))
    params: dict[str, Any] = {}
    for site in _sites(adapters):
        paths.insert(params, site.keys, _merged([_network(adapted, site) for adapted in adapters], match))
    return adapters[0].replace(params=params, context={})


def _sites(adapters: Sequence[Adapted]) -> tuple[Site, ...]:
    """The leaves that all adapters have in common.

    Raises:
        ValueError: where one has others, or another method on one.
    """
    plans = [{site.path: site for site in adapted.plan.sites} for adapted in adapters]
    for order, plan in enumerate(plans):
        if odd := sorted(plan.keys() ^ plans[0].keys()):
            raise ValueError(
                f"{odd[0]}: of adapters 0 and {order} only one adapts it; MerA merges those of equal leaves"
            )
        for path, site in plan.items():
            if not isinstance(site.method, Bottleneck):
                raise ValueError(
                    f"{path}: {site.method} is no Bottleneck; MerA merges nothing else (see jlora.combine)"
                )
            if site != plans[0][path]:
                raise ValueError(
                    f"{path}: adapters 0 and {order} differ there: {plans[0][path].method} and {site.method}"
                )
    return adapters[0].plan.sites


def _network(adapted: Adapted, site: Site) -> Arrays:
    """`d [*batch, ., rank]` and `u [*batch, rank, .]`, a learned scale in `u`."""
    fields = paths.lookup(adapted.params, site.keys)
    scale = fields["scale"][..., None, None] if "scale" in fields else 1
    return {"d": fields["d"], "u": fields["u"] * scale} | ({"scale": fields["scale"]} if "scale" in fields else {})


def _merged(networks: Sequence[Arrays], match: Callable[[jax.Array], jax.Array]) -> Arrays:
    features = [jnp.concatenate([each["d"].mT, each["u"]], axis=-1) for each in networks]
    d, u = networks[0]["d"], networks[0]["u"]
    for other, network in zip(features[1:], networks[1:]):
        matches = match(jnp.sum((features[0][..., :, None, :] - other[..., None, :, :]) ** 2, axis=-1))
        d, u = d + network["d"] @ matches.mT, u + matches @ network["u"]
    merged = {"d": d / len(networks), "u": u / len(networks)}
    return merged | ({"scale": jnp.ones_like(networks[0]["scale"])} if "scale" in networks[0] else {})


def _exact(cost: jax.Array) -> jax.Array:
    """The permutation of least cost, of each of `cost [*batch, rank, rank]`."""
    found = np.zeros(cost.shape, cost.dtype)
    for index in np.ndindex(*cost.shape[:-2]):
        found[index][linear_sum_assignment(np.asarray(cost[index]))] = 1
    return jnp.asarray(found)


def _sinkhorn(cost: jax.Array, entropy: float, iterations: int) -> jax.Array:
    """`rank * plan` of the entropic transport problem, with rows and columns that sum to 1 (Cuturi 2013)."""
    kernel = -cost / (entropy * jnp.mean(cost, axis=(-2, -1), keepdims=True))

    def step(_: int, potential: jax.Array) -> jax.Array:
        rows = -jax.nn.logsumexp(kernel + potential, axis=-1, keepdims=True)
        return -jax.nn.logsumexp(kernel + rows, axis=-2, keepdims=True)

    columns = jax.lax.fori_loop(0, iterations, step, jnp.zeros_like(kernel[..., :1, :]))
    return jax.nn.softmax(kernel + columns, axis=-1)
