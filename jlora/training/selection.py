"""From settings to a spec: which weights are adapted, and how."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax

import jlora
from jlora.training.errors import SettingError
from jlora.training.settings import CHAINS, Settings
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
    return {**head, pattern: _named(settings)}


def _named(settings: Settings) -> jlora.Method:
    """The method of `--method`, with rank, alpha and dropout."""
    assert settings.rank is not None and settings.alpha is not None
    rank: int = settings.rank
    options: Any = {"alpha": settings.alpha, "dropout": settings.dropout or 0.0}
    if settings.method in ("adalora", "elalora"):
        steps = settings.steps or 0
        # A tenth of the run to learn what matters, and three tenths with the ranks that are left.
        phases: Any = {"steps": settings.steps, "start_steps": steps // 10, "final_steps": 3 * steps // 10}
        interval = max(1, steps // 100)
        if settings.method == "adalora":
            # Half as many ranks again at the start, as in the paper.
            return jlora.AdaLoRA(rank=math.ceil(1.5 * rank), target=rank, interval=interval, **phases, **options)
        return jlora.ElaLoRA(rank=rank, interval=interval, **phases, **options)
    if settings.method in CHAINS:
        return _chain(settings, rank, options)
    method = jlora.LoRA(rank=rank, **options)
    return jlora.DoRA(method) if settings.method == "dora" else method


def _chain(settings: Settings, rank: int, options: dict[str, Any]) -> jlora.Method:
    """The chain of `--method`, with links of equal shares of the run; the base stays as it is."""
    links = {"raclora": jlora.RACLoRA, "xgblora": jlora.XGBLoRA}.get(settings.method, jlora.LoRA)
    # ReLoRA's paper prunes 99 of 100 moments by magnitude; the others clear them.
    pruned: Any = {"prune": 0.99, "by": "magnitude"} if settings.method == "relora" else {}
    assert settings.links is not None
    return jlora.Chain(links(rank=rank, **options), links=settings.links, steps=settings.steps, **pruned)


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


def adapt(subject: Subject, settings: Settings) -> jlora.Adapted:
    """The adapted model, its adapters drawn by the settings' seed."""
    key = jax.random.fold_in(jax.random.key(settings.seed), 0)
    return jlora.adapterize(subject.params, make_spec(subject, settings), key=key, sites=trace_sites(subject, settings))
