"""What a program is traced for: products take their form by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Target:
    """The devices that run a program.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        devices: how many there are; a program may use fewer.
    """

    platform: str
    devices: int = 1


_DESCRIBED: ContextVar[Target | None] = ContextVar("described", default=None)


def target() -> Target:
    """The devices of this process and of those beside it, or those that `traced_for` names."""
    return _DESCRIBED.get() or Target(jax.default_backend(), jax.device_count())


@contextmanager
def traced_for(platform: str, devices: int = 1) -> Iterator[None]:
    """What is traced within is for devices that need not be here, such as those of a program that is only compiled."""
    token = _DESCRIBED.set(Target({"cuda": "gpu", "rocm": "gpu"}.get(platform, platform), devices))
    try:
        yield
    finally:
        _DESCRIBED.reset(token)
