"""`sweep(settings)`: several fine-tuning runs at once, each left as a run of its own, and the page that compares them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import jlora
from jlora.core.tree.adapted import count
from jlora.optimize.events import events_of
from jlora.training import folder
from jlora.training.data.dataset import Data, load_data
from jlora.training.errors import SettingError
from jlora.training.files import is_full_disk, write_json
from jlora.training.hosts import processes
from jlora.training.hosts.placement import make_mesh, place_base
from jlora.training.model.measured import measured_of
from jlora.training.model.selection import adapt
from jlora.training.model.subject import Subject, check_model, load_subject, memory, open_codec
from jlora.training.reporting.report import write_report
from jlora.training.reporting.shown import Shown
from jlora.training.reporting.verdict import complaint, unsteady
from jlora.training.run.continued import check_labels, continued, notes_on, read_adapters, source_of
from jlora.training.run.record import (
    RESULTS,
    SETTINGS,
    about_run,
    begin,
    full_disk,
    measured_before,
    read_settings,
    results,
    resumable,
    save_adapters,
)
from jlora.training.settings.defaults import count_steps, resolve
from jlora.training.settings.fields import Settings
from jlora.training.settings.sweeps import points
from jlora.training.sweep.page import RunOfSweep, write_page
from jlora.training.sweep.trainer import SweepTrainer

RUNS = "runs"


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """What came of a sweep.

    Attributes:
        out: the output folder.
        runs: the runs, best validation first.
        record: the content of `results.json`.
        complaint: what is wrong, if every run has something wrong with it; else None.
    """

    out: Path
    runs: list[RunOfSweep]
    record: dict[str, Any]
    complaint: str | None


def sweep(settings: Settings, say: Callable[[str], None] = print) -> SweepResult:
    """Fine-tune a model once for each combination of what `settings.sweep` and `settings.seeds` name, in one program.

    Every run has its own adapters, optimizer state, seed, order of the data, dropout and clipping, and is what it would be
    alone, to rounding; the base is passed once for all. All see the same rows: what is drawn of the data (`max_rows`, a part
    for validation) is drawn by `settings.seed`.

    Args:
        settings: with `sweep` or `seeds`; what is left open is chosen for each run as for one alone.
        say: takes the lines of text that are printed beside the progress.

    Returns:
        The result. `settings.out` holds a folder `runs` with one for each run, as `finetune` leaves it, and `sweep.html`.

    Raises:
        SettingError: a ValueError, for settings that do not fit together, or runs that can't be one program.
        DataError, FolderError, Stopped, OSError: as `finetune`.
    """
    with processes.together():
        if processes.several():
            raise SettingError("sweep", "runs in one process, on one device")
        return _sweep(settings, say, time.time())


def _sweep(asked: Settings, say: Callable[[str], None], start: float) -> SweepResult:
    at = points(asked)
    alone = [dataclasses.replace(asked, sweep={}, seeds=None, patience=None, **point) for point in at]
    resolved = [resolve(each) for each in alone]
    settings, mesh = resolve(asked), make_mesh({})
    codec, config = open_codec(settings)
    check_model(settings, config)
    source = source_of(settings)
    stored = resumable(settings.out) if settings.resume else {}
    started = stored.get("started") or datetime.now().isoformat(timespec="seconds")
    data = load_data(settings, codec, datetime.fromisoformat(started), say=say)
    check_labels(source, data.labels)
    settings = count_steps(settings, len(data.train))
    resolved = [count_steps(each, len(data.train)) for each in resolved]
    subject = load_subject(settings, codec, config)
    subject = subject.with_head(data.labels) if data.labels else subject
    fingerprint = jlora.fingerprint(subject.params)
    subject = dataclasses.replace(subject, params=place_base(subject.params, mesh))
    folders = [Path(settings.out) / RUNS / name_of(point) for point in at]
    runs = [dataclasses.replace(each, out=str(place), resume=False) for each, place in zip(resolved, folders)]
    if settings.adapter is not None:
        adapters = [read_adapters(subject, settings)] * len(runs)
    else:
        adapters = [adapt(subject, each, data, mesh, known) for each, known in zip(runs, _known(folders, settings))]
    stacked = _stacked(adapters, asked)
    about = about_run(asked, settings, subject, data, fingerprint)
    origin, notes = continued(settings, adapters[0]), [*data.notes, *notes_on(source, settings, data), *subject.notes]
    about |= {"measured": {}, "started": started, "notes": notes, "runs": at} | origin
    abouts = []
    for wanted, each, adapted in zip(alone, runs, adapters):
        own = about_run(wanted, each, subject, data, fingerprint)
        notes = [*about["notes"], f"one of {len(at)} runs of a sweep; rows were drawn by its seed, {asked.seed}"]
        own |= {
            "measured": measured_of(adapted),
            "started": started,
            "notes": notes,
            "sweep": str(settings.out),
        } | origin
        abouts.append(own)
    with processes.claim(settings.out, settings.resume) as out:
        try:
            begin(out, about, data, settings)
            for place, own, each in zip(folders, abouts, runs):
                place.mkdir(parents=True, exist_ok=True)
                begin(place, own, data, dataclasses.replace(each, resume=False))
            _describe(stacked, subject, data, settings, at, say)
            trainer = SweepTrainer(stacked, subject.forward, data, settings, runs, out, folders, fingerprint)
            trained = trainer.run()
            return _conclude(trainer, trained, at, abouts, about, say, start)
        except Exception as error:
            if is_full_disk(error):
                raise full_disk(out) from error
            raise


def name_of(point: dict[str, Any]) -> str:
    """The folder of a run, such as `learning-rate-0.0001_seed-0`."""
    return "_".join(f"{name.replace('_', '-')}-{value}" for name, value in point.items())


def _known(folders: list[Path], settings: Settings) -> list[dict[str, Any]]:
    """What was measured when each run began."""
    known = settings.resume and all((place / SETTINGS).exists() for place in folders)
    return [measured_before(read_settings(place)) if known else {} for place in folders]


def _stacked(adapters: list[jlora.Adapted], asked: Settings) -> jlora.Stacked:
    """The adapters of all runs as one.

    Raises:
        SettingError: where they can't be one program.
    """
    name = "sweep" if asked.sweep else "seeds"
    if events := events_of(adapters[0]):
        ((site, *_), *_) = events.values()
        raise SettingError(
            name,
            f"can't train {asked.method or site.method}: what it does between steps, it does for each run by itself",
        )
    try:
        return jlora.stack(adapters)
    except ValueError as error:
        raise SettingError(name, f"can't be one program: {error}") from error


def _describe(
    stacked: jlora.Stacked, subject: Subject, data: Data, settings: Settings, at: list[dict[str, Any]], say: Callable
) -> None:
    say(f"model {subject.directory}, {count(subject.params):,} parameters in {memory(subject, settings)}")
    say(f"data  {data.source}: {data.amounts()}")
    if settings.adapter is not None:
        say(f"all go on from the adapters in {settings.adapter}")
    say(jlora.summary(stacked.run(0)))
    swept = ", ".join(
        f"{name.replace('_', '-')} {', '.join(map(str, dict.fromkeys(point[name] for point in at)))}" for name in at[0]
    )
    say(f"{len(at)} {'run' if len(at) == 1 else 'runs'} at once: {swept}")
    say(f"{settings.steps} steps of {settings.batch} rows for each, results in {settings.out}")


def _conclude(
    trainer: SweepTrainer,
    trained: jlora.Stacked,
    at: list[dict[str, Any]],
    abouts: list[dict[str, Any]],
    about: dict[str, Any],
    say: Callable[[str], None],
    start: float,
) -> SweepResult:
    """Writes what each run leaves, and the page."""
    found = []
    for number, (place, each, own, metrics) in enumerate(
        zip(trainer.folders, trainer.runs, abouts, trainer.metrics, strict=True)
    ):
        adapted = trained.run(number)
        wrong = trainer.complaints.get(number)
        if wrong is None:
            save_adapters(place, adapted)
            wrong = complaint(metrics, each)
            if wrong is None and (note := unsteady(metrics, each)):
                own["notes"].append(note)
        last = metrics.of("validation")[-1]
        record = results(adapted, metrics, last, "loss", start, trainer.resumed_at, wrong)
        write_json(place / RESULTS, record)
        write_report(place, own, record, metrics, adapted, Shown())
        found.append(RunOfSweep(place.name, at[number], record, metrics.records))
    found.sort(key=lambda run: run.order)
    seconds = round(time.time() - start, 1)
    told = [{"run": run.name, "swept": run.point, **run.record, "seconds": None} for run in found]
    worst = [run.record["complaint"] for run in found]
    wrong = f"every run has something wrong with it; the best: {worst[0]}" if all(worst) else None
    record = {"runs": told, "seconds": seconds, "resumed_at": trainer.resumed_at, "complaint": wrong}
    write_json(trainer.out / RESULTS, record)
    write_page(trainer.out, about, found, seconds)
    best = found[0]
    say(f"best  {best.name}: {best.words()}; {len(found)} runs in {seconds} seconds; in {trainer.out}:")
    for line in folder.listing(trainer.out):
        say(line)
    return SweepResult(trainer.out, found, record, wrong)
