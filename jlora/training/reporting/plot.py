"""The loss plot of a run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from jlora.training.reporting.metrics import Record

_TRAIN, _VALIDATION, _GRID = "#3b6ea5", "#c8553d", "#d9d9d9"
STYLE: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888"}


def loss_plot(train: Sequence[Record], validation: Sequence[Record]) -> bytes:
    """A PNG of training and validation loss over steps, with the accuracy beside it for classification.

    Args:
        train: records of kind `train`.
        validation: records of kind `validation`.
    """
    # Imported here: nothing but the end of a run needs it, and it takes most of a second.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    classify = "accuracy" in validation[0]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11 if classify else 8, 4.2), dpi=130, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots(1, 2 if classify else 1, squeeze=False)[0]
        _loss(axes[0], train, validation)
        if classify:
            _accuracy(axes[1], validation)
        content = io.BytesIO()
        canvas.print_png(content)
    return content.getvalue()


def curves_plot(runs: Sequence[tuple[str, Sequence[Record]]], metric: str) -> bytes:
    """A PNG of the training and validation losses of several runs over steps, and of their metric where that is another.

    Args:
        runs: name and records of each.
        metric: a metric of the validation.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = dict.fromkeys(("loss", metric))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2 * len(shown)), dpi=110, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots(len(shown), 2, squeeze=False)
        for row, name in zip(axes, shown):
            for kind, place in zip(("train", "validation"), row):
                _curves(place, runs, kind, name)
        axes[0][1].legend(frameon=False, fontsize=8)
        content = io.BytesIO()
        canvas.print_png(content)
    return content.getvalue()


def course_plot(train: Sequence[Record]) -> bytes:
    """A PNG of the learning rate, the gradient's norm and the speed over steps.

    Args:
        train: records of kind `train`.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = {"learning_rate": "learning rate", "gradient_norm": "gradient norm", "per_second": "predictions/s"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 2.6), dpi=110, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        for axes, (name, words) in zip(figure.subplots(1, 3), names.items()):
            axes.plot([r["step"] for r in train], [r[name] for r in train], color=_TRAIN, linewidth=1.2)
            finish_axes(axes, words)
        content = io.BytesIO()
        canvas.print_png(content)
    return content.getvalue()


def _curves(axes, runs: Sequence[tuple[str, Sequence[Record]]], kind: str, metric: str) -> None:
    drawn = False
    for number, (name, records) in enumerate(runs):
        points = [(r["step"], r[metric]) for r in records if r["kind"] == kind and metric in r]
        if points:
            steps, values = map(np.array, zip(*points))
            window = max(1, len(values) // 25) if kind == "train" else 1
            smooth = np.convolve(values, np.ones(window) / window, mode="valid")
            marker = "o" if kind == "validation" else None
            axes.plot(steps[window - 1 :], smooth, marker=marker, markersize=3, label=name, color=f"C{number % 10}")
            drawn = True
    if drawn:
        finish_axes(axes, f"{'training' if kind == 'train' else 'validation'} {metric}")
    else:
        axes.set_visible(False)


def _loss(axes, train: Sequence[Record], validation: Sequence[Record]) -> None:
    steps, losses = np.array([r["step"] for r in train]), np.array([r["loss"] for r in train])
    axes.plot(steps, losses, color=_TRAIN, alpha=0.3, linewidth=0.8, label="training, each step")
    window = max(1, len(losses) // 25)
    if window > 1:
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], smooth, color=_TRAIN, linewidth=1.8, label=f"training, mean of {window} steps")
    points = [r["step"] for r in validation], [r["loss"] for r in validation]
    axes.plot(*points, color=_VALIDATION, marker="o", markersize=5, linewidth=1.5, label="validation")
    _label(axes, points[0][0], points[1][0])
    _label(axes, points[0][-1], points[1][-1])
    finish_axes(axes, "loss (nats)")
    axes.legend(frameon=False, fontsize=9)


def _accuracy(axes, validation: Sequence[Record]) -> None:
    steps, values = [r["step"] for r in validation], [r["accuracy"] for r in validation]
    axes.plot(steps, values, color=_VALIDATION, marker="o", markersize=5, linewidth=1.5)
    _label(axes, steps[0], values[0])
    _label(axes, steps[-1], values[-1])
    finish_axes(axes, "validation accuracy")


def _label(axes, step: int, value: float) -> None:
    """The value beside its point, on the right, where no line runs through it."""
    axes.annotate(
        f"{value:.3f}",
        (step, value),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        color=_VALIDATION,
        fontsize=9,
    )


def finish_axes(axes, label: str) -> None:
    """Names and grid of axes over steps."""
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.margins(x=0.07, y=0.08)
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
