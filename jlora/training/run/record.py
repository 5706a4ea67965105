"""What a run writes about itself into its folder, and what is read of it: settings, results, adapters."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import time
from pathlib import Path
from typing import Any

import jlora
from jlora.core.tree.adapted import count
from jlora.disk.json_files import ILL_FORMED, read_object, shown
from jlora.interchange.files.folder import CONFIG
from jlora.models.chat_files import write_chat_templates
from jlora.training.data.dataset import Data
from jlora.training.errors import CheckpointError, SettingError
from jlora.training.files import write_json
from jlora.training.hosts import processes
from jlora.training.hosts.versions import versions
from jlora.training.model.subject import Subject
from jlora.training.reporting.metrics import Metrics, Record
from jlora.training.run.best import best_of
from jlora.training.run.checkpoint import last_whole
from jlora.training.settings.fields import Settings

SETTINGS, RESULTS, SAMPLES, ADAPTERS = "settings.json", "results.json", "samples.json", "adapters"


def about_run(asked: Settings, settings: Settings, subject: Subject, data: Data, fingerprint: str) -> dict[str, Any]:
    """The content of settings.json."""
    return {
        "asked": dataclasses.asdict(asked),
        "settings": dataclasses.asdict(settings),
        "model": str(subject.directory),
        "base": fingerprint,
        "data": data.source,
        "data_sha256": data.digest(),
        "labels": data.labels,
        "versions": versions(),
    }


def read_settings(out: str | Path) -> dict[str, Any]:
    """The content of a run's settings.json.

    Raises:
        CheckpointError: if the folder holds no run, or the file is damaged.
    """
    path = Path(out) / SETTINGS
    try:
        found = read_object(path)
        for part in ("asked", "settings"):
            Settings(**found[part])
        if not isinstance(found["labels"], list):
            raise ValueError(f"labels must be a list, got {shown(found['labels'])}")
        return found
    except FileNotFoundError as error:
        hint = f"; make one of this adapter by jlora import {out} --to RUN" if Path(out, CONFIG).exists() else ""
        raise CheckpointError(f"{out} holds no run (no {SETTINGS}){hint}") from error
    except ILL_FORMED as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise CheckpointError(f"{path} is damaged or from another version: {reason}") from error


def run_of(path: str | Path) -> Path:
    """The folder of a run, which may be named by that of its adapters."""
    path = Path(path)
    inside = path.name == ADAPTERS and not (path / SETTINGS).exists() and (path.parent / SETTINGS).exists()
    return path.parent if inside else path


def check_finished(out: str | Path, about: dict[str, Any]) -> None:
    """Refuses a run that has no adapters, by its folder and its settings.json.

    Raises:
        CheckpointError: with what to do.
    """
    if about["settings"].get("sweep") or about["settings"].get("seeds"):
        raise CheckpointError(f"{out} holds a sweep: name one of its runs, {out}/runs/...")
    if not (Path(out) / ADAPTERS).is_dir():
        why = read_complaint(out) or f"the run is not finished; go on with jlora finetune --out {out} --resume"
        raise CheckpointError(f"{out} has no adapters: {why}")


def resumable(out: str) -> dict[str, Any]:
    """The settings.json of a run that can go on."""
    stored = read_settings(out)
    if "sweep" in stored:
        raise CheckpointError(f"{out} is one run of the sweep in {stored['sweep']}; go on with that by --resume")
    for source in ("imported", "combined"):
        if source in stored:
            raise CheckpointError(
                f"{out} holds an adapter {source} from {stored[source]}, and no training to go on with"
            )
    return stored


def measured_before(stored: dict[str, Any]) -> dict[str, Any]:
    """What was measured when a run began; earlier releases measured only ranks, and wrote them as `ranks`."""
    return stored.get("measured", stored.get("ranks", {}))


def begin(out: Path, about: dict[str, Any], data: Data, settings: Settings) -> None:
    """Write settings.json, or check a resumed run against it; and the chat template."""
    if settings.resume:
        # In process 0, whose paths are stored; what lies at those of the others has been compared with it.
        processes.by_first(lambda: _check_resumed(out, about, settings))
    else:
        write_json(out / SETTINGS, about)
    if data.template is not None:
        write_chat_templates(out, data.template.texts())


def _check_resumed(out: Path, about: dict[str, Any], settings: Settings) -> None:
    """A resumed run stands on what it was started with."""
    stored = read_settings(out)
    # A run of an earlier release has no value for what came later.
    old_settings = dataclasses.asdict(Settings(**stored["settings"]))
    for field in dataclasses.fields(Settings):
        new, old = about["settings"][field.name], old_settings[field.name]
        if new != old and not field.metadata["resumable"]:
            raise SettingError(
                field.name, f"is {new!r}, but the run in {out} was started with {old!r}, which must stay"
            )
    if stored.get("data_sha256") != about["data_sha256"]:
        raise CheckpointError(f"the training data ({about['data']}) is not what the run in {out} was started with")
    if stored.get("continued") != about.get("continued"):
        raise CheckpointError(
            f"the adapters in {settings.adapter} are not those that the run in {out} was started with: sha256 "
            f"{about['continued']['sha256']}, wanted {stored['continued']['sha256']}"
        )
    if stored.get("base") != about["base"]:
        raise CheckpointError(
            f"the model in {about['model']} is not the one that the run in {out} was started with: fingerprint "
            f"{about['base']}, wanted {stored.get('base')}"
        )


def results(
    adapted: jlora.Adapted,
    metrics: Metrics,
    chosen: Record,
    metric: str,
    start: float,
    resumed_at: int,
    complaint: str | None,
) -> dict[str, Any]:
    """The content of results.json.

    Args:
        adapted: base and adapters.
        metrics: the lines of metrics.jsonl.
        chosen: the validation of the adapters that the run ends with.
        metric: that the run is judged by.
        start: when it was started or resumed, in seconds since 1970.
        resumed_at: the step that it went on from; 0 for its beginning.
        complaint: what is wrong with it, or None.
    """
    aside = ("step", "kind", "weight")
    before, after = (
        {name: value for name, value in record.items() if name not in aside}
        for record in (metrics.of("validation")[0], chosen)
    )
    train, best = metrics.of("train"), best_of(metrics.of("validation"), metric)
    return {
        "before": before,
        "after": after,
        "steps": len(train),
        "step": chosen["step"],
        "best_step": None if best is None else best["step"],
        "train_loss": train[-1]["loss"] if train else None,
        "trained_values": count(adapted.params),
        "base_values": count(adapted.base),
        "seconds": round(time.time() - start, 1),
        "resumed_at": resumed_at,
        "complaint": complaint,
    }


def read_complaint(out: str | Path) -> str | None:
    """What `results.json` of a run finds wrong with it, if there is one already."""
    path = Path(out) / RESULTS
    return read_object(path).get("complaint") if path.exists() else None


def save_adapters(out: Path, adapted: jlora.Adapted) -> None:
    """Write the adapters beside those of an earlier end of the same run, then put them in their place."""
    if not processes.first():
        jlora.save(out / ADAPTERS, adapted)  # writes nothing here, but process 0 waits for it
        return
    new, old = out / f".{ADAPTERS}.new", out / f".{ADAPTERS}.old"
    for rest in (new, old):
        shutil.rmtree(rest, ignore_errors=True)
    jlora.save(new, adapted)
    if (out / ADAPTERS).exists():
        os.replace(out / ADAPTERS, old)
    os.replace(new, out / ADAPTERS)
    shutil.rmtree(old, ignore_errors=True)


def full_disk(out: Path) -> OSError:
    """One sentence for a full disk."""
    step = last_whole(out / "checkpoints")
    kept = "there is no whole checkpoint yet" if step is None else f"the checkpoint of step {step} is whole"
    return OSError(errno.ENOSPC, f"the disk of {out} is full; {kept}: free some space and go on with --resume")
