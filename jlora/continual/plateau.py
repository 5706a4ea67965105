"""Loss plateaus: a loss that is low and stands still, seen in a window of fixed length."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PlateauState:
    """What a `Plateau` remembers.

    Attributes:
        losses: the last losses, `[window]`, in the order of a ring.
        seen: how many losses there were.
        armed: whether a plateau would be told.
        mean, variance: of the window when the last plateau was told.
    """

    losses: jax.Array
    seen: jax.Array
    armed: jax.Array
    mean: jax.Array
    variance: jax.Array


@dataclass(frozen=True)
class Plateau:
    """Tells when the mean of the last losses is below one number and their variance below another.

    After a plateau the next is told only when the mean has risen above that plateau's `mean + sqrt(variance)` in between. The
    variance is that of the population. Nothing is told before the window is full: the authors' code does not wait for that, and
    there a single loss below the threshold, whose variance is zero, is a plateau.

    Args:
        window: how many losses.
        mean_below: in the loss's unit.
        variance_below: in its square.

    Raises:
        ValueError: for a window below 1, or a number that is not positive.

    Example:
        >>> plateau = jlora.Plateau(window=2, mean_below=1.0, variance_below=0.1)
        >>> state, _ = plateau.update(plateau.init(), jnp.float32(0.5))
        >>> state, told = plateau.update(state, jnp.float32(0.4))
        >>> bool(told)
        True

    Reference:
        Wei et al. 2024, arXiv:2411.05663, and its code.
    """

    window: int = 5
    mean_below: float = 6.0
    variance_below: float = 0.1

    def __post_init__(self) -> None:
        if type(self.window) is not int or self.window < 1:
            raise ValueError(f"a plateau's window must be a whole number of at least 1, got {self.window!r}")
        if not (self.mean_below > 0 and self.variance_below > 0):
            raise ValueError(
                "a plateau's mean_below and variance_below must be positive, got "
                f"{self.mean_below!r} and {self.variance_below!r}"
            )

    def init(self) -> PlateauState:
        """No losses, armed."""
        zero = jnp.zeros((), jnp.float32)
        return PlateauState(
            jnp.zeros(self.window, jnp.float32), jnp.zeros((), jnp.int32), jnp.ones((), bool), zero, zero
        )

    def update(self, state: PlateauState, loss: jax.Array) -> tuple[PlateauState, jax.Array]:
        """What is remembered after one more loss, and whether a plateau begins with it."""
        losses = state.losses.at[state.seen % self.window].set(jnp.asarray(loss, jnp.float32))
        seen = state.seen + 1
        mean, variance = jnp.mean(losses), jnp.var(losses)
        armed = state.armed | (mean > state.mean + jnp.sqrt(state.variance))
        told = armed & (seen >= self.window) & (mean < self.mean_below) & (variance < self.variance_below)
        last = jnp.where(told, mean, state.mean), jnp.where(told, variance, state.variance)
        return PlateauState(losses, seen, armed & ~told, *last), told
