"""`finetune(settings)`: the whole job, from files to adapters and report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

import jlora
from jlora.core.tree.adapted import count
from jlora.training import folder
from jlora.training.data.dataset import Data, load_data
from jlora.training.data.tokens import Codec
from jlora.training.errors import DivergenceError, SettingError
from jlora.training.files import is_full_disk, write_json
from jlora.training.hosts import agreement, processes
from jlora.training.hosts.placement import base_shardings, check_batch, make_mesh, place_adapters, place_base, row_parts
from jlora.training.model.answers import check_metric, make_written
from jlora.training.model.measured import measured_of
from jlora.training.model.samples import Prompt, prompts, samples
from jlora.training.model.subject import Subject, abstract_subject, check_model, load_subject, memory, open_codec
from jlora.training.reporting.metrics import Metrics
from jlora.training.reporting.report import REPORT, write_report
from jlora.training.reporting.shown import Shown, Worst, of_rows, sample_lines
from jlora.training.reporting.trackers import check_trackers, reported
from jlora.training.reporting.verdict import complaint, overfitting, unsteady
from jlora.training.run.checkpoint import last_whole
from jlora.training.run.continued import check_labels, continued, first_adapters, notes_on, source_of
from jlora.training.run.record import (
    RESULTS,
    SAMPLES,
    about_run,
    begin,
    full_disk,
    measured_before,
    read_complaint,
    results,
    resumable,
    save_adapters,
)
from jlora.training.run.trainer import Trainer
from jlora.training.settings.axes import Rules, mesh_axes, shard_rules
from jlora.training.settings.defaults import count_steps, resolve
from jlora.training.settings.fields import Settings
from jlora.training.settings.sweeps import is_sweep


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        out: the output folder.
        adapted: base and trained adapters.
        before: validation loss (and perplexity or accuracy) before training.
        after: the same with the adapters that the run ends with: those of the last step, or of the best validation.
        record: the content of `results.json`.
        complaint: what is wrong with the result, such as a validation worse than before; None if nothing is.
    """

    out: Path
    adapted: jlora.Adapted
    before: dict[str, float]
    after: dict[str, float]
    record: dict[str, Any]
    complaint: str | None


def finetune(
    settings: Settings,
    say: Callable[[str], None] = print,
    on_metrics: Callable[[dict[str, Any]], None] | None = None,
    given: Mapping[str, Any] | None = None,
) -> Result:
    """Fine-tune a model and leave adapters, metrics, plot and report in `settings.out`.

    Args:
        settings: what to do; what is left open is chosen by the job.
        say: takes the lines of text that the run prints beside its progress.
        on_metrics: called with every line of `metrics.jsonl` when it is written, as a dict with `step` and `kind`; in process
            0 alone. What it raises ends the run.
        given: rows in place of the files of `data` and `validation`, by these names.

    Returns:
        The result.

    Raises:
        SettingError: a ValueError, for settings that do not fit together, or not to the model or the data.
        DataError: a ValueError, for a row that cannot be used, naming file and line.
        FolderError: an OSError, for an output folder that is in use or not empty.
        DivergenceError: a ValueError, if training diverged so that it can't go on; the folder keeps its report, and the
            checkpoints from before.
        Stopped: a KeyboardInterrupt, after SIGINT or SIGTERM, when the step is done and saved.
        DisagreementError: a ValueError, where the processes of the run do not stand on the same.
        LostError: an OSError, where another process of the run gave up.
        OSError: if the disk is full, naming the last whole checkpoint.
    """
    with processes.together():
        return _finetune(settings, say, on_metrics, time.time(), given)


