"""Adapters that a run goes on from (`--adapter`): looked at before model and data are read, then read onto the base."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

import jlora
from jlora import models, paths
from jlora.core.protocol.job import hyperparameters
from jlora.core.protocol.wrapping import parts
from jlora.disk import folders
from jlora.models.chat_files import read_chat_templates
from jlora.training.data.dataset import Data
from jlora.training.errors import SettingError
from jlora.training.model.selection import HEAD, adapt, check_method, make_spec
from jlora.training.model.subject import Subject, prefix_of
from jlora.training.run.record import SETTINGS, check_finished, read_settings, run_of
from jlora.training.settings.fields import Settings


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the adapters lie that a run goes on from.

    Attributes:
        adapter: the folder, as it was given.
        folder: that of the run that they are of, or the same folder.
        about: the `settings.json` of that run; empty where the adapters lie by themselves.
    """

    adapter: str
    folder: Path
    about: dict[str, Any]


def source_of(settings: Settings) -> Source | None:
    """Where the adapters of `--adapter` lie; None where there is none. Nothing large is read.

    Raises:
        SettingError: for a classifier's adapters in a run that is none, and the other way round.
        CheckpointError: a ValueError, for a run that is not finished, and a sweep.
        FileNotFoundError: if there is no such folder.
        ValueError: for a folder that holds no adapters.
    """
    if settings.adapter is None:
        return None
    folder = run_of(settings.adapter)
    about = read_settings(folder) if (folder / SETTINGS).exists() else {}
    if about:
        check_finished(folder, about)
        task = about["settings"]["task"]
        if "classify" in (task, settings.task) and task != settings.task:
            raise SettingError(
                "adapter",
                f"{settings.adapter} is of a run of --task {task}, and this one is of --task {settings.task}: their models "
                "end in other heads",
            )
    folders.find(settings.adapter)
    return Source(settings.adapter, folder, about)


def check_labels(source: Source | None, labels: Sequence[str]) -> None:
    """Refuses a classifier's adapters whose head was trained for other labels.

    Raises:
        SettingError: with both.
    """
    known = [] if source is None else source.about.get("labels", [])
    if source is not None and known and known != list(labels):
        raise SettingError(
            "adapter",
            f"{source.adapter} was trained on the labels {', '.join(known)}, but the data has {', '.join(labels)}: its "
            "head says something else",
        )


def notes_on(source: Source | None, settings: Settings, data: Data) -> list[str]:
    """What the user must know of a run that goes on from adapters."""
    if source is None:
        return []
    found = []
    if data.labels and not source.about:
        found.append(
            f"{source.adapter} does not say what labels its head was trained for: it is taken for one of "
            f"{', '.join(data.labels)}, in this order"
        )
    if settings.task == "preference":
        found.append(
            "the reference is the base without adapters; to hold the model near those of --adapter, jlora merge them into a "
            "model and train new ones on that"
        )
    before = {name: each.text for name, each in read_chat_templates(source.folder).items()}
    if before and data.template is not None and before != data.template.texts():
        found.append(f"{source.adapter} was trained on chats of another template, which lies in {source.folder}")
    return found


def first_adapters(
    subject: Subject, settings: Settings, data: Data, mesh: Mesh, known: dict[str, Any]
) -> jlora.Adapted:
    """The adapters that a run starts with: those of `--adapter`, or new ones (see `jlora.training.model.selection.adapt`)."""
    return adapt(subject, settings, data, mesh, known) if settings.adapter is None else read_adapters(subject, settings)


def read_adapters(subject: Subject, settings: Settings) -> jlora.Adapted:
    """The adapters of `--adapter` on the subject's params, or as shapes where these are shapes.

    Raises:
        SettingError: for a method that follows the steps of its own run, a classifier without its head, and as
            `check_method`.
        ValueError: for adapters of another base, and as `jlora.load` and `jlora.load_peft`.
    """
    assert settings.adapter is not None
    names, prefix = models.peft_names(subject.model), prefix_of(subject.model)
    adapted = folders.read(settings.adapter, subject.params, names, prefix)
    for site in adapted.plan.sites:
        if any("steps" in hyperparameters(type(part)) for part in parts(site.method)):
            raise SettingError(
                "adapter",
                f"{settings.adapter} has {site.method} at {site.path}, which follows the steps of the run that it was made "
                "for and has come to their end: make plain LoRA of it, by jlora merge-adapters RUN --weights 1 --to NEW "
                "or jlora.combine([adapted], [1.0]), and go on from that",
            )
        check_method(site.method, subject, settings, "adapter")
    if settings.task == "classify":
        adapts = {site.path for site in adapted.plan.sites}
        heads = ["/".join(keys) for keys, _ in paths.flatten_with_keys(subject.params)[0]]
        if missing := [path for path in heads if re.fullmatch(HEAD, path) and path not in adapts]:
            raise SettingError(
                "adapter", f"{settings.adapter} has no trained {missing[0]}, which --task classify needs"
            )
    return adapted


def shown_adapters(subject: Subject, settings: Settings, sites: jlora.Sites) -> jlora.Adapted:
    """The adapters that a run would start with as shapes, on params that are shapes."""
    if settings.adapter is not None:
        return read_adapters(subject, settings)
    return jlora.adapterize(subject.params, make_spec(subject, settings), sites=sites)


def continued(settings: Settings, adapted: jlora.Adapted) -> dict[str, Any]:
    """What `settings.json` says of the adapters that a run goes on from: the folder, and a digest of values and methods."""
    if settings.adapter is None:
        return {}
    values = jlora.fingerprint({"params": adapted.params, "frozen": adapted.frozen})
    told = json.dumps([values, [[site.path, str(site.method)] for site in adapted.plan.sites]])
    return {"continued": {"adapter": settings.adapter, "sha256": hashlib.sha256(told.encode()).hexdigest()}}
