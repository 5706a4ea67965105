"""Terms of the adapters that a user adds to any loss of the task."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jlora import paths
from jlora.core.protocol.method import Site
from jlora.core.tree.adapted import Adapted
from jlora.optimize.allocate.orthogonality import excess_norms


def orthogonality(adapted: Adapted, weight: float | jax.Array = 1.0) -> jax.Array:
    """AdaLoRA's penalty on factors that are not orthonormal: `weight * mean of ‖aᵀa - 1‖ and ‖b bᵀ - 1‖` (Frobenius).

    The mean is over all trained factors `a [in, rank]` and `b [rank, out]` of all matrices, those of a stack each for
    itself; the norm is not squared. Nothing is asked of ranks that are zero in both factors, such as those that ElaLoRA
    has out of use. Value and gradient are those of the term that `AdaLoRA(orthogonality=weight)` adds by itself; this
    function has it for any method with such factors. The gradient is finite where the factors are orthonormal.

    Args:
        adapted: what is trained, with the params that are differentiated: `adapted.replace(params=p)`.
        weight: factor of the mean.

    Raises:
        ValueError: where no trained field is such a factor.

    Example:
        >>> penalty = jlora.losses.orthogonality(adapted.replace(params=adapted.params), 0.1)

    Reference:
        Zhang et al. 2023, arXiv:2303.10512; the mean of norms that are not squared is that of its code and of PEFT's.
    """
    found = [norms for site in adapted.plan.sites for norms in _norms(adapted, site)]
    if not found:
        methods = ", ".join(sorted({str(site.method) for site in adapted.plan.sites}))
        raise ValueError(
            "orthogonality is about trained factors a [in, rank] and b [rank, out], and nothing adapted here has any "
            f"({methods or 'no site'}); leave this term away"
        )
    return weight * jnp.mean(jnp.concatenate([norms.ravel() for norms in found]))


def _norms(adapted: Adapted, site: Site) -> list[jax.Array]:
    """`‖aᵀa - 1‖` and `‖b bᵀ - 1‖` of a site's trained factors, `[*batch]` each."""
    roles: dict[tuple[str, ...], Any] = {("in", "rank"): lambda m: m, ("rank", "out"): jnp.matrix_transpose}
    fields = paths.lookup(adapted.params, site.keys)
    columns = [roles[axes](fields[name]) for name, axes in site.method.axes.items() if name in fields and axes in roles]
    if not columns:
        return []
    used = jnp.any(jnp.stack([jnp.any(m != 0, axis=-2) for m in columns]), axis=0)
    return [excess_norms(m, used) for m in columns]
