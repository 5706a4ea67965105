"""When ranks are allocated, how many, and which: schedules counted on the host, choices of an exact number."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Phases:
    """A run's three phases. Steps count from 1: step `t` is the `t`-th update of the optimizer.

    Attributes:
        steps: all steps; None where it is not known yet.
        start_steps: steps before the first allocation.
        final_steps: steps after the last one.
        interval: steps from one allocation to the next.
    """

    steps: int | None
    start_steps: int
    final_steps: int
    interval: int

    def check(self, name: str) -> None:
        """Refuses phases that leave no room for an allocation.

        Raises:
            ValueError: naming the method and the numbers.
        """
        for field, least in (("start_steps", 0), ("final_steps", 0), ("interval", 1)):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}'s {field} must be a whole number of at least {least}, got {value!r}")
        if self.steps is None:
            return
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError(f"{name}'s steps must be a positive whole number or None, got {self.steps!r}")
        if self.start_steps + self.final_steps >= self.steps:
            raise ValueError(
                f"{name}'s start_steps ({self.start_steps}) and final_steps ({self.final_steps}) leave none of the "
                f"{self.steps} steps for allocating ranks: make them smaller, or train longer"
            )
        if self.interval > max(2, self.steps):
            raise ValueError(f"{name}'s interval ({self.interval}) is longer than the run's {self.steps} steps")

    @property
    def last(self) -> int:
        """The step after which nothing is allocated."""
        assert self.steps is not None
        return self.steps - self.final_steps

    def done(self, step: int) -> float:
        """The part of the allocation phase that is over at a step, from 0 to 1."""
        part = (step - self.start_steps) / (self.last - self.start_steps)
        return min(max(part, 0.0), 1.0)


def cubic_budget(phases: Phases, first: int, last: int) -> Callable[[int], int]:
    """AdaLoRA's number of ranks at a step: from `first` to `last` by `last + (first - last) (1 - done)³`, rounded down."""

    def budget(step: int) -> int:
        # In PEFT's order of operations: rounding errors decide where the number is nearly whole.
        left = 1 - (step - phases.start_steps) / (phases.last - phases.start_steps)
        return first if step <= phases.start_steps else int((first - last) * max(left, 0.0) ** 3 + last)

    return budget


def cubic_moves(phases: Phases, first: int) -> Callable[[int], int]:
    """ElaLoRA's number of ranks that a round moves: `first (1 - done³)`, rounded to the nearest."""
    return lambda step: round(first * (1 - phases.done(step) ** 3))


def falls(budget: Callable[[int], int], start: int, end: int) -> np.ndarray:
    """The steps in (start, end] at which a falling whole number falls by one; a step comes twice where it falls by two.

    A compact form of the schedule for traced programs: the number at step `t` is `budget(start)` less the number of falls up
    to `t` (see `after`). It is found on the host, in float64: float32 would round the number of some steps to the wrong side.
    """
    steps, first = range(start, end + 1), budget(start)
    amounts = range(1, first - budget(end) + 1)
    return np.array([steps[bisect.bisect_left(steps, n, key=lambda t: first - budget(t))] for n in amounts], np.int32)


def after(first: int, falls: np.ndarray, step: jax.Array) -> jax.Array:
    """The number at a step, which may be traced, from its value `first` at the start and its `falls`."""
    return jnp.asarray(first, jnp.int32) - jnp.sum(jnp.asarray(falls) <= step, dtype=jnp.int32)


def positions(values: jax.Array) -> jax.Array:
    """The place of each value along the last axis when they are put in rising order; equal ones keep their order."""
    return jnp.argsort(jnp.argsort(values, axis=-1, stable=True), axis=-1)


def largest(values: jax.Array, count: jax.Array | int, among: jax.Array) -> jax.Array:
    """A mask of exactly `count` entries, the largest of those in `among`; of equal ones the first.

    The number is exact, which a threshold would miss where entries are equal to it. `count` may be traced, so that one
    compiled program serves a whole schedule.

    Args:
        values: finite numbers of any shape.
        count: how many; all of `among` if it has fewer.
        among: mask of the entries to choose from.
    """
    order = positions(jnp.where(among, -values, jnp.inf).ravel())
    return (order < count).reshape(values.shape) & among
