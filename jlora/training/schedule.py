"""The course of the learning rate, and the optimizer with its clipping."""

from __future__ import annotations

import optax

import jlora
from jlora.training.settings import Settings


def learning_rate(settings: Settings) -> optax.Schedule:
    """Linear warm-up from 0, then constant, or falling to 0 at the last step by a line or half a cosine.

    With links of a chain it rises anew at the start of each, over as many steps as the warm-up.

    Args:
        settings: resolved, with steps counted.
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
    return jlora.restart_schedule(whole, jlora.link_ends(settings.links, steps), warmup) if settings.links else whole


def make_optimizer(adapted: jlora.Adapted, settings: Settings) -> optax.GradientTransformation:
    """AdamW as the methods need it, after clipping by the gradient's global norm."""
    tx = jlora.optimizer(
        adapted,
        optax.adamw,
        learning_rate=learning_rate(settings),
        ratio=settings.lora_plus_ratio,
        weight_decay=settings.weight_decay,
    )
    return optax.chain(optax.clip_by_global_norm(settings.clip), tx) if settings.clip else tx
