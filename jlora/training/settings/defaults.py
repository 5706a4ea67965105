"""What the job chooses where a setting is left open, and how many steps that makes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jlora.core.protocol.job import Recipe
from jlora.training.errors import SettingError
from jlora.training.settings.fields import Settings, has_method, trains_adapters
from jlora.training.settings.hyperparameters import checked
from jlora.training.settings.named import chosen, named, recipe_of
from jlora.training.settings.sweeps import is_sweep
from jlora.training.settings.told import DEFAULT

# Measured with 150 steps of 16 x 128 tokens: validation loss 6.12 before; after, with rank 16, 2.67 at a learning rate of 3e-3,
# 2.51 at 1e-2, 2.63 at 2e-2; with rank 32, 2.49 at 1e-2. Rows of 256 tokens cost 1.8 times as much a token, in attention.
_SHIPPED_MODEL = {"rank": 16, "learning_rate": 1e-2}
_DEFAULT_JOB = {"steps": 250, "batch": 16, "max_length": 128, "prompt": "If the function is called"}
# On 2,500 rows of SST-2 by MiniLM accuracy was 0.72 at 5e-4, 0.78 from 2e-3 to 1e-2, 0.76 at 3e-2.
_RATE_OF_PROBE = 5e-3
# Multiples of AdamW's usual rate. Sixty steps of 8 x 64 tokens on the shipped model: AdamW at 1e-2 came to a validation loss
# of 3.29, Lion at 1e-3 to 3.51, at 3e-3 to 3.25.
_RATES = {"lion": 0.3}
# Steps between two validations or checkpoints at least, where the user doesn't say: each costs as much as some steps.
_INTERVAL = 10
_TASK = {
    "lm": {"max_length": 256, "batch": 16, "epochs": 1.0, "packing": True},
    "classify": {"max_length": 128, "batch": 32, "epochs": 3.0, "packing": False},
    "preference": {
        "max_length": 512, "batch": 16, "epochs": 1.0, "packing": False,
        "preference_loss": "dpo", "beta": 0.1, "label_smoothing": 0.0,
    },
}  # fmt: skip
# The loss of preferences moves in sums over an answer's tokens, where that of --task lm moves in means.
_RATE_OF_PREFERENCES = 0.1


def resolve(settings: Settings) -> Settings:
    """The settings with everything chosen that does not depend on the amount of data."""
    values, recipe = dict(_TASK[settings.task]), recipe_of(settings)
    values["best"] = not is_sweep(settings) and (settings.metric != "loss" or settings.patience is not None)
    values["learning_rate"] = _RATE_OF_PROBE if recipe is None else recipe.learning_rate
    if settings.validation is None:
        values["validation_fraction"] = 0.1
    if settings.adapter is None:
        values["method"] = DEFAULT
    if recipe is not None and has_method(settings):
        values |= _of_method(recipe, settings)
    if settings.model is None and trains_adapters(settings):
        # A model this small wants larger steps than the usual ones, but for methods that want still larger ones anyway.
        values["learning_rate"] = max(_SHIPPED_MODEL["learning_rate"], values["learning_rate"])
    values["learning_rate"] *= _RATES.get(settings.optimizer, 1.0)
    if settings.task == "preference":
        values["learning_rate"] *= _RATE_OF_PREFERENCES
    if settings.model is None and settings.data is None:
        values |= _DEFAULT_JOB
    if settings.steps is not None or (settings.epochs is None and "steps" in values):
        values.pop("epochs", None)
    elif settings.epochs is not None:
        values.pop("steps", None)
    left_open = {name: value for name, value in values.items() if getattr(settings, name) is None}
    settings = dataclasses.replace(settings, **left_open)
    if recipe is None or not has_method(settings):
        return settings
    if settings.alpha is None and settings.rank is not None and recipe.has("alpha"):
        settings = dataclasses.replace(settings, alpha=recipe.alpha * settings.rank)
    # As the types that they have, so that settings from a flag and from a file are the same.
    settings = dataclasses.replace(settings, set=checked(chosen(settings), settings.set))
    named(settings)  # refuses hyperparameters that can't be, before model and data are read
    return settings


def _of_method(recipe: Recipe, settings: Settings) -> dict[str, Any]:
    """The defaults that follow from a method's recipe."""
    values: dict[str, Any] = {} if recipe.targets == "all" else {"targets": recipe.targets}
    if recipe.has("rank") and recipe.rank != 0:
        usual = 8 if settings.model is not None else _SHIPPED_MODEL["rank"]
        values["rank"] = recipe.rank or usual
    if recipe.has("dropout"):
        values["dropout"] = 0.0
    if recipe.has("links"):
        values["links"] = min(recipe.links, settings.steps or recipe.links)
    return values


def usual_rate(settings: Settings) -> float:
    """The learning rate that the job chooses where the user leaves it open."""
    rate = resolve(dataclasses.replace(settings, learning_rate=None)).learning_rate
    assert rate is not None
    return rate


def count_steps(settings: Settings, rows: int, parts: int = 1) -> Settings:
    """The settings with steps, warm-up and intervals counted out for `rows` rows of training data.

    A batch takes at most all rows, so that no row is in it twice. On short runs validations and checkpoints are at least
    `_INTERVAL` steps apart.

    Args:
        settings: resolved.
        rows: rows of training data.
        parts: in how many parts the mesh cuts the rows that are computed at once.

    Raises:
        SettingError: if there are fewer rows than a batch must have, the warm-up is as long as the run, or there are more
            links than steps.
    """
    batch, steps = _batch(settings, rows, parts), settings.steps
    if steps is None:
        assert settings.epochs is not None
        steps = max(1, math.ceil(settings.epochs * rows / batch))
    warmup = settings.warmup if settings.warmup is not None else min(steps - 1, math.ceil(0.03 * steps))
    if warmup >= steps:
        raise SettingError("warmup", f"must be less than the {steps} steps, got {warmup}")
    if settings.links is not None and settings.links > steps:
        raise SettingError("links", f"must be at most the {steps} steps, got {settings.links}")
    return dataclasses.replace(
        settings,
        batch=batch,
        steps=steps,
        epochs=None,
        warmup=warmup,
        evaluate_every=settings.evaluate_every or _interval(steps, 5),
        checkpoint_every=settings.checkpoint_every or _interval(steps, 10),
    )


def _batch(settings: Settings, rows: int, parts: int) -> int:
    """The batch, or the largest one that the rows are enough for."""
    assert settings.batch is not None
    unit = settings.accumulate * parts
    if settings.batch <= rows or settings.batch % unit:  # what does not divide is an error elsewhere
        return settings.batch
    if rows < unit:
        raise SettingError(
            "batch",
            f"takes {settings.batch} rows in {unit} parts, but the training data makes {rows} of them: give more data, "
            "fewer parts (--accumulate, --mesh), or a smaller --max-length",
        )
    return rows // unit * unit


def _interval(steps: int, times: int) -> int:
    """Steps between `times` equal parts of the run, or fewer parts of `_INTERVAL` steps each."""
    return math.ceil(steps / max(1, min(times, steps // _INTERVAL)))
