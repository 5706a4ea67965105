"""The report of a run: one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jlora
from jlora import paths
from jlora.core.tree.adapted import count
from jlora.core.tree.summary import shared_counts
from jlora.training import folder
from jlora.training.files import write_whole
from jlora.training.reporting.metrics import Metrics
from jlora.training.reporting.plot import loss_plot

PLOT, REPORT = "loss.png", "report.html"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 860px; margin: 2.5em auto; padding: 0 1.2em; }
h1 { font-size: 1.6em; margin-bottom: .1em; } h2 { font-size: 1.1em; margin-top: 2em; color: #3b6ea5; }
p.about { color: #666; margin-top: 0; } p.wrong { background: #fbe9e5; border-left: 4px solid #c8553d; padding: .6em .9em; }
img { width: 100%; }
table { border-collapse: collapse; font-size: .9em; }
td, th { padding: .25em 1.2em .25em 0; text-align: left; vertical-align: top; }
th { color: #666; font-weight: 600; border-bottom: 1px solid #ccc; } td.number, th.number { text-align: right; }
td:nth-child(2) { white-space: nowrap; }
summary { font-size: 1.1em; font-weight: 600; margin-top: 2em; color: #3b6ea5; cursor: pointer; }
.figures { display: flex; flex-wrap: wrap; gap: 1em; margin: 1.4em 0; padding: 0; }
.figures div { flex: 1; min-width: 150px; border: 1px solid #ddd; border-radius: 8px; padding: .6em .9em; }
.figures b { display: block; font-size: 1.35em; } .figures span { color: #666; font-size: .85em; }
pre { background: #f5f6f8; border-radius: 8px; padding: .8em 1em; font-size: .88em;
  white-space: pre-wrap; overflow-wrap: anywhere; }
pre em { color: #888; font-style: normal; } code { font-size: .92em; } .wide { overflow-x: auto; }
"""


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
    encoded = base64.b64encode(picture).decode()
    body = [
        _title(about, adapted),
        _notes(record, about),
        _figures(record),
        f'<img alt="Training and validation loss over steps" src="data:image/png;base64,{encoded}">',
        _samples(texts) if texts else "",
        "<h2>What is adapted</h2>",
        _sites(adapted),
        "<h2>Where everything lies</h2>",
        f"<p><code>{html.escape(str(out.resolve()))}</code></p>",
        _table(("name", "content"), folder.content(out, REPORT).items()),
        _folded("Settings", _table(("setting", "value"), _given(about["settings"]))),
        _folded("What it stands on", _table(("name", "value"), _grounds(about))),
    ]
    title = html.escape(f"{_names(about)[0]}, fine-tuned by jlora")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"</head><body>{''.join(body)}</body></html>\n"
    )
    write_whole(out / REPORT, page)


def _names(about: Mapping[str, Any]) -> tuple[str, str]:
    """Model and data without the folders they lie in: those are the reader's own business."""
    data = about["settings"]["data"]
    files = ", ".join(Path(file).name for file in data.split(",")) if data else about["data"]
    return Path(about["model"]).resolve().name, files


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
    cells = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>" for value, label in shown
    )
    return f'<div class="figures">{cells}</div>'


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
    return _table(("weight", "shape", "method", "trained values"), rows, numbers=(3,))


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def _given(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in settings.items() if value is not None and value != {}]


def _grounds(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    places = [("model", about["model"]), ("data", about["data"])]
    sums = [("base fingerprint", about["base"]), ("data SHA-256", about["data_sha256"])]
    return [*places, *sums, *about["versions"].items()]


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Sequence[int] = ()) -> str:
    def cells(tag: str, values: Sequence[Any]) -> str:
        kinds = [' class="number"' if index in numbers else "" for index in range(len(values))]
        return "".join(f"<{tag}{kind}>{html.escape(str(value))}</{tag}>" for kind, value in zip(kinds, values))

    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{cells("th", header)}</tr>{lines}</table></div>'
