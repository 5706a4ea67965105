"""The report of a run: one HTML file that needs nothing beside it."""

from __future__ import annotations

import html
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jlora
from jlora import paths
from jlora.core.tree.adapted import count
from jlora.core.tree.summary import shared_counts
from jlora.training import folder
from jlora.training.files import write_whole
from jlora.training.reporting.metrics import Metrics, Record
from jlora.training.reporting.page import figures, folded, image, page, table
from jlora.training.reporting.plot import course_plot, loss_plot
from jlora.training.reporting.shown import Shown, peak_memory, size_of

PLOT, REPORT = "loss.png", "report.html"


def write_report(
    out: Path,
    about: Mapping[str, Any],
    record: Mapping[str, Any],
    metrics: Metrics,
    adapted: jlora.Adapted,
    shown: Shown,
) -> None:
    """Write `loss.png` and `report.html`.

    Args:
        out: the output folder.
        about: the content of `settings.json`.
        record: the content of `results.json`.
        metrics: of the whole run.
        adapted: the trained adapters.
        shown: samples, and what is told of a classifier's rows.
    """
    picture = loss_plot(metrics.of("train"), metrics.of("validation"))
    write_whole(out / PLOT, picture)
    body = [
        _title(about, adapted),
        _notes(record, about),
        _figures(record, about["settings"], metrics, out),
        image(picture, "Training and validation loss over steps"),
        _samples(shown.texts),
        _confusion(shown),
        _worst(shown),
        "<h2>The course of the run</h2>",
        image(course_plot(metrics.of("train")), "Learning rate, gradient norm and speed over steps"),
        "<h2>What is adapted</h2>",
        _sites(adapted),
        "<h2>What to do next</h2>",
        _next(out, about, record),
        "<h2>Where everything lies</h2>",
        f"<p><code>{html.escape(str(out.resolve()))}</code></p>",
        table(("name", "content"), folder.content(out, REPORT).items()),
        folded("Settings", table(("setting", "value"), given_settings(about["settings"]))),
        folded("What it stands on", table(("name", "value"), grounds(about))),
    ]
    write_whole(out / REPORT, page(f"{names_of(about)[0]}, fine-tuned by jlora", body))


def names_of(about: Mapping[str, Any]) -> tuple[str, str]:
    """Model and data without the folders they lie in: those are the reader's own business."""
    data = about["settings"]["data"]
    files = ", ".join(Path(file).name for file in data.split(",")) if data else about["data"]
    return Path(about["model"]).resolve().name, files


def _title(about: Mapping[str, Any], adapted: jlora.Adapted) -> str:
    settings, (model, data) = about["settings"], names_of(about)
    method = "the spec's methods" if settings["spec"] else settings["method"]
    if settings["adapter"] is not None:
        method = f"going on from the adapters in {Path(settings['adapter']).name}"
    text = f"{model}, trained by {method} on {data}: {count(adapted.params):,} trained values"
    return f"<h1>Fine-tuning report</h1><p class=about>{html.escape(text)}</p>"


