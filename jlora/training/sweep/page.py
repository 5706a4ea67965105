"""The page that compares the runs of a sweep: one HTML file that needs nothing beside it."""

from __future__ import annotations

import html
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlora.training.files import write_whole
from jlora.training.reporting.metrics import Record
from jlora.training.reporting.page import folded, image, page, table
from jlora.training.reporting.plot import STYLE, finish_axes
from jlora.training.reporting.report import given_settings, grounds, names_of

PAGE, PLOT = "sweep.html", "sweep.png"


@dataclass(frozen=True)
class RunOfSweep:
    """What a run came to.

    Attributes:
        name: of its folder.
        point: the values that it has of what was swept.
        record: the content of its `results.json`.
        metrics: the lines of its `metrics.jsonl`.
    """

    name: str
    point: dict[str, Any]
    record: dict[str, Any]
    metrics: Sequence[Record]

    @property
    def order(self) -> tuple[bool, float]:
        """What the best run has the least of: what is wrong comes last, then the validation loss counts."""
        return bool(self.record["complaint"]), self.record["after"]["loss"]

    @property
    def setting(self) -> tuple[tuple[str, Any], ...]:
        """The values without the seed."""
        return tuple((name, value) for name, value in self.point.items() if name != "seed")

    def words(self) -> str:
        """The last validation in words."""
        return ", ".join(f"validation {name} {value:.4f}" for name, value in self.record["after"].items())


def write_page(out: Path, about: Mapping[str, Any], runs: Sequence[RunOfSweep], seconds: float) -> None:
    """Write `sweep.png` and `sweep.html`.

    Args:
        out: the sweep's folder.
        about: the content of its `settings.json`.
        runs: best first.
        seconds: that it took, since it was started or resumed.
    """
    picture = curves(runs)
    write_whole(out / PLOT, picture)
    model, data = names_of(about)
    title = f"{model} on {data}: {len(runs)} {'run' if len(runs) == 1 else 'runs'} at once"
    wrong = [html.escape(f"{run.name}: {told}") for run in runs if (told := run.record["complaint"])]
    body = [
        f"<h1>Sweep</h1><p class=about>{html.escape(title)}, in {seconds:.0f} s</p>",
        image(picture, "Validation and training loss of the runs over steps"),
        "<h2>Settings, the best mean first</h2>" if len(_groups(runs)) < len(runs) else "",
        _settings(runs) if len(_groups(runs)) < len(runs) else "",
        "<h2>Runs, the best first</h2>",
        _runs(runs),
        f"<h2>What went wrong</h2><ul><li>{'</li><li>'.join(wrong)}</li></ul>" if wrong else "",
        folded("Settings in common", table(("setting", "value"), given_settings(about["settings"]))),
        folded("What it stands on", table(("name", "value"), grounds(about))),
    ]
    write_whole(out / PAGE, page(title, body))


def _groups(runs: Sequence[RunOfSweep]) -> dict[tuple[tuple[str, Any], ...], list[RunOfSweep]]:
    """The runs by their values without the seed, the best mean first."""
    found: dict[tuple[tuple[str, Any], ...], list[RunOfSweep]] = {}
    for run in runs:
        found.setdefault(run.setting, []).append(run)
    return dict(sorted(found.items(), key=lambda item: _mean_order(item[1])))


def _mean_order(runs: Sequence[RunOfSweep]) -> tuple[bool, float]:
    return any(run.record["complaint"] for run in runs), statistics.fmean(run.order[1] for run in runs)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation of a sample, such as `2.431 ± 0.012`."""
    mean = f"{statistics.fmean(values):.4g}"
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean


def _settings(runs: Sequence[RunOfSweep]) -> str:
    """For each setting the mean and the spread over its seeds; runs that can't go on are counted, and not in the mean."""
    swept, measures = [name for name in runs[0].point if name != "seed"], list(runs[0].record["after"])
    rows = []
    for values, group in _groups(runs).items():
        whole = [run for run in group if run.record["complaint"] is None]
        told = [spread([run.record["after"][name] for run in whole]) if whole else "-" for name in measures]
        rows.append((*(value for _, value in values), *told, f"{len(whole)} of {len(group)}"))
    header = (*(name.replace("_", "-") for name in swept), *(f"validation {name}" for name in measures), "runs")
    return table(header, rows, numbers=range(len(header)))


def _runs(runs: Sequence[RunOfSweep]) -> str:
    swept, measures = list(runs[0].point), list(runs[0].record["after"])
    header = (
        *(name.replace("_", "-") for name in swept), *(f"validation {name}" for name in measures),
        "training loss", "steps", "folder", "",
    )  # fmt: skip
    rows = []
    for run in runs:
        after, train = run.record["after"], run.record["train_loss"]
        shown = (*(f"{after[name]:.4g}" for name in measures), "-" if train is None else f"{train:.4g}")
        wrong = "see below" if run.record["complaint"] else ""
        rows.append((*run.point.values(), *shown, run.record["steps"], f"runs/{run.name}", wrong))
    return table(header, rows, numbers=range(len(swept) + len(measures) + 2), best=0)


def curves(runs: Sequence[RunOfSweep]) -> bytes:
    """A PNG of the validation losses of all runs over steps, and of their training losses; a colour for each setting."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = _groups(runs)
    colours = matplotlib.colormaps["viridis"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2), dpi=130, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        for number, (values, group) in enumerate(groups.items()):
            colour = colours(number / max(1, len(groups) - 1) * 0.85)
            label = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in values) or "every seed"
            for order, run in enumerate(group):
                first = label if order == 0 and number < _LABELS else None
                for axes, kind in ((left, "validation"), (right, "train")):
                    of_kind = [r for r in run.metrics if r["kind"] == kind and math.isfinite(r["loss"])]
                    steps, losses = [r["step"] for r in of_kind], [r["loss"] for r in of_kind]
                    mark: dict[str, Any] = {"marker": "o", "markersize": 3} if kind == "validation" else {"alpha": 0.6}
                    axes.plot(steps, losses, color=colour, linewidth=1.1, label=first, **mark)
        finish_axes(left, "validation loss (nats)")
        finish_axes(right, "training loss (nats)")
        if len(groups) > 1:
            left.legend(frameon=False, fontsize=8)
        content = io.BytesIO()
        canvas.print_png(content)
    return content.getvalue()


#: Settings that the legend names, the best of them.
_LABELS = 10
