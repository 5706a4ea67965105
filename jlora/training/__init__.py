"""The fine-tuning job: `finetune(Settings(...))`, and the command line `jlora`."""

from __future__ import annotations

from typing import Any

from jlora.training.settings.fields import Settings as Settings


def finetune(settings: Settings, **options: Any) -> Any:
    """Run the job; see `jlora.training.job.finetune`."""
    from jlora.training.job import finetune as run

    return run(settings, **options)
