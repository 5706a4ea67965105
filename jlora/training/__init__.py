"""The fine-tuning job: `finetune(model=…, data=…)` or `finetune(Settings(...))`, and the command line `jlora`."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from jlora.training.settings.fields import Settings as Settings


def finetune(settings: Settings | None = None, say: Any = print, on_metrics: Any = None, **values: Any) -> Any:
    """Fine-tune a model, and leave adapters, metrics, plot and report in its output folder.

    Args:
        settings: what to do; by default the job's own choice in everything.
        say: takes the lines of text that the run prints beside its progress.
        on_metrics: called with every line of `metrics.jsonl` when it is written, as a dict with `step` and `kind`.
        values: settings by name, over those of `settings`: `model`, `data`, `method`, `steps` and all others, as the command
            line has them. `data` and `validation` may be rows instead of files: a list of dicts, a Hugging Face
            `datasets.Dataset`, or what else has `len(rows)` and `rows[0]`.

    Returns:
        A `jlora.training.job.Result`: `adapted` (base and trained adapters), `before`, `after`, `record`, `out`.

    What is raised is told by `jlora.training.job.finetune`.
    """
    from jlora.training.data.rows import GIVEN
    from jlora.training.job import finetune as run

    given = {n: values[n] for n in ("data", "validation") if not isinstance(values.get(n), str | os.PathLike | None)}
    values |= dict.fromkeys(given, GIVEN)
    values = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in values.items()}
    return run(dataclasses.replace(settings or Settings(), **values), say, on_metrics, given)
