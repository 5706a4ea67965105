"""Hyperparameters that are measured on the training data before the run, such as GeLoRA's ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import jlora
from jlora.core.protocol.wrapping import innermost, with_innermost
from jlora.training.data.dataset import Data
from jlora.training.data.pipeline import collate, padded_length
from jlora.training.model.loop import to_devices
from jlora.training.model.preferences import flat
from jlora.training.model.subject import Subject
from jlora.training.settings.fields import Settings

# Rows of the training data whose hidden states are looked at: TwoNN wants hundreds of points, and the run waits for them.
_ROWS = 512


@dataclasses.dataclass(frozen=True)
class _Found:
    """What a method may ask of the training data (`jlora.core.protocol.job.Calibration`).

    A row's point is the mean over its tokens, without padding.
    """

    budget: int | None
    sites: tuple[jlora.Site, ...]
    look: Any

    def dimensions(self) -> Sequence[float]:
        return self.look()


def with_measured(
    spec: dict[Any, Any],
    subject: Subject,
    settings: Settings,
    sites: jlora.Sites,
    data: Data,
    mesh: Mesh,
    known: dict[str, Any],
) -> dict[Any, Any]:
    """The spec with the hyperparameters found that methods take from data, where the user does not give them.

    The method of `--method` is told `--rank`, to keep to it; one of a `[spec]` table is told none. A resumed run has those
    that it began with (`known`, from `measured_of`): measured again, on another machine or mesh, they might come out
    otherwise.
    """
    for method in dict.fromkeys(each for each in spec.values() if each is not None and _is_open(each, settings)):
        own = {pattern: each if each == method else None for pattern, each in spec.items()}
        inner, watched = innermost(method), jlora.watch(subject.params, own, sites).plan.sites
        path = watched[0].path
        if path in known:
            value = known[path]
            inner = dataclasses.replace(inner, **{inner.measured: tuple(value) if isinstance(value, list) else value})
        else:

            def look(own: Any = own) -> Sequence[float]:
                batches = _batches(data, settings, mesh)
                options: Any = {"pooling": _mean_of_tokens, "count": _ROWS}
                found = jlora.intrinsic_dimensions(subject.forward, subject.params, own, batches, sites, **options)
                return found.tolist()

            inner = inner.found(_Found(None if settings.spec else settings.rank, watched, look))
        new = with_innermost(method, inner)
        spec = {pattern: new if each == method else each for pattern, each in spec.items()}
    return spec


def _is_open(method: jlora.Method, settings: Settings) -> bool:
    """Whether a method's hyperparameter is still to be measured: no table, and no `--set`, gives it."""
    inner = innermost(method)
    if not inner.measured:
        return False
    return getattr(inner, inner.measured) is None if settings.spec else inner.measured not in settings.set


def measured_of(adapted: jlora.Adapted) -> dict[str, Any]:
    """The measured hyperparameters by the path of each leaf, for the settings that a run is resumed with."""
    methods = {site.path: innermost(site.method) for site in adapted.plan.sites}
    return {path: getattr(method, method.measured) for path, method in methods.items() if method.measured}


def _batches(data: Data, settings: Settings, mesh: Mesh) -> Any:
    """Rows of the training data drawn by the seed, in whole batches of one shape."""
    assert settings.batch is not None
    rows = settings.batch // settings.accumulate
    order = np.random.default_rng(settings.seed).permutation(len(data.train))[: max(_ROWS // rows, 1) * rows]
    chosen = [data.train[index] for index in order]
    length = data.longest if data.fixed else padded_length(max(map(len, chosen)), data.longest)
    for start in range(0, len(chosen) // rows * rows, rows):
        yield flat(to_devices(collate(chosen[start : start + rows], length), mesh))


def _mean_of_tokens(x: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    if x.ndim == 2:
        return x
    real = (batch["segment_ids"] > 0).astype(x.dtype)
    return jnp.einsum("rti,rt->ri", x, real) / jnp.maximum(real.sum(1), 1)[:, None]
