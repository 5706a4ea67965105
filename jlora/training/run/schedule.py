"""The course of the learning rate, and the optimizer with its clipping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import optax

import jlora
from jlora.optimize.events import events_of
from jlora.training.run.optimizers import factory_of
from jlora.training.settings.fields import Settings


def learning_rate(settings: Settings, restarts: Sequence[int] = (), peak: Any = None) -> optax.Schedule:
    """Linear warm-up from `peak / warmup`, then constant, or falling to 0 at the last step by a line or half a cosine.

    It rises anew after each restart, over as many steps as the warm-up.

    Args:
        settings: resolved, with steps counted.
        restarts: the steps after which a chain begins its next link.
        peak: the highest rate, where it is not that of the settings: one run's of a sweep, as a traced number.
    """
    peak = settings.learning_rate if peak is None else peak
    steps, warmup = settings.steps, settings.warmup
    assert peak is not None and steps is not None and warmup is not None
    rest = steps - warmup
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[settings.schedule]
    if not warmup:
        return after
    # From peak / warmup, not from 0: a first step with learning rate 0 would do nothing.
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    whole = optax.join_schedules([rise, after], [warmup])
    return jlora.restart_schedule(whole, restarts, warmup)


def restarts_of(adapted: jlora.Adapted) -> list[int]:
    """The steps after which the learning rate rises anew, by the events of the methods: a chain begins its next link."""
    return sorted({step for event in events_of(adapted) for step in getattr(event, "restarts", ())})


#: The settings that an optimizer can take as traced numbers.
NUMBERS = ("learning_rate", "weight_decay", "lora_plus_ratio", "clip")


def make_optimizer(
    adapted: jlora.Adapted, settings: Settings, numbers: Mapping[str, Any] | None = None
) -> optax.GradientTransformation:
    """The settings' optimizer as the methods need it, after clipping by the global norm; its state on the host if asked for.

    Args:
        adapted: what is trained.
        settings: resolved, with steps counted.
        numbers: what one run of a sweep has in place of some of the settings that `NUMBERS` names, as traced numbers.
    """
    value: dict[str, Any] = {name: getattr(settings, name) for name in NUMBERS} | dict(numbers or {})
    tx = jlora.optimizer(
        adapted,
        factory_of(settings.optimizer, adapted),
        learning_rate=learning_rate(settings, restarts_of(adapted), value["learning_rate"]),
        ratio=value["lora_plus_ratio"],
        weight_decay=value["weight_decay"],
    )
    clip = value["clip"]
    tx = tx if isinstance(clip, int | float) and clip == 0 else optax.chain(optax.clip_by_global_norm(clip), tx)
    return jlora.offload(tx) if settings.offload else tx
