"""RM-LoRA's rule: each step trains a few random ranks of every module, with a penalty towards orthonormal factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jlora.optimize.allocate import budget, orthogonality, triplets
from jlora.optimize.allocate.transform import Sites, added
from jlora.optimize.allocate.triplets import Fields, Triplet

_FIELDS: Fields = ("a", None, "b")


class MaskedState(NamedTuple):
    """The optimizer's state, and the number of the step, on which the masks depend.

    Attributes:
        inner: the state of the optimizer inside.
        step: int32, updates made.
    """

    inner: Any
    step: jax.Array


@dataclass(frozen=True)
class RMLoRARule:
    """Adds the penalty's gradient, then masks the gradients, in every step but the first, which trains all ranks.

    Attributes:
        updated: ranks of each module with a gradient in a step.
        independent: whether `a` and `b` have masks of their own.
        orthogonality: weight of the penalty on factors that are not orthonormal.
        freeze: whether the other ranks stay exactly what they were.
        seed: of the masks, which depend on it and on the number of the step alone, and so are equal on all devices.
    """

    updated: int
    independent: bool
    orthogonality: float
    freeze: bool
    seed: int

    def wrap(self, tx: optax.GradientTransformation, sites: Sites) -> optax.GradientTransformation:
        """The optimizer with the penalty and the masks around it; with a penalty its `update` needs the params."""
        inner = optax.with_extra_args_support(tx)

        def init(params: Any) -> MaskedState:
            return MaskedState(inner.init(params), jnp.zeros((), jnp.int32))

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, MaskedState]:
            if self.orthogonality:
                if params is None:
                    raise ValueError("RMLoRA needs the params: call tx.update(gradients, state, params)")
                updates = added(updates, self._pull(params, sites), sites, _FIELDS)
            number: Any = optax.safe_increment(state.step)
            masks = self.masks(number, [given.b.shape[:-1] for given in triplets.read(updates, sites, _FIELDS)])
            updates, new = inner.update(_masked(updates, masks, sites), state.inner, params, **extra)
            return _masked(updates, masks, sites) if self.freeze else updates, MaskedState(new, number)

        return optax.GradientTransformationExtraArgs(init, update)

    def masks(self, step: jax.Array | int, ranks: list[tuple[int, ...]]) -> list[tuple[jax.Array, jax.Array]]:
        """For every site masks of the ranks of `a` and of `b` that have a gradient in a step.

        Args:
            step: of the update, from 1.
            ranks: for every site `[*batch, r]`.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), step)

        def drawn(place: int, shape: tuple[int, ...]) -> jax.Array:
            noise = jax.random.uniform(jax.random.fold_in(key, place), shape)
            return (budget.positions(noise) < self.updated) | (step == 1)

        firsts = [drawn(2 * n, shape) for n, shape in enumerate(ranks)]
        if not self.independent:
            return [(mask, mask) for mask in firsts]
        return [(mask, drawn(2 * n + 1, shape)) for n, (mask, shape) in enumerate(zip(firsts, ranks))]

    def _pull(self, params: Any, sites: Sites) -> list[Triplet]:
        factors = triplets.read(params, sites, _FIELDS)
        everywhere = [jnp.ones(factor.b.shape[:-1], bool) for factor in factors]
        return orthogonality.penalty_gradient(factors, everywhere, self.orthogonality)


def _masked(tree: Any, masks: list[tuple[jax.Array, jax.Array]], sites: Sites) -> Any:
    """The tree with zeros for the ranks that are not in the masks."""
    found = []
    for value, (of_a, of_b) in zip(triplets.read(tree, sites, _FIELDS), masks, strict=True):
        a = jnp.where(of_a[..., None, :], value.a, jnp.zeros_like(value.a))
        found.append(Triplet(a, None, jnp.where(of_b[..., :, None], value.b, jnp.zeros_like(value.b))))
    return triplets.write(tree, sites, found, _FIELDS)
