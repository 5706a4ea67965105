"""How much each rank matters: smoothed sensitivity times uncertainty (AdaLoRA, arXiv:2303.10512)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora.optimize.allocate.triplets import Triplet


def smoothed(
    sensitivity: Triplet, uncertainty: Triplet, values: Triplet, gradients: Triplet, beta1: float, beta2: float
) -> tuple[Triplet, Triplet]:
    """The two moving averages after one more step.

    `s = |value * gradient|`, `I <- beta1 I + (1 - beta1) s`, `U <- beta2 U + (1 - beta2) |s - I|` with the new `I`.

    Args:
        sensitivity: `I`.
        uncertainty: `U`.
        values: the factors after the step.
        gradients: the gradients that the step was made with.
        beta1: memory of `I`.
        beta2: memory of `U`.
    """
    now = Triplet(*(jnp.abs(value * gradient) for value, gradient in zip(values, gradients)))
    mean = Triplet(*(beta1 * old + (1 - beta1) * new for old, new in zip(sensitivity, now)))
    spread = (beta2 * old + (1 - beta2) * jnp.abs(new - middle) for old, new, middle in zip(uncertainty, now, mean))
    return mean, Triplet(*spread)


def of_ranks(sensitivity: Triplet, uncertainty: Triplet) -> jax.Array:
    """The score of every rank of a leaf, `[*batch, r]`: that of `e`, plus the means over `a`'s column and `b`'s row.

    Always finite: a NaN would make the order of the ranks meaningless.
    """
    a, e, b = (mean * spread for mean, spread in zip(sensitivity, uncertainty))
    return jnp.nan_to_num(e + jnp.mean(a, axis=-2) + jnp.mean(b, axis=-1))


def of_sites(sensitivities: Sequence[Triplet], uncertainties: Sequence[Triplet]) -> list[jax.Array]:
    """The scores of several leaves."""
    return [of_ranks(mean, spread) for mean, spread in zip(sensitivities, uncertainties, strict=True)]


def finite(tree: Any) -> jax.Array:
    """Whether all numbers of a tree are finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
