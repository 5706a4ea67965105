"""The metrics that a validation can be judged by, by name: which tasks have them, and which way is better."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Scored:
    """A metric of a validation.

    Attributes:
        higher: whether more of it is better.
        tasks: the tasks that have it; empty for all.
        written: whether the model writes answers for it.
    """

    higher: bool
    tasks: tuple[str, ...] = ()
    written: bool = False


METRICS = {
    "loss": Scored(higher=False),
    "perplexity": Scored(higher=False, tasks=("lm",)),
    "accuracy": Scored(higher=True, tasks=("classify", "preference")),
    "f1": Scored(higher=True, tasks=("classify",)),
    "matthews": Scored(higher=True, tasks=("classify",)),
    "exact_match": Scored(higher=True, tasks=("lm",), written=True),
    "rouge_l": Scored(higher=True, tasks=("lm",), written=True),
}


def of_task(task: str) -> list[str]:
    """The names of the metrics that a task has."""
    return [name for name, metric in METRICS.items() if not metric.tasks or task in metric.tasks]


def is_better(metric: str, new: float, old: float) -> bool:
    """Whether one value of a metric is better than another: strictly, so that the first of equal ones stays."""
    return new > old if METRICS[metric].higher else new < old
