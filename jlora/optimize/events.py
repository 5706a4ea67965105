"""Events: what a method asks of the training loop between two steps, such as the end of a chain's link.

A step is a jitted function of fixed shapes; what happens a few times in a run, and may look at held-out data or draw new
constants, is called from the host instead. What is remembered lies in `adapted` and in the optimizer's state, so a run that
was stopped goes on from both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import jax
import optax

from jlora.core.protocol.method import Site

if TYPE_CHECKING:
    from jlora.core.tree.adapted import Adapted

Loss = Callable[["Adapted", Any], jax.Array]


def silent(text: str) -> None:
    """Says nothing."""


@dataclass(frozen=True)
class Moment:
    """What an event sees of the run.

    Attributes:
        adapted: as the last step left it.
        opt_state: the optimizer's state.
        tx: the optimizer.
        key: a random key of this step's own.
        step: steps done.
        sites: the leaves whose methods have this event.
        loss: `loss(adapted, batch) -> scalar`, the mean loss without dropout, traceable; None where the loop gives none.
        batches: held-out batches for it.
        say: takes a line of text about what was done.
    """

    adapted: Adapted
    opt_state: Any
    tx: optax.GradientTransformation
    key: jax.Array
    step: int
    sites: tuple[Site, ...] = ()
    loss: Loss | None = None
    batches: Sequence[Any] = ()
    say: Callable[[str], None] = silent


class Event(Protocol):
    """What `Method.event` gives: compared and hashed by value; leaves with equal events share one.

    An event with `restarts`, steps of the run, lets the training job's learning rate rise anew after each.
    """

    def due(self, step: int) -> bool:
        """Whether it happens after this many steps."""
        ...

    def happen(self, moment: Moment) -> tuple[Adapted, Any]:
        """The new `Adapted` and optimizer state, of the same structure, shapes and shardings; the old ones may be donated."""
        ...


def events_of(adapted: Adapted) -> dict[Event, tuple[Site, ...]]:
    """The events of the methods, with the leaves that share each, in the order of the plan."""
    found: dict[Event, tuple[Site, ...]] = {}
    for site in adapted.plan.sites:
        if (event := site.method.event) is not None:
            found[event] = (*found.get(event, ()), site)
    return found


def is_due(adapted: Adapted, step: int) -> bool:
    """Whether anything happens after this many steps."""
    return any(event.due(step) for event in events_of(adapted))


def run_events(
    adapted: Adapted,
    opt_state: Any,
    tx: optax.GradientTransformation,
    key: jax.Array,
    step: int,
    loss: Loss | None = None,
    batches: Sequence[Any] = (),
    say: Callable[[str], None] = silent,
) -> tuple[Adapted, Any]:
    """Does what the methods have due after a step; for loops of your own, once a step, after the update.

    Args:
        adapted: as the step left it.
        opt_state: the optimizer's state.
        tx: the optimizer that made it.
        key: the run's random key; it is folded with the step.
        step: steps done, the first update being step 1.
        loss: `loss(adapted, batch) -> scalar` on held-out data, for methods that ask for it.
        batches: held-out batches.
        say: takes a line of text about what was done.

    Returns:
        `adapted` and `opt_state`: the given ones where nothing is due, else new ones, and the given ones may be donated.

    Example:
        >>> tx = jlora.optimizer(adapted, optax.adamw, learning_rate=1e-3)
        >>> opt_state = tx.init(adapted.params)
        >>> adapted, opt_state = jlora.run_events(adapted, opt_state, tx, key, step=1)
    """
    due = [(event, sites) for event, sites in events_of(adapted).items() if event.due(step)]
    for number, (event, sites) in enumerate(due):
        own = jax.random.fold_in(jax.random.fold_in(key, step), number)
        adapted, opt_state = event.happen(Moment(adapted, opt_state, tx, own, step, sites, loss, batches, say))
    return adapted, opt_state
