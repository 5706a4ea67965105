"""The course of the learning rate, and the optimizer with its clipping."""

from __future__ import annotations

from collections.abc import Sequence

import optax

import jlora
from jlora.optimize.events import events_of
from jlora.training.run.optimizers import factory_of
from jlora.training.settings.fields import Settings


def learning_rate(settings: Settings, restarts: Sequence[int] = ()) -> optax.Schedule:
    """Linear warm-up from `peak / warmup`, then constant, or falling to 0 at the last step by a line or half a cosine.

    It rises anew after each restart, over as many steps as the warm-up.

    Args:
        settings: resolved, with steps counted.
        restarts: the steps after which a chain begins its next link.
    """
    peak, steps, warmup = settings.learning_rate, settings.steps, settings.warmup
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


def make_optimizer(adapted: jlora.Adapted, settings: Settings) -> optax.GradientTransformation:
    """The settings' optimizer as the methods need it, after clipping by the global norm; its state on the host if asked for."""
    tx = jlora.optimizer(
        adapted,
        factory_of(settings.optimizer, adapted),
        learning_rate=learning_rate(settings, restarts_of(adapted)),
        ratio=settings.lora_plus_ratio,
        weight_decay=settings.weight_decay,
    )
    tx = optax.chain(optax.clip_by_global_norm(settings.clip), tx) if settings.clip else tx
    return jlora.offload(tx) if settings.offload else tx
