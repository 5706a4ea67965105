"""Ranks that are measured before the run: GeLoRA's, from the training data."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import jlora
from jlora.core.protocol.wrapping import innermost, with_innermost
from jlora.training.data import Data
from jlora.training.loop import to_devices
from jlora.training.pipeline import collate, padded_length
from jlora.training.settings import Settings
from jlora.training.subject import Subject

# Rows of the training data whose hidden states are looked at: TwoNN wants hundreds of points, and the run waits for them.
_ROWS = 512


def with_ranks(
    spec: dict[Any, Any],
    subject: Subject,
    settings: Settings,
    sites: jlora.Sites,
    data: Data,
    mesh: Mesh,
    known: dict[str, list[int]],
) -> dict[Any, Any]:
    """The spec with GeLoRA's ranks found: of `--method gelora` with the mean rank of `--rank`, of a table the paper's.

    A row's point is the mean over its tokens, without padding. A resumed run has the ranks that it began with (`known`,
    from `ranks_of`): measured again, on another machine or mesh, they might come out otherwise.
    """
    budget = settings.rank if settings.method == "gelora" and not settings.spec else None
    waiting = [method for method in spec.values() if isinstance(innermost(method), jlora.GeLoRA)]
    if budget is None:
        waiting = [method for method in waiting if innermost(method).ranks is None]
    for method in dict.fromkeys(waiting):
        own = {pattern: each if each == method else None for pattern, each in spec.items()}
        watched = jlora.watch(subject.params, own, sites)
        path = watched.plan.sites[0].path
        if path in known:
            ranks = tuple(known[path])
        else:
            batches = _batches(data, settings, mesh)
            found = jlora.intrinsic_dimensions(
                subject.forward, subject.params, own, batches, sites, pooling=_mean_of_tokens, count=_ROWS
            )
            most = min(min(site.in_size, site.out_size) for site in watched.plan.sites)
            ranks = jlora.gelora_ranks(found, budget, most)
        spec = {
            pattern: with_innermost(each, dataclasses.replace(innermost(each), ranks=ranks)) if each == method else each
            for pattern, each in spec.items()
        }
    return spec


def ranks_of(adapted: jlora.Adapted) -> dict[str, list[int]]:
    """GeLoRA's ranks by the path of each leaf, for the settings that a run is resumed with."""
    methods = {site.path: innermost(site.method) for site in adapted.plan.sites}
    return {p: list(m.ranks) for p, m in methods.items() if isinstance(m, jlora.GeLoRA) and isinstance(m.ranks, tuple)}


def _batches(data: Data, settings: Settings, mesh: Mesh) -> Any:
    """Rows of the training data drawn by the seed, in whole batches of one shape."""
    assert settings.batch is not None
    rows = settings.batch // settings.accumulate
    order = np.random.default_rng(settings.seed).permutation(len(data.train))[: max(_ROWS // rows, 1) * rows]
    chosen = [data.train[index] for index in order]
    length = data.longest if data.fixed else padded_length(max(map(len, chosen)), data.longest)
    for start in range(0, len(chosen) // rows * rows, rows):
        yield to_devices(collate(chosen[start : start + rows], length), mesh)


def _mean_of_tokens(x: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    if x.ndim == 2:
        return x
    real = (batch["segment_ids"] > 0).astype(x.dtype)
    return jnp.einsum("rti,rt->ri", x, real) / jnp.maximum(real.sum(1), 1)[:, None]
