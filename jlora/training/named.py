"""The methods of `--method`: rank, alpha and dropout as the user has them, phases as shares of the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jlora
from jlora.training.settings import Settings


def named(settings: Settings) -> jlora.Method:
    """The method of `--method` for (resolved) settings."""
    assert settings.rank is not None and settings.alpha is not None
    options: Any = {"alpha": settings.alpha, "dropout": settings.dropout or 0.0}
    method = METHODS[settings.method](settings.rank, settings.steps, options)
    return method if settings.links is None else _chain(settings.links, settings, method)


def _chain(links: int, settings: Settings, link: jlora.Method) -> jlora.Method:
    """Links of equal shares of the run, on a base that stays as it is."""
    # ReLoRA's paper prunes 99 of 100 moments by magnitude; the others clear them.
    pruned: Any = {"prune": 0.99, "by": "magnitude"} if settings.method == "relora" else {}
    return jlora.Chain(link, links, settings.steps, **pruned)


def _start(rank: int) -> int:
    """Where ranks are taken away: half as many again at the start, as in AdaLoRA's paper."""
    return math.ceil(1.5 * rank)


def _allocating(steps: int | None) -> dict[str, Any]:
    """A tenth of the run to learn what matters, and three tenths with the ranks that are left."""
    number = steps or 0
    return {
        "steps": steps,
        "start_steps": number // 10,
        "final_steps": 3 * number // 10,
        "interval": max(1, number // 100),
    }


def _adalora(rank: int, steps: int | None, options: Any) -> jlora.Method:
    return jlora.AdaLoRA(rank=_start(rank), target=rank, **_allocating(steps), **options)


def _elalora(rank: int, steps: int | None, options: Any) -> jlora.Method:
    return jlora.ElaLoRA(rank=rank, **_allocating(steps), **options)


def _sora(rank: int, steps: int | None, options: Any) -> jlora.Method:
    final = 3 * (steps or 0) // 10
    # A third of normal gates is within 0.43: over the run the threshold alone would close those.
    shrink = {"threshold": 0.43 / (steps - final)} if steps else {}
    return jlora.SoRA(rank=_start(rank), target=rank, l1=0.0, steps=steps, final_steps=final, **shrink, **options)


def _beamlora(rank: int, steps: int | None, options: Any) -> jlora.Method:
    # The reference's shares of its run: a choice every twelfth, and all ranks kept in the last third.
    number = steps or 0
    return jlora.BeamLoRA(rank, steps=steps, final_steps=number // 3, interval=max(2, number // 12), **options)


def _rmlora(rank: int, steps: int | None, options: Any) -> jlora.Method:
    return jlora.RMLoRA(rank, updated=math.ceil(rank / 2), **options)


def _prilora(rank: int, steps: int | None, options: Any) -> jlora.Method:
    # From half the rank to one and a half, as in the paper's 4 to 12; pruned ten times at least.
    first, every = max(1, rank // 2), 40 if steps is None else max(1, min(40, steps // 10))
    return jlora.PRILoRA(first, 2 * rank - first, every=every, **options)


def _alora(rank: int, steps: int | None, options: Any) -> jlora.Method:
    # The paper's shares of its run: a third, then eight rounds of a twelfth each.
    number = steps or 0
    start, interval = number // 3, max(1, number // 12)
    final = max(0, number - start - 7 * interval)
    return jlora.ALoRA(rank, steps=steps, start_steps=start, final_steps=final, interval=interval, **options)


METHODS: dict[str, Callable[[int, int | None, Any], jlora.Method]] = {
    "lora": lambda rank, steps, options: jlora.LoRA(rank=rank, **options),
    "dora": lambda rank, steps, options: jlora.DoRA(jlora.LoRA(rank=rank, **options)),
    "adalora": _adalora,
    "elalora": _elalora,
    "sora": _sora,
    "beamlora": _beamlora,
    "rmlora": _rmlora,
    "prilora": _prilora,
    "gelora": lambda rank, steps, options: jlora.GeLoRA(rank, **options),
    "alora": _alora,
    "cola": lambda rank, steps, options: jlora.LoRA(rank=rank, **options),
    "raclora": lambda rank, steps, options: jlora.RACLoRA(rank=rank, **options),
    "xgblora": lambda rank, steps, options: jlora.XGBLoRA(rank=rank, **options),
    "relora": lambda rank, steps, options: jlora.LoRA(rank=rank, **options),
}
