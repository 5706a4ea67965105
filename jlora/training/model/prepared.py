"""Starts that methods take from the training data, its gradients or its inputs: SHiRA's gradient masks, EVA."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

import jlora
from jlora.core.protocol.statistics import RESIDUAL
from jlora.core.protocol.wrapping import innermost
from jlora.training.data.dataset import Data
from jlora.training.model.loop import to_devices
from jlora.training.model.preferences import flat, objective_of
from jlora.training.model.subject import Subject, load_params
from jlora.training.settings.fields import Settings


def prepared(
    spec: dict[Any, Any],
    subject: Subject,
    settings: Settings,
    sites: jlora.Sites,
    data: Data,
    mesh: Mesh,
    key: jax.Array,
) -> jlora.Prepared | None:
    """The starts of the methods that need data, from the first batches of the run; None where none does.

    Each takes as many batches as its recipe says. A gradient is that of the mean loss of a batch, as in a step, taken in the
    parts of `--accumulate`; inputs are those of all tokens but padding, whether or not they are predicted. (A resumed run
    finds the same, and then reads what its checkpoint holds.)
    """
    needing = [method for method in spec.values() if method is not None and method.needs - {RESIDUAL}]
    starts = _residuals(spec, subject, settings, sites, key)
    for number in dict.fromkeys(_batches_of(method) for method in needing):
        own = {p: m if m in needing and _batches_of(m) == number else None for p, m in spec.items()}
        parts = _parts(settings, data, mesh, number)
        starts |= jlora.prepare(
            subject.params, own, _loss(subject, settings), parts, key, sites, mask=_no_padding
        ).starts
    return jlora.Prepared(starts) if starts else None


def _residuals(
    spec: dict[Any, Any], subject: Subject, settings: Settings, sites: jlora.Sites, key: jax.Array
) -> dict[Any, Any]:
    """The starts of the methods that take what the base lost by `--quantize`: LoftQ, of one step.

    The base stays what `--quantize` makes of it, so that whatever opens the run finds the same. Meanwhile the base is in
    memory as its files have it, too.
    """
    if not any(method is not None and RESIDUAL in method.needs for method in spec.values()):
        return {}
    plain = load_params(settings)
    originals = {"backbone": plain} if subject.labels else plain
    return jlora.residuals(originals, subject.params, spec, key, sites).starts


def _batches_of(method: jlora.Method) -> int:
    return innermost(method).recipe.batches


def _no_padding(part: tuple[dict[str, jax.Array], float]) -> jax.Array:
    """Which tokens of a part are none of padding."""
    return flat(part[0])["segment_ids"] > 0


def _loss(subject: Subject, settings: Settings) -> Any:
    """The mean loss of a part's share of its batch."""
    objective = objective_of(settings, subject.forward)

    def loss(params: Any, part: tuple[dict[str, jax.Array], float]) -> jax.Array:
        return objective(subject.forward, params, part[0]).loss / part[1]

    return loss


def _parts(settings: Settings, data: Data, mesh: Mesh, number: int) -> Any:
    """The parts of the first batches, each with the weight by which the mean over parts is that over batches."""
    assert settings.batch is not None
    count, batches = settings.accumulate, data.training_batches(settings.batch, settings.seed)
    rows = settings.batch // count
    for _ in range(number):
        batch = next(batches)
        weight = max(float(batch["weights"].sum()), 1.0) / count
        for start in range(0, settings.batch, rows):
            part = {name: array[start : start + rows] for name, array in batch.items()}
            yield to_devices(part, mesh), weight
