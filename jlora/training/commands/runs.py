"""A finished run, opened again: to merge, to generate, to evaluate."""

from __future__ import annotations

import collections
import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import jlora
from jlora import models
from jlora.models.chat_files import write_chat_templates
from jlora.models.merged import lazily_merged
from jlora.training.data import chat
from jlora.training.data.dataset import arranged, encode, most_texts, notes_on, subset
from jlora.training.data.pipeline import validation_batches
from jlora.training.data.rows import read_rows
from jlora.training.files import write_json
from jlora.training.folder import check_new
from jlora.training.hosts.placement import make_mesh
from jlora.training.model.loop import make_evaluation, to_devices
from jlora.training.model.preferences import objective_of
from jlora.training.model.scores import summarize
from jlora.training.model.subject import Subject, load_subject, open_codec
from jlora.training.run.record import ADAPTERS, check_finished, read_settings
from jlora.training.settings.fields import Settings


@dataclasses.dataclass(frozen=True)
class Run:
    """A model with what a run trained.

    Attributes:
        settings: of the run, resolved.
        subject: the base.
        adapted: base and trained adapters; None for a base alone.
        directory: where the base lies.
        template: how its chats became text; None if it read none.
    """

    settings: Settings
    subject: Subject
    adapted: jlora.Adapted | None
    directory: Path
    template: chat.Template | None = None


def open_run(out: str | Path, model: str | None = None) -> Run:
    """Open an output folder.

    Args:
        out: the folder.
        model: directory of the base, where it is no longer where the run found it.

    Raises:
        CheckpointError: if the folder holds no finished run.
        ValueError: if the base is not the one that the run was trained on.
    """
    about = read_settings(out)
    check_finished(out, about)
    settings = Settings(**about["settings"])
    settings = dataclasses.replace(settings, model=model or settings.model)
    subject = load_subject(settings, *open_codec(settings))
    subject = subject.with_head(about["labels"]) if about["labels"] else subject
    adapted, template = jlora.load(Path(out) / ADAPTERS, subject.params), chat.stored(out, subject.directory)
    return Run(settings, subject, adapted, subject.directory, template)


def evaluate_file(
    run: Run,
    path: str | Path,
    max_rows: int | None = None,
    base: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, float]:
    """Loss with perplexity or accuracy on a file, read as the run read its data; notes on its rows go to `say`.

    Raises:
        DataError: for a row that cannot be used, naming file and line.
    """
    settings, subject = run.settings, run.subject
    assert settings.max_length is not None and settings.batch is not None
    rows = subset(read_rows(path, settings.format), max_rows, settings.seed)
    counts: collections.Counter[str] = collections.Counter()
    kept = run.template
    template = (lambda: kept) if kept is not None else None
    examples = encode(rows, settings, subject.codec, subject.labels, counts, template)
    for note in notes_on(counts, settings):
        say(f"note  {note}")
    fixed = bool(settings.packing)
    examples = arranged(examples, settings)
    longest = settings.max_length if fixed else max(map(len, examples))
    mesh = make_mesh({})
    batches = [to_devices(batch, mesh) for batch in validation_batches(examples, settings.batch, longest, fixed)]
    assert run.adapted is not None
    plain = run.adapted.replace(params={}, frozen={}, plan=dataclasses.replace(run.adapted.plan, sites=()))
    evaluate = make_evaluation(
        subject.forward, texts=most_texts(examples), objective=objective_of(settings, subject.forward)
    )
    found = evaluate(plain if base else run.adapted, batches)
    return summarize(found, bool(subject.labels))


def write_merged(run: Run, directory: str | Path) -> None:
    """Write the merged model as a Hugging Face directory, whole or not at all.

    Leaves are merged one at a time while they are written: beside the base, one leaf and one shard are in memory. The chat
    template is the one that the run was trained with.

    A classifier's directory holds the encoder; its head, which no class of transformers has in this form, lies beside
    it in `classifier.safetensors` (`kernel [hidden, labels]`, `bias [labels]`, on the pooled last hidden states) with
    `labels.json`. Encoders are pooled by the mean over tokens, decoders by the last token.

    Raises:
        FileExistsError: if the directory exists.
    """
    directory = Path(directory)
    check_new(directory)
    params = run.subject.params if run.adapted is None else lazily_merged(run.adapted)
    staging = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    try:
        if not run.subject.labels:
            texts = run.template.texts() if run.template is not None else {}
            extra = (lambda place: write_chat_templates(place, texts)) if texts else None
            models.save(staging, run.subject.model, params, source=run.directory, extra=extra)
        else:
            models.save(staging, run.subject.model.backbone, params["backbone"], source=run.directory)
            head = {name: np.ascontiguousarray(np.asarray(leaf)) for name, leaf in params["classifier"].items()}
            save_file(head, staging / "classifier.safetensors")
            write_json(staging / "labels.json", list(run.subject.labels))
        os.replace(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
