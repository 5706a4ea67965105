"""The report of a run: one HTML file that needs nothing beside it."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jlora
from jlora import paths
from jlora.core.tree.adapted import count
from jlora.core.tree.summary import shared_counts
from jlora.training import folder
from jlora.training.files import write_whole
from jlora.training.reporting.metrics import Metrics
from jlora.training.reporting.page import figures, folded, image, page, table
from jlora.training.reporting.plot import loss_plot

PLOT, REPORT = "loss.png", "report.html"


def write_report(
    out: Path,
    about: Mapping[str, Any],
    record: Mapping[str, Any],
    metrics: Metrics,
    adapted: jlora.Adapted,
    texts: Mapping[str, str],
) -> None:
    """Write `loss.png` and `report.html`.

    Args:
        out: the output folder.
        about: the content of `settings.json`.
        record: the content of `results.json`.
        metrics: of the whole run.
        adapted: the trained adapters.
        texts: `prompt`, `before` and `after`, or nothing.
    """
    picture = loss_plot(metrics.of("train"), metrics.of("validation"))
    write_whole(out / PLOT, picture)
    body = [
        _title(about, adapted),
        _notes(record, about),
        _figures(record),
        image(picture, "Training and validation loss over steps"),
        _samples(texts) if texts else "",
        "<h2>What is adapted</h2>",
        _sites(adapted),
        "<h2>Where everything lies</h2>",
        f"<p><code>{html.escape(str(out.resolve()))}</code></p>",
        table(("name", "content"), folder.content(out, REPORT).items()),
        folded("Settings", table(("setting", "value"), _given(about["settings"]))),
        folded("What it stands on", table(("name", "value"), _grounds(about))),
    ]
    write_whole(out / REPORT, page(f"{_names(about)[0]}, fine-tuned by jlora", body))


def _names(about: Mapping[str, Any]) -> tuple[str, str]:
    """Model and data without the folders they lie in: those are the reader's own business."""
    data = about["settings"]["data"]
    return Path(about["model"]).resolve().name, Path(data).name if data else about["data"]


def _title(about: Mapping[str, Any], adapted: jlora.Adapted) -> str:
    settings, (model, data) = about["settings"], _names(about)
    method = "the spec's methods" if settings["spec"] else settings["method"]
    text = f"{model}, trained by {method} on {data}: {count(adapted.params):,} trained values"
    return f"<h1>Fine-tuning report</h1><p class=about>{html.escape(text)}</p>"


def _notes(record: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """What is wrong with the result, and what to know of it."""
    wrong, notes = record.get("complaint"), about.get("notes", ())
    shown = f'<p class="wrong">{html.escape(wrong)}</p>' if wrong else ""
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return shown + (f"<ul>{items}</ul>" if items else "")


def _figures(record: Mapping[str, Any]) -> str:
    shown = []
    for name, before in record["before"].items():
        shown.append((f"{before:.4g} → {record['after'][name]:.4g}", f"validation {name}, before → after"))
    share = 100 * record["trained_values"] / record["base_values"]
    shown.append(
        (f"{share:.2f} %", f"{record['trained_values']:,} trained values over {record['base_values']:,} in the base")
    )
    resumed = record.get("resumed_at")
    span = f"since the run was resumed at step {resumed}" if resumed else f"for {record['steps']} steps"
    shown.append((f"{record['seconds']:.0f} s", f"{span}, set-up included"))
    return figures(shown)


def _samples(texts: Mapping[str, str]) -> str:
    prompt = html.escape(texts["prompt"])
    shown = [
        f"<h2>{title}</h2><pre><em>{prompt}</em>{html.escape(texts[name])}</pre>"
        for name, title in (("before", "A text before"), ("after", "The same prompt after"))
        if name in texts
    ]
    return "".join(shown)


def _sites(adapted: jlora.Adapted) -> str:
    rows = []
    for site in adapted.plan.sites:
        trained = count(paths.lookup(adapted.params, site.keys))
        rows.append((site.path, " × ".join(map(str, site.shape)), str(site.method), f"{trained:,}"))
    rows += [(path, "shared", str(method), f"{n:,}") for method, (path, n) in shared_counts(adapted).items()]
    return table(("weight", "shape", "method", "trained values"), rows, numbers=(3,))


def _given(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in settings.items() if value is not None and value != {}]


def _grounds(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    places = [("model", about["model"]), ("data", about["data"])]
    sums = [("base fingerprint", about["base"]), ("data SHA-256", about["data_sha256"])]
    return [*places, *sums, *about["versions"].items()]
