"""From settings to a spec: which weights are adapted, and how."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
from jax.sharding import Mesh

import jlora
from jlora.core.protocol.statistics import RESIDUAL
from jlora.core.protocol.wrapping import innermost, parts
from jlora.prompts.virtual import Virtual
from jlora.training.data.dataset import Data
from jlora.training.errors import SettingError
from jlora.training.model.measured import with_measured
from jlora.training.model.prepared import prepared
from jlora.training.model.subject import Subject, example_batch
from jlora.training.settings.fields import Settings
from jlora.training.settings.named import named, recipe_of

HEAD = r"classifier/(kernel|bias)"


def trace_sites(subject: Subject, settings: Settings) -> Any:
    """How the model reads each weight, by one abstract trace."""
    return jlora.sites(subject.forward, subject.params, example_batch(settings))


def make_spec(subject: Subject, settings: Settings) -> dict[Any, Any]:
    """The spec of the (resolved) settings; a classification head is always trained in full.

    Raises:
        SettingError: for a method table that cannot be read, and a start that a job can't make.
    """
    spec = _spec(subject, settings)
    for pattern, method in spec.items():
        if method is not None and RESIDUAL in method.needs and settings.quantize is None:
            raise SettingError(
                "spec" if settings.spec else "init",
                (f"entry {pattern!r}: " if settings.spec else "")
                + f"{method} starts from what a quantized base lost: say --quantize, or quantize it in Python, by "
                "jlora.loftq or jlora.residuals",
            )
        if method is not None:
            check_method(method, subject, settings, "spec" if settings.spec else "method")
    return spec


def check_method(method: jlora.Method, subject: Subject, settings: Settings, field: str) -> None:
    """Whether a job can train the method on this model.

    Raises:
        SettingError: for a method that calls have to tell something, under the name of the setting that it is from; and as
            `check_prompts`.
    """
    for part in parts(method):
        if part.must_be_told:
            raise SettingError(
                field, f"{method} must be told {part.must_be_told}, which a job can't: train it in a loop of your own"
            )
    if isinstance(inside := innermost(method), Virtual):
        check_prompts(inside, subject, settings, field)


def check_prompts(method: Virtual, subject: Subject, settings: Settings, field: str) -> None:
    """Whether the model can have virtual tokens in front of its texts.

    Raises:
        SettingError: for an encoder, under the name of the setting that the method is from, and rows that are too long then.
    """
    longest = subject.config.get("max_position_embeddings")
    if subject.config.get("model_type") in ("bert", "roberta"):
        raise SettingError(
            field,
            f"{method} puts virtual tokens in front of a text, over which an encoder's result would be pooled too",
        )
    if settings.max_length is not None and longest is not None and settings.max_length + method.tokens > longest:
        raise SettingError(
            "max_length",
            f"of {settings.max_length} and {method.tokens} virtual tokens are more than the {longest} positions of the model",
        )


def _spec(subject: Subject, settings: Settings) -> dict[Any, Any]:
    head = {HEAD: jlora.Full()} if settings.task == "classify" else {}
    if settings.spec:
        return {
            **head,
            **{pattern: _method(pattern, table, settings.steps) for pattern, table in settings.spec.items()},
        }
    recipe = recipe_of(settings)
    if recipe is None:
        return head
    if recipe.targets == "all":
        # A pooler that the task does not use cannot be trained.
        unread = [leaf.path for leaf in trace_sites(subject, settings).leaves if not leaf.readings]
        return {**{re.escape(path): None for path in unread}, r".*": named(settings)}
    return {**head, _pattern(subject, settings): named(settings)}


def _pattern(subject: Subject, settings: Settings) -> Any:
    """What `targets` stands for in a spec."""
    if settings.targets == "all-linear":
        return jlora.ALL_LINEAR
    if settings.targets != "embedding":
        return settings.targets
    # Positions and types of tokens are looked up too, but in matrices of other sizes.
    looked_up = [leaf for leaf in trace_sites(subject, settings).leaves if leaf.kind == "gather"]
    found = [leaf.path for leaf in looked_up if subject.config["vocab_size"] in leaf.shape]
    if not found:
        raise SettingError("targets", f"embedding: no weight of {subject.directory} is looked up by tokens")
    return "|".join(map(re.escape, found))


def _method(pattern: str, table: Any, steps: int | None) -> Any:
    """A method of a `[spec]` table; `"frozen"` keeps what the pattern matches as it is."""
    if table == "frozen":
        return None
    if not isinstance(table, dict):
        raise SettingError(
            "spec", f'entry {pattern!r} must be a table such as {{method = "LoRA", rank = 8}}, got {table!r}'
        )
    try:
        return _of_run(jlora.method_from_dict(table), steps)
    except (ValueError, TypeError, KeyError) as error:
        raise SettingError("spec", f"entry {pattern!r}: {error}") from error


def _of_run(method: jlora.Method, steps: int | None) -> jlora.Method:
    """The method, and those inside it, with the run's number of steps where they leave theirs open."""
    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    changed: dict[str, Any] = {n: _of_run(v, steps) for n, v in values.items() if isinstance(v, jlora.Method)}
    if "steps" in values and values["steps"] is None:
        changed["steps"] = steps
    return dataclasses.replace(method, **changed)


def adapt(subject: Subject, settings: Settings, data: Data, mesh: Mesh, known: dict[str, Any]) -> jlora.Adapted:
    """The adapted model, its adapters drawn by the settings' seed.

    What methods take from the training data, hyperparameters and starts, is measured here; hyperparameters of a run that is
    resumed are known.
    """
    key = jax.random.fold_in(jax.random.key(settings.seed), 0)
    sites = trace_sites(subject, settings)
    spec = with_measured(make_spec(subject, settings), subject, settings, sites, data, mesh, known)
    starts = prepared(spec, subject, settings, sites, data, mesh, key)
    return jlora.adapterize(subject.params, spec, key=key, sites=sites, prepared=starts)
