"""What methods that learn one task after another have in common."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

import jax

from jlora.core.protocol.method import Arrays, Method, Site, Start


@dataclass(frozen=True)
class Lifelong(Method):
    """Base of methods that learn one task after another in arrays of fixed capacity.

    `jlora.next_task` ends a task: it draws the arrays of the next, lets the method keep what was learned (`after`), and renews
    the optimizer's moments of what begins anew, in one compiled program that serves every task.

    A subclass has the hyperparameter `tasks`, the number of tasks that there is room for. What it `needs` of data can only be
    the inputs' covariance, which it gets for every task.
    """

    @abc.abstractmethod
    def task(self, frozen: Arrays, shared: Arrays) -> jax.Array:
        """How much of the room is taken: a number from 0, which may be below `tasks - 1` where another task is to follow.

        Args:
            frozen: constants of one leaf, batch axes in front.
            shared: arrays that the leaves share.
        """

    @abc.abstractmethod
    def after(
        self, now: list[Start], fresh: list[Start], shared: Start, sites: tuple[Site, ...], inputs: list[Any]
    ) -> tuple[list[Start], Start]:
        """The arrays with which the next task begins; the lifted function gives what it gave before.

        Args:
            now: the arrays of all leaves as the task has left them, batch axes in front.
            fresh: newly drawn ones.
            shared: what the leaves share.
            sites: the leaves.
            inputs: the covariance of each leaf's inputs `[*batch, in, in]` on the next task, or None.
        """

    def renewed_entries(self, shared: Start) -> dict[str, jax.Array]:
        """For trained shared arrays the entries, as masks, whose moments begin anew with the next task."""
        return {}
