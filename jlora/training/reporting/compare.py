"""Several finished runs side by side: a table in text, and one HTML page with their curves."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jlora.disk.json_files import ILL_FORMED, read_object
from jlora.training.errors import CheckpointError
from jlora.training.reporting.metrics import Record, read_metrics
from jlora.training.reporting.page import image, page, table
from jlora.training.reporting.plot import curves_plot
from jlora.training.settings.scored import is_better

# Settings that say where a run lies, and how it was watched, and nothing of what was trained.
_ASIDE = ("out", "resume", "progress", "report_to", "keep", "checkpoint_every", "prompt", "sample_tokens")


class Finished(NamedTuple):
    """A finished run, as its files have it.

    Attributes:
        name: of the run among those that are compared.
        settings: resolved, by name.
        results: the content of `results.json`.
        records: the lines of `metrics.jsonl`.
    """

    name: str
    settings: dict[str, Any]
    results: dict[str, Any]
    records: list[Record]


def read_runs(runs: Sequence[str | Path]) -> list[Finished]:
    """Some runs by their folders; each is named by what tells its path from the others'.

    Raises:
        CheckpointError: a ValueError, if a folder holds no finished run, or a damaged one.
    """
    return [_read(Path(run), name) for run, name in zip(runs, _names(runs))]


def _read(out: Path, name: str) -> Finished:
    try:
        about, results = read_object(out / "settings.json"), read_object(out / "results.json")
        records = read_metrics(out / "metrics.jsonl")
        found = Finished(name, about["settings"], results, records)
        compared([found])  # what is missing or of another kind is told of with the folder
        return found
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        why = "is not finished" if (out / "settings.json").exists() else "holds no run"
        raise CheckpointError(f"{out} {why} (no {missing}): it can't be compared") from error
    except (*ILL_FORMED, AttributeError) as error:
        raise CheckpointError(f"{out} is damaged or from another version: {error}") from error


def _names(runs: Sequence[str | Path]) -> list[str]:
    """The paths without what they all begin with; whole where two are the same."""
    paths = [Path(run).absolute() for run in runs]
    if len(set(paths)) < 2:
        return [path.name for path in paths]
    common = os.path.commonpath([path.parent for path in paths])
    return [os.path.relpath(path, common) for path in paths]


def judged_by(runs: Sequence[Finished]) -> str:
    """The metric that all runs are judged by: their own where it is the same, or the loss."""
    own = {run.settings.get("metric", "loss") for run in runs}
    metric = own.pop() if len(own) == 1 else "loss"
    return metric if all(metric in run.results["after"] for run in runs) else "loss"


def best_run(runs: Sequence[Finished]) -> int:
    """The number of the run whose adapters are best by `judged_by`, the first of equal ones."""
    metric, best = judged_by(runs), 0
    for number, run in enumerate(runs):
        if is_better(metric, run.results["after"][metric], runs[best].results["after"][metric]):
            best = number
    return best


def _columns(runs: Sequence[Finished]) -> list[str]:
    """The settings in which the runs differ."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in _ASIDE)
    return [name for name in names if len({repr(run.settings.get(name)) for run in runs}) > 1]


def _figures(run: Finished, metric: str) -> list[str]:
    """What came of a run, as texts."""
    after = run.results["after"]
    shown = {"loss": None, metric: None}
    return [
        *(f"{after[name]:.4f}" for name in shown),
        str(run.results.get("step", run.results["steps"])),
        f"{run.results['trained_values']:,}",
        f"{run.results['seconds']:.0f}",
        "" if run.results.get("complaint") is None else "yes",
    ]


def compared(runs: Sequence[Finished]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: the settings in which the runs differ, and what came of them."""
    names, metric = _columns(runs), judged_by(runs)
    scores = dict.fromkeys(("loss", metric))
    header = ["run", *(name.replace("_", "-") for name in names), *(f"validation {name}" for name in scores)]
    header += ["of step", "trained values", "seconds", "complaint"]
    rows = [[run.name, *(_shown(run.settings.get(name)) for name in names), *_figures(run, metric)] for run in runs]
    keep = [number for number, _ in enumerate(header) if header[number] != "complaint" or any(row[-1] for row in rows)]
    return [header[number] for number in keep], [[row[number] for number in keep] for row in rows]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={each}" for name, each in value.items())
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def comparison_text(runs: Sequence[str | Path]) -> str:
    """The table of some finished runs, in text; a star is at the best one.

    Raises:
        CheckpointError: as `read_runs`.
    """
    found = read_runs(runs)
    header, rows = compared(found)
    best = best_run(found)
    lines = [["", *header], *(["*" if number == best else "", *row] for number, row in enumerate(rows))]
    widths = [max(map(len, column)) for column in zip(*lines)]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    return "\n".join([*shown, f"* the best {judged_by(found)}"])


def comparison_page(runs: Sequence[str | Path], title: str = "Runs compared") -> str:
    """One HTML page about some finished runs: the table, the best run, and the curves of all. It needs nothing beside it.

    Args:
        runs: their folders, in the order of the table.
        title: of the page.

    Raises:
        CheckpointError: as `read_runs`.
    """
    found = read_runs(runs)
    header, rows = compared(found)
    metric, best = judged_by(found), best_run(found)
    first = len(header) - len(_figures(found[0], metric)) + (header[-1] != "complaint")
    words = f"{len(found)} runs; the best {metric} of the validation, {found[best].results['after'][metric]:.4f}, has "
    body = [
        f"<h1>{html.escape(title)}</h1><p class=about>{words}<b>{html.escape(found[best].name)}</b></p>",
        table(header, rows, numbers=range(first, len(header)), best=best),
        "<h2>Curves</h2>",
        image(curves_plot([(run.name, run.records) for run in found], metric), "Losses of all runs over steps"),
        "".join(_wrong(run) for run in found),
    ]
    return page(title, body)


def _wrong(run: Finished) -> str:
    complaint = run.results.get("complaint")
    return "" if complaint is None else f'<p class="wrong">{html.escape(f"{run.name}: {complaint}")}</p>'