def _finetune(
    asked: Settings,
    say: Callable[[str], None],
    on_metrics: Callable[[dict[str, Any]], None] | None,
    start: float,
    given: Mapping[str, Any] | None,
) -> Result:
    agreement.check_start(asked)
    if is_sweep(asked):
        raise SettingError("sweep" if asked.sweep else "seeds", "is for jlora.training.sweep.job.sweep(settings)")
    settings = resolve(asked)
    agreement.check_settings(settings)
    check_metric(settings)
    processes.by_first(lambda: check_trackers(settings))
    if not processes.first():
        say, settings = _silent, dataclasses.replace(settings, progress="none")
    mesh = make_mesh(mesh_axes(settings.mesh))
    codec, config = open_codec(settings)
    check_model(settings, config)
    source = source_of(settings)
    rules = shard_rules(settings.shard)
    if mesh.size > 1 or rules:
        _check_cuts(settings, codec, config, mesh, rules)
    stored = resumable(settings.out) if settings.resume else {}
    # Templates may write the date: a resumed run sees the texts that it began with, and all processes see the same.
    started = stored.get("started") or processes.by_first(lambda: datetime.now().isoformat(timespec="seconds"))
    data = load_data(settings, codec, datetime.fromisoformat(started), given, say)
    agreement.check_data(data, codec, config)
    check_labels(source, data.labels)
    notes, wanted = [*data.notes, *notes_on(source, settings, data)], settings.batch
    settings = count_steps(settings, len(data.train), row_parts(mesh))
    assert settings.batch is not None
    if settings.batch != wanted:
        notes.append(f"--batch is {settings.batch:,}, not {wanted:,}: the training data makes {len(data.train):,} rows")
    check_batch(mesh, settings.batch, settings.accumulate)
    subject = load_subject(settings, codec, config)
    subject = subject.with_head(data.labels) if data.labels else subject
    notes += subject.notes
    # Before the weights are placed: then each process has one part of those of all, and can't see another's fault.
    fingerprint = jlora.fingerprint(subject.params)
    agreement.check_base(subject.directory, fingerprint)
    processes.beat()
    subject = dataclasses.replace(subject, params=place_base(subject.params, mesh, rules))
    written = make_written(subject, data, settings)
    adapted = place_adapters(first_adapters(subject, settings, data, mesh, measured_before(stored)), mesh)
    about = about_run(asked, settings, subject, data, fingerprint)
    about |= {"measured": measured_of(adapted), "started": started, "notes": notes} | continued(settings, adapted)
    agreement.check_adapter(settings.adapter, about.get("continued", {}).get("sha256"))
    with processes.claim(settings.out, settings.resume) as out:
        try:
            begin(out, about, data, settings)
            _describe(adapted, subject, data, settings, say)
            for note in [*notes, *_past(out)]:
                say(f"note  {note}")
            trainer = Trainer(adapted, subject.forward, data, settings, mesh, out, fingerprint, written)
            resumed_at = trainer.goes_on_from() if settings.resume else None
            with reported(out, settings, about["settings"], resumed_at, on_metrics, say) as trainer.listener:
                return _run(trainer, subject, about, say, start)
        except Exception as error:
            if is_full_disk(error):
                raise full_disk(out) from error
            raise


def _check_cuts(settings: Settings, codec: Codec, config: dict[str, Any], mesh: Mesh, rules: Rules) -> None:
    """Whether the mesh can cut the base, before data and weights are read."""
    base_shardings(abstract_subject(settings, codec, config, ("0", "1")).params, mesh, rules)


def _silent(text: str) -> None:
    """Takes the place of `say` in processes that do not print."""


def _describe(adapted: jlora.Adapted, subject: Subject, data: Data, settings: Settings, say: Callable) -> None:
    """What is about to be trained, on what."""
    say(f"model {subject.directory}, {count(subject.params):,} parameters in {memory(subject, settings)}")
    say(f"data  {data.source}: {data.amounts()}")
    if settings.adapter is not None:
        say(f"goes on from the adapters in {settings.adapter}")
    say(jlora.summary(adapted))
    say(f"{settings.steps} steps of {settings.batch} rows, results in {settings.out}")


def _past(out: Path) -> list[str]:
    """What went wrong with this run before, if it is resumed after that."""
    found = read_complaint(out)
    return [] if found is None else [f"this run ended before: {found}; going on repeats its steps"]


