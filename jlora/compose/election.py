"""How arrays of several adapters become one: pruned, their signs elected, and added up."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

PRUNINGS = ("magnitude", "random")
MAJORITIES = ("total", "frequency")


@dataclass(frozen=True)
class Rule:
    """`n` arrays of one shape become one: each is pruned, and all are added, or those averaged that have the elected sign.

    With `t` the pruned arrays and `w` their weights the result is `Σ w t`, or with an election
    `Σ w t [sign(t) = e] / max(1, Σ [sign(t) = e])` entry by entry.

    Args:
        prune: "magnitude" keeps of each array the entries that are largest in size, "random" any, and divides them by the
            density, so that their mean stays; None keeps all.
        elect: whether signs are elected. The elected sign is that of the sum of the pruned arrays, without their weights, or
            of the sum of their signs; 0 counts as +.
        density: the share of entries that pruning keeps, in (0, 1].
        majority: "total", or "frequency" for the sum of signs.
    """

    prune: str | None = None
    elect: bool = False
    density: float = 1.0
    majority: str = "total"

    def __call__(self, arrays: jax.Array, weights: jax.Array, key: jax.Array | None) -> jax.Array:
        """One array from `arrays [n, ...]` and `weights [n]`; the key is for random pruning."""
        kept = self._pruned(arrays, key)
        weights = weights.reshape(-1, *[1] * (arrays.ndim - 1))
        if not self.elect:
            return jnp.sum(weights * kept, axis=0)
        votes = kept if self.majority == "total" else jnp.sign(kept)
        agrees = jnp.sign(kept) == jnp.where(jnp.sum(votes, axis=0) >= 0, 1, -1)
        return jnp.sum(weights * kept * agrees, axis=0) / jnp.maximum(jnp.sum(agrees, axis=0), 1)

    def _pruned(self, arrays: jax.Array, key: jax.Array | None) -> jax.Array:
        if self.prune is None or self.density == 1:
            return arrays
        if self.prune == "magnitude":
            return jax.vmap(lambda array: _largest(array, int(self.density * array.size)))(arrays)
        assert key is not None
        return jnp.where(jax.random.bernoulli(key, self.density, arrays.shape), arrays / self.density, 0)


def _largest(array: jax.Array, count: int) -> jax.Array:
    """The array with all but its `count` largest entries in size set to 0; of equal ones the first stay."""
    flat = array.reshape(-1)
    kept = jax.lax.top_k(jnp.abs(flat), count)[1]
    return jnp.zeros_like(flat).at[kept].set(flat[kept]).reshape(array.shape)
