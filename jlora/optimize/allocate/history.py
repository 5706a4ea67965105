"""The number of ranks of each module over a run: how the optimizer's state holds it, and its plot."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

#: Rows of a history, spread evenly over the run.
ROWS = 128


class History(NamedTuple):
    """The number of ranks in use at some steps of a run.

    Attributes:
        steps: int32 `[rows]`, rising, the first 0 and the last that of the run.
        ranks: int32 `[rows, modules]`; rows of steps to come are 0.
    """

    steps: jax.Array
    ranks: jax.Array


def empty(steps: int, modules: int) -> History:
    """The history of a run of `steps` steps before it starts."""
    rows = np.unique(np.round(np.linspace(0, steps, min(ROWS, steps + 1))))
    return History(jnp.asarray(rows, jnp.int32), jnp.zeros((len(rows), modules), jnp.int32))


def recorded(history: History, step: jax.Array | int, ranks: jax.Array) -> History:
    """The history with a step's ranks `[modules]`, if it has a row for that step."""
    here = (history.steps == step)[:, None]
    return history._replace(ranks=jnp.where(here, ranks[None, :], history.ranks))


@dataclass(frozen=True)
class RankHistory:
    """The ranks of every module over a run, by `jlora.rank_history`.

    Attributes:
        steps: `[rows]`, the steps that are recorded, 0 (the start) first.
        names: of the modules: a leaf's path, with the index of the matrix where the leaf is a stack.
        ranks: `[rows, modules]`.
    """

    steps: np.ndarray
    names: tuple[str, ...]
    ranks: np.ndarray

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Writes a heat map, modules by time, to a PNG, PDF or SVG file.

        Raises:
            ImportError: where matplotlib is not installed.
            OSError: if the file can't be written.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("the plot of a rank history needs matplotlib: pip install matplotlib") from error
        count = len(self.names)
        figure = Figure(figsize=(9, min(2 + 0.18 * count, 40)), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        image = axes.pcolormesh(_edges(self.steps), np.arange(count + 1), self.ranks.T, cmap="viridis", vmin=0)
        axes.set_yticks(np.arange(count) + 0.5, self.names, fontsize=6)
        axes.invert_yaxis()
        axes.set_xlabel("step")
        figure.colorbar(image, ax=axes, label="rank")
        path = Path(path)
        part = path.with_name(f".{path.name}.part")
        figure.savefig(part, format=path.suffix.removeprefix(".") or "png")
        os.replace(part, path)


def _edges(steps: np.ndarray) -> np.ndarray:
    """Borders of the rows' cells: each row holds until the next."""
    last = steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)
    return np.append(steps, last)


def complete_rows(steps: Any, ranks: Any, step: Any) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a history that a run has reached, on the host."""
    steps, ranks = np.asarray(jax.device_get(steps)), np.asarray(jax.device_get(ranks))
    reached = steps <= int(step)
    return steps[reached], ranks[reached]