def _run(trainer: Trainer, subject: Subject, about: dict[str, Any], say: Callable, start: float) -> Result:
    settings, out, texts = trainer.settings, trainer.out, []
    if settings.task != "classify" and settings.sample_tokens:
        asked = prompts(subject, trainer.data, settings)
        say("texts before the training, whose program is compiled first …")
        texts = _texts(subject, asked, samples(subject, asked, settings))
        say("\n".join(sample_lines(texts[0])))
    try:
        adapted, metrics = trainer.run()
    except DivergenceError as error:
        raise _gave_up(trainer, about, texts, error, start) from error
    shown = Shown(texts)
    if subject.labels:
        confusion, worst = _of_rows(trainer, subject, adapted)
        shown = Shown(labels=subject.labels, confusion=confusion, worst=worst)
    adapted = processes.whole_adapters(adapted)
    if texts:
        for text, after in zip(texts, samples(subject, asked, settings, adapted)):
            text["after"] = after
        write_json(out / SAMPLES, texts)
    save_adapters(out, adapted)
    found = complaint(metrics, settings, trainer.chosen())
    record = _results(trainer, metrics, start, found, shown)
    for note in (unsteady(metrics, settings), overfitting(metrics, settings)) if found is None else ():
        if note:
            about["notes"].append(note)
            say(f"note  {note}")
    write_json(out / RESULTS, record)
    write_report(out, about, record, metrics, adapted, shown)
    result = Result(out, adapted, record["before"], record["after"], record, found)
    _conclude(result, texts, say)
    return result


def _texts(subject: Subject, asked: Sequence[Prompt], before: Sequence[str]) -> list[dict[str, str]]:
    """The samples as `samples.json` has them, as yet without those after the training."""
    return [
        {"prompt": subject.codec.decode(each.tokens)}
        | ({} if each.wanted is None else {"wanted": each.wanted})
        | {"before": text}
        for each, text in zip(asked, before)
    ]


def _of_rows(trainer: Trainer, subject: Subject, adapted: jlora.Adapted) -> tuple[Any, list[Worst]]:
    """The confusion matrix of a classifier's validation, and its worst rows."""
    data, order = trainer.data, trainer.data.shortest_first()
    losses, predicted, right = trainer.rows(adapted)
    return of_rows(
        losses, predicted, right, subject.labels, lambda i: subject.codec.decode(data.validation[int(order[i])].tokens)
    )


def _gave_up(
    trainer: Trainer, about: dict[str, Any], texts: list[dict[str, str]], error: DivergenceError, start: float
) -> DivergenceError:
    """Writes the result and the report of a run that can't go on; the error, with what is left of it."""
    out, metrics = trainer.out, trainer.metrics
    assert metrics is not None
    record = _results(trainer, metrics, start, str(error), Shown(texts))
    write_json(out / RESULTS, record)
    write_report(out, about, record, metrics, trainer.adapted, Shown(texts))
    step = processes.by_first(lambda: last_whole(out / "checkpoints"))
    kept = (
        "there was no checkpoint yet" if step is None else f"the checkpoint of step {step} is the last one before that"
    )
    return DivergenceError(f"{error}; {kept}, and {out / REPORT} shows the run")


def _results(trainer: Trainer, metrics: Metrics, start: float, complaint: str | None, shown: Shown) -> dict[str, Any]:
    """The content of results.json, a classifier's confusion matrix included."""
    metric = trainer.settings.metric
    found = results(trainer.adapted, metrics, trainer.chosen(), metric, start, trainer.resumed_at, complaint)
    more = {} if shown.confusion is None else {"labels": list(shown.labels), "confusion": shown.confusion.tolist()}
    return found | more


def _conclude(result: Result, texts: list[dict[str, str]], say: Callable[[str], None]) -> None:
    for name, before in result.before.items():
        say(f"validation {name}: {before:.4f} before, {result.after[name]:.4f} after")
    if texts:
        say("\n".join(sample_lines(texts[0])))
    say(f"{result.record['seconds']} seconds; in {result.out}:")
    for line in folder.listing(result.out):
        say(line)