def _notes(record: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """What is wrong with the result, and what to know of it."""
    wrong, notes = record.get("complaint"), about.get("notes", ())
    shown = f'<p class="wrong">{html.escape(wrong)}</p>' if wrong else ""
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return shown + (f"<ul>{items}</ul>" if items else "")


def _figures(record: Mapping[str, Any], settings: Mapping[str, Any], metrics: Metrics, out: Path) -> str:
    found = []
    for name, before in record["before"].items():
        found.append((f"{before:.4g} → {record['after'][name]:.4g}", f"validation {name}, before → after"))
    share = 100 * record["trained_values"] / record["base_values"]
    found.append(
        (f"{share:.2f} %", f"{record['trained_values']:,} trained values over {record['base_values']:,} in the base")
    )
    found += _best(record, settings)
    resumed = record.get("resumed_at")
    span = f"since the run was resumed at step {resumed}" if resumed else f"for {record['steps']} steps"
    found.append((f"{record['seconds']:.0f} s", f"{span}, set-up included"))
    found += _speed(metrics.of("train"), settings)
    peak, whose = peak_memory()
    found.append((f"{peak / 1e9:,.2f} GB", whose))
    if (out / "adapters").is_dir():
        found.append((f"{size_of(out / 'adapters') / 1e6:,.2f} MB", "size of the adapters' files"))
    return figures(found)


def _best(record: Mapping[str, Any], settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    best, kept, metric = record.get("best_step"), record["step"], settings["metric"]
    if best is None:
        return []
    ends = "whose adapters are kept" if kept == best else f"the adapters are those of step {kept}"
    return [(f"step {best}", f"has the best validation ({metric}); {ends}")]


def _speed(train: Sequence[Record], settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The median speed, in which the compilation of the first step weighs nothing."""
    if not train or "tokens" not in train[0]:
        return []
    tokens = statistics.median(r["tokens"] / r["weight"] * r["per_second"] for r in train if r["weight"])
    unit = "rows" if settings["task"] == "classify" else "of them predicted in answers or texts"
    predictions = statistics.median(record["per_second"] for record in train)
    return [(f"{tokens:,.0f} tokens/s", f"read by the model; {predictions:,.0f}/s {unit}")]


def _samples(texts: Sequence[Mapping[str, str]]) -> str:
    shown = []
    for text in texts:
        prompt = html.escape(text["prompt"])
        for name, title in (("before", "before"), ("after", "after"), ("wanted", "the data's answer")):
            if name in text:
                shown.append(f"<p>{title}</p><pre><em>{prompt}</em>{html.escape(text[name])}</pre>")
    return f"<h2>What the model writes</h2>{''.join(shown)}" if shown else ""


def _confusion(shown: Shown) -> str:
    if shown.confusion is None:
        return ""
    header = ["label", *(f"predicted {label}" for label in shown.labels), "right"]
    rows = []
    for number, counts in enumerate(shown.confusion):
        share = f"{100 * counts[number] / max(counts.sum(), 1):.1f} %"
        rows.append((shown.labels[number], *(f"{count:,}" for count in counts), share))
    title = "<h2>Labels and predictions of the validation</h2>"
    return title + table(header, rows, numbers=range(1, len(header)))


def _worst(shown: Shown) -> str:
    rows = [(f"{row.loss:.2f}", row.label, row.predicted, row.text[:300]) for row in shown.worst]
    if not rows:
        return ""
    return "<h2>The worst rows of the validation</h2>" + table(("loss", "label", "predicted", "text"), rows, (0,))


def _next(out: Path, about: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Commands that go on from here."""
    run, model = shlex.quote(str(out)), about["settings"]["task"] != "classify"
    lines = [f"jlora generate {run} --prompt '…'", f"jlora chat {run}"] if model else []
    lines += [f"jlora eval {run} test.jsonl", f"jlora merge {run} merged", f"jlora export {run} --to adapter"]
    lines += [f"jlora compare {run} OTHER_RUN --to compared.html"]
    if record.get("complaint") and not (out / "adapters").is_dir():
        lines = [f"jlora finetune --resume --out {run}  # goes on from the last checkpoint, with the same settings"]
    return f"<pre>{html.escape(chr(10).join(lines))}</pre>"


def _sites(adapted: jlora.Adapted) -> str:
    rows = []
    for site in adapted.plan.sites:
        trained = count(paths.lookup(adapted.params, site.keys))
        rows.append((site.path, " × ".join(map(str, site.shape)), str(site.method), f"{trained:,}"))
    rows += [(path, "shared", str(method), f"{n:,}") for method, (path, n) in shared_counts(adapted).items()]
    return table(("weight", "shape", "method", "trained values"), rows, numbers=(3,))


def given_settings(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The settings that say something, by name."""
    return [(name, value) for name, value in settings.items() if value is not None and value != {}]


def grounds(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a run stands on, by name."""
    places = [("model", about["model"]), ("data", about["data"])]
    sums = [("base fingerprint", about["base"]), ("data SHA-256", about["data_sha256"])]
    if found := about.get("continued"):
        places.append(("adapters it goes on from", found["adapter"]))
        sums.append(("their SHA-256", found["sha256"]))
    return [*places, *sums, *about["versions"].items()]
