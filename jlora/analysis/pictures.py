"""Pictures of what adaptation does to weights."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jlora.analysis.intruders import Intruders


def intruder_plot(found: Intruders | Mapping[int, Intruders], path: str | None = None) -> bytes:
    """A picture, PNG: of one finding the likeness of singular vectors, of several the number of intruders over a training.

    Of one: on the left the `|cos|` of the first singular vectors of a tuned matrix (rows) with the pretrained ones (columns),
    in which full fine-tuning leaves a bright diagonal and an intruder is a dark row; on the right the number of intruders in
    all matrices by the threshold.

    Args:
        found: what `intruder_dimensions` found; or, by step, what it found in the course of a training.
        path: the leaf of the left side, of a stack its first matrix; by default that with most intruders.

    Raises:
        ValueError: for an unknown path, or an empty mapping.

    Example:
        >>> adapted = jlora.adapterize(params, {r".*/(q|v)_proj/kernel": jlora.LoRA(rank=2, init="random")})
        >>> picture = jlora.intruder_plot(jlora.intruder_dimensions(adapted))
    """
    draw: Callable[[Any], None]
    if isinstance(found, Intruders):
        name = max(found.counts, key=lambda each: found.counts[each]) if path is None else path
        if name not in found.leaves:
            raise ValueError(f"{name}: no leaf of this path was looked at; there are {', '.join(found.leaves)}")
        one: Intruders = found
        draw = lambda figure: _draw_one(figure, one, name)  # noqa: E731
    else:
        if not found:
            raise ValueError("intruder_plot got no findings")
        several: Mapping[int, Intruders] = found
        draw = lambda figure: _draw_training(figure, several)  # noqa: E731
    return _png(draw, 11 if isinstance(found, Intruders) else 6)


def _png(draw: Callable[[Any], None], width: float) -> bytes:
    # Imported here: nothing else that is imported with jlora needs it, and it takes most of a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.2), dpi=130, layout="constrained")
    canvas, content = FigureCanvasAgg(figure), io.BytesIO()
    draw(figure)
    canvas.print_png(content)
    return content.getvalue()


def _draw_one(figure: Any, found: Intruders, path: str) -> None:
    left, right = figure.subplots(1, 2)
    likeness = found.leaves[path].cosine_of_all
    likeness = likeness.reshape(-1, *likeness.shape[-2:])[0]
    image = left.imshow(likeness, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=left, label="|cos|")
    left.set(title=path, xlabel="pretrained singular vector", ylabel="tuned singular vector")
    thresholds = np.linspace(0.05, 1, 39)
    right.plot(thresholds, [found.count_below(each) for each in thresholds], color="#3b6ea5")
    right.axvline(found.threshold, color="#c8553d", linewidth=0.8)
    right.set(title=f"{len(found.leaves)} leaves", xlabel="threshold of |cos|", ylabel="intruder dimensions")


def _draw_training(figure: Any, found: Mapping[int, Intruders]) -> None:
    axes, steps = figure.subplots(), sorted(found)
    axes.plot(steps, [found[step].count for step in steps], marker="o", color="#3b6ea5")
    axes.set(xlabel="step", ylabel="intruder dimensions")
