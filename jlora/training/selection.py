"""From settings to a spec: which weights are adapted, and how."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
from jax.sharding import Mesh

import jlora
from jlora.training.data import Data
from jlora.training.errors import SettingError
from jlora.training.measured import with_ranks
from jlora.training.named import named
from jlora.training.settings import Settings
from jlora.training.subject import Subject, example_batch

HEAD = r"classifier/(kernel|bias)"


def trace_sites(subject: Subject, settings: Settings) -> Any:
    """How the model reads each weight, by one abstract trace."""
    return jlora.sites(subject.forward, subject.params, example_batch(settings))


def make_spec(subject: Subject, settings: Settings) -> dict[Any, Any]:
    """The spec of the (resolved) settings; a classification head is always trained in full.

    Raises:
        SettingError: for a method table that cannot be read.
    """
    head = {HEAD: jlora.Full()} if settings.task == "classify" else {}
    if settings.spec:
        return {
            **head,
            **{pattern: _method(pattern, table, settings.steps) for pattern, table in settings.spec.items()},
        }
    if settings.method == "probe":
        return head
    if settings.method == "full":
        # A pooler that the task does not use cannot be trained.
        unread = [leaf.path for leaf in trace_sites(subject, settings).leaves if not leaf.readings]
        return {**{re.escape(path): None for path in unread}, r".*": jlora.Full()}
    pattern = jlora.ALL_LINEAR if settings.targets == "all-linear" else settings.targets
    return {**head, pattern: named(settings)}


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


def adapt(subject: Subject, settings: Settings, data: Data, mesh: Mesh, ranks: dict[str, list[int]]) -> jlora.Adapted:
    """The adapted model, its adapters drawn by the settings' seed, with ranks measured on the training data or known."""
    key = jax.random.fold_in(jax.random.key(settings.seed), 0)
    sites = trace_sites(subject, settings)
    spec = with_ranks(make_spec(subject, settings), subject, settings, sites, data, mesh, ranks)
    return jlora.adapterize(subject.params, spec, key=key, sites=sites)
