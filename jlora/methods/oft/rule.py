"""COFT's rule: after every step a block's skew-symmetric matrix is within its bound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jlora import paths
from jlora.core.protocol.method import Site


@dataclass(frozen=True)
class BoundedRotation:
    """Turns the optimizer's step `u` of `q` into the one that ends at what is nearest to `q + u` within the bound.

    Attributes:
        eps: bound of the Frobenius norm of all skew-symmetric matrices of a matrix together.
    """

    eps: float

    def wrap(self, tx: optax.GradientTransformation, sites: tuple[Site, ...]) -> optax.GradientTransformation:
        """The optimizer, and the bound behind it."""
        inner = optax.with_extra_args_support(tx)

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
            if params is None:
                raise ValueError("OFT with coft needs the params: call tx.update(gradients, state, params)")
            updates, state = inner.update(updates, state, params, **extra)
            updates = jax.tree.map(lambda leaf: leaf, updates)  # its dictionaries are the inner optimizer's
            for site in sites:
                q, step = paths.lookup(params, site.keys)["q"], paths.lookup(updates, site.keys)
                step["q"] = nearest(nearest(q, self.eps) + step["q"], self.eps) - q
            return updates, state

        return optax.GradientTransformationExtraArgs(inner.init, update)


def nearest(q: jax.Array, eps: float) -> jax.Array:
    """What is nearest to `q [..., blocks, n]` with skew-symmetric matrices of a norm of at most `eps / sqrt(blocks)` each."""
    bound = eps / math.sqrt(2 * q.shape[-2])  # a skew-symmetric matrix has each value twice
    norm = jnp.linalg.norm(q, axis=-1, keepdims=True)
    return q * jnp.where(norm > bound, bound / jnp.maximum(norm, bound), 1).astype(q.dtype)
