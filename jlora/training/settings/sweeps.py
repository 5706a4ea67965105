"""What `--sweep` and `--seeds` stand for: several runs that differ in numbers, trained at once."""

from __future__ import annotations

import itertools
from typing import Any

from jlora.training.errors import SettingError, nearest

#: The settings that runs of one program may differ in, and the types of their values.
SWEPT: dict[str, type] = {
    "learning_rate": float, "weight_decay": float, "lora_plus_ratio": float, "clip": float, "alpha": float, "rank": int,
    "init": str, "seed": int,
}  # fmt: skip


def is_sweep(settings: Any) -> bool:
    """Whether the settings ask for several runs."""
    return bool(settings.sweep) or settings.seeds is not None


def check_sweep(settings: Any) -> None:
    """Whether what is swept can be.

    Raises:
        SettingError: for another setting, a value that is none, a value twice, or settings that a sweep can't have.
    """
    if not is_sweep(settings):
        return
    for name, values in settings.sweep.items():
        _values(name, values)
    if "seed" in settings.sweep and settings.seeds is not None:
        raise SettingError("seeds", "and seed in --sweep both say which seeds: give one of them")
    for name, why in (
        ("mesh", "a sweep runs on one device"),
        ("offload", "a sweep keeps its moments on the device"),
        ("report_to", "its runs are compared on a page"),
        ("best", "its runs end with their last adapters"),
    ):
        if getattr(settings, name):
            raise SettingError(name, f"can't be given with --sweep or --seeds: {why}")
    if settings.adapter is not None:
        for name in ("rank", "alpha", "init"):
            if name in settings.sweep:
                raise SettingError(
                    "sweep", f"{name} can't be given with adapter {settings.adapter}, whose adapters have their own"
                )
    if settings.metric != "loss":
        raise SettingError("metric", "of a sweep is the loss")
    if "rank" in settings.sweep and settings.optimizer in ("adafactor", "muon"):
        raise SettingError(
            "optimizer", f"{settings.optimizer} sees what fills up smaller ranks: sweep rank with adamw or lion"
        )


def points(settings: Any) -> list[dict[str, Any]]:
    """The values of each run, those of the last name changing fastest, and those of the seed before all others.

    `--sweep learning-rate=1e-4,3e-4 --seeds 2` are `[{"learning_rate": 1e-4, "seed": 0}, {"learning_rate": 1e-4, "seed": 1},
    ..]`.
    """
    axes = {name.replace("-", "_"): _values(name, values) for name, values in settings.sweep.items()}
    if settings.seeds is not None:
        axes["seed"] = list(range(settings.seed, settings.seed + settings.seeds))
    elif "seed" in axes:
        axes["seed"] = axes.pop("seed")
    return [dict(zip(axes, combination)) for combination in itertools.product(*axes.values())]


def _values(name: str, values: Any) -> list[Any]:
    """The values of a swept setting, as its type.

    Raises:
        SettingError: where they can't be.
    """
    key, word = name.replace("-", "_"), name.replace("_", "-")
    if key not in SWEPT:
        near = nearest(key, list(SWEPT))
        hint = f"; did you mean {near.replace('_', '-')}?" if near else ""
        known = ", ".join(each.replace("_", "-") for each in SWEPT)
        raise SettingError(
            "sweep",
            f"can't train runs of different {word} in one program, only of {known}{hint}; train the others by commands of "
            "their own",
        )
    if not isinstance(values, list) or not values:
        raise SettingError("sweep", f"{word} must be a list of values, got {values!r}")
    kind = SWEPT[key]
    try:
        found = [kind(each) for each in values]
    except (TypeError, ValueError) as error:
        words = {float: "numbers", int: "whole numbers", str: "texts"}[kind]
        raise SettingError("sweep", f"{word} must be {words}, got {', '.join(map(str, values))}") from error
    if len(set(found)) < len(found):
        raise SettingError("sweep", f"{word} has a value twice: {', '.join(map(str, values))}")
    return found
