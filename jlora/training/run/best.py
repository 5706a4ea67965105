"""Which validation of a run is the best one so far, and whether the run has waited long enough for a better one.

Both follow from the lines of `metrics.jsonl` alone, which a resumed run has as they were at its checkpoint: so it waits as
long as an unbroken one.
"""

from __future__ import annotations

from collections.abc import Sequence

from jlora.training.reporting.metrics import Record
from jlora.training.settings.scored import is_better


def best_of(validation: Sequence[Record], metric: str) -> Record | None:
    """The best validation after some step of training, the first of equal ones; None before there is one."""
    best: Record | None = None
    for record in validation:
        if record["step"] > 0 and (best is None or is_better(metric, record[metric], best[metric])):
            best = record
    return best


def waited(validation: Sequence[Record], metric: str) -> int:
    """How many validations there were since the best one."""
    best = best_of(validation, metric)
    return 0 if best is None else sum(record["step"] > best["step"] for record in validation)
