"""Runs that go to PEFT, and adapters of PEFT that become runs."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jlora
from jlora import models
from jlora.models.chat_files import read_chat_templates, write_chat_templates
from jlora.models.files import hub_name
from jlora.training.commands.runs import Run, open_run
from jlora.training.files import write_json
from jlora.training.folder import check_new
from jlora.training.model.subject import load_subject, open_codec, prefix_of
from jlora.training.run.record import ADAPTERS, SETTINGS, run_of
from jlora.training.settings.defaults import resolve
from jlora.training.settings.fields import Settings


def open_run_or_adapters(path: str | Path, model: str | None) -> Run:
    """A run by its folder, or by the folder of its adapters; see `open_run`."""
    return open_run(run_of(path), model)


def export_run(run: Run, out: str | Path, profile: str, svd_rank: int | None, dtype: str | None) -> jlora.PeftReport:
    """Write a run's adapters as PEFT does, with the chat template that they were trained with.

    Raises:
        ValueError: for what the profile can't express.
        FileExistsError: if there is something already.
    """
    assert run.adapted is not None
    report = jlora.save_peft(
        out,
        run.adapted,
        models.peft_names(run.subject.model),
        profile,
        svd_rank=svd_rank,
        dtype=dtype,
        base_model=hub_name(run.directory) or str(run.directory),
        task_type=None if run.subject.labels else "CAUSAL_LM",
        prefix=prefix_of(run.subject.model),
    )
    if run.template is not None:
        write_chat_templates(out, run.template.texts())
    return report


def import_adapter(
    adapter: str | Path,
    model: str | None,
    out: str | Path,
    quantize: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> jlora.Adapted:
    """Make a run of an adapter of PEFT, which `jlora generate`, `eval`, `merge` and `export` take.

    Args:
        adapter: PEFT's folder.
        model: directory of the base; None is the shipped model.
        out: the run's folder, which must not exist.
        quantize: name of the code in whose form the base's linear weights are kept, as `--quantize` of a job: that on which
            the adapter was trained, such as "nf4" for QLoRA's.
        say: gets what the user must know of how the base was read, such as weights that the code does not take.

    Raises:
        ValueError: for an adapter that the model has no place for, and a name of no code.
        FileExistsError: if there is something already.
    """
    out = Path(out)
    check_new(out)
    asked = Settings(model=model, quantize=quantize)
    settings = resolve(asked)
    subject = load_subject(settings, *open_codec(settings))
    for note in subject.notes:
        say(f"note  {note}")
    adapted = jlora.load_peft(adapter, subject.params, models.peft_names(subject.model), prefix_of(subject.model))
    about = {name: dataclasses.asdict(value) for name, value in (("asked", asked), ("settings", settings))}
    source = {"model": str(subject.directory), "imported": str(adapter), "labels": []}
    write_run(out, adapted, about | source, {name: found.text for name, found in read_chat_templates(adapter).items()})
    return adapted


def write_run(out: Path, adapted: jlora.Adapted, about: dict[str, Any], templates: Mapping[str, str]) -> None:
    """Write a run without a training, whole or not at all.

    Args:
        out: its folder, which must not exist.
        adapted: its adapters.
        about: the content of its settings.json.
        templates: its chat templates by name; none where it reads no chats.
    """
    staging = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        jlora.save(staging / ADAPTERS, adapted)
        write_json(staging / SETTINGS, about)
        if templates:
            write_chat_templates(staging, templates)
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
