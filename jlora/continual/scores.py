"""`TaskScores`: what a model knows of each task after each task, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TaskScores:
    """Scores `r[t, i]` on task `i` after training on task `t`, `[tasks, tasks]`; NaN where nothing was measured.

    Only scores on tasks that were trained on (`i <= t`) are wanted; those above the diagonal count for `forward_transfer`
    alone.

    Args:
        table: the scores, higher is better.

    Raises:
        ValueError: for another shape than a square, or a score on a trained task that is no number.

    Example:
        >>> scores = jlora.TaskScores([[0.9, float("nan")], [0.7, 0.8]])
        >>> round(scores.average, 3), round(scores.forgetting, 3)
        (0.75, 0.2)

    Reference:
        Average and transfers: Lopez-Paz and Ranzato 2017, arXiv:1706.08840; forgetting: Chaudhry et al. 2018, arXiv:1801.10112,
        with the last row among the maximum's, as SD-LoRA's and Online-LoRA's evaluations have it.
    """

    table: np.ndarray

    def __post_init__(self) -> None:
        table = np.array(self.table, np.float64)
        if table.ndim != 2 or table.shape[0] != table.shape[1] or not len(table):
            raise ValueError(f"TaskScores needs one row and one column for each task, got shape {table.shape}")
        if missing := [(int(t), int(i)) for t, i in np.argwhere(~np.isfinite(table)) if i <= t]:
            raise ValueError(
                f"TaskScores lacks the score on task {missing[0][1]} after task {missing[0][0]}, which was trained by then"
            )
        object.__setattr__(self, "table", table)

    @property
    def average(self) -> float:
        """The mean over tasks after the last one."""
        return float(np.mean(self.table[-1]))

    @property
    def anytime_average(self) -> float:
        """The mean over all times of the mean over the tasks so far."""
        return float(np.mean([np.mean(row[: t + 1]) for t, row in enumerate(self.table)]))

    @property
    def forgetting(self) -> float:
        """The mean over all tasks but the last of what was lost since the best; 0 for one task."""
        seen = np.where(np.tri(len(self.table), dtype=bool), self.table, -np.inf)
        return float(np.mean((seen.max(0) - self.table[-1])[:-1])) if len(self.table) > 1 else 0.0

    @property
    def backward_transfer(self) -> float:
        """The mean over all tasks but the last of what changed since it was trained; 0 for one task."""
        return float(np.mean((self.table[-1] - np.diag(self.table))[:-1])) if len(self.table) > 1 else 0.0

    def forward_transfer(self, untrained: np.ndarray) -> float:
        """The mean over all tasks but the first of the score before it is trained, above the untrained model's.

        Args:
            untrained: scores of the untrained model, `[tasks]`.

        Raises:
            ValueError: for one task, or where a score before training is no number.
        """
        before = np.diag(self.table, 1)
        if not len(before) or not np.isfinite(before).all():
            raise ValueError(
                "forward_transfer needs the scores on each task before it is trained, of two tasks or more"
            )
        return float(np.mean(before - np.asarray(untrained, np.float64)[1:]))
