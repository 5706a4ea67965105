"""LoRA-FA's rule: the gradient of the trained factor as if the weight itself took the step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jlora import paths
from jlora.core.protocol.method import Site
from jlora.core.tree import placement

# Added to the diagonal of `a.T @ a`, as in PEFT.
_DELTA = 1e-8


@dataclass(frozen=True)
class LoRAFARule:
    """Gives the optimizer `(a.T @ a + 1e-8)^-1 @ g / scale²` for the gradient `g` of `b`.

    Attributes:
        scale: the factor of `a @ b`.
        frozen: the constants of the adapters, where the rule has them: `a` is among these.
    """

    scale: float
    frozen: Any = field(default=None, compare=False)

    def with_constants(self, frozen: Any) -> LoRAFARule:
        """The rule for adapters with these constants."""
        return LoRAFARule(self.scale, frozen)

    def wrap(self, tx: optax.GradientTransformation, sites: tuple[Site, ...]) -> optax.GradientTransformation:
        """The optimizer behind the change of the gradients; without the constants its `update` raises a ValueError.

        Raises:
            TypeError: for constants that are shapes alone.
        """
        inner = optax.with_extra_args_support(tx)
        factors = None if self.frozen is None else [self._factor(site) for site in sites]

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
            if factors is None:
                raise ValueError(
                    "LoRAFA's rule lacks the frozen factors: make the optimizer by jlora.optimizer(adapted, ...) or "
                    "jlora.with_rules(adapted, tx)"
                )
            updates = jax.tree.map(lambda leaf: leaf, updates)  # its dictionaries are the caller's
            for site, factor in zip(sites, factors, strict=True):
                fields = paths.lookup(updates, site.keys)
                fields["b"] = jnp.asarray(factor, fields["b"].dtype) @ fields["b"]
            return inner.update(updates, state, params, **extra)

        return optax.GradientTransformationExtraArgs(inner.init, update)

    def _factor(self, site: Site) -> Any:
        """`(a.T @ a + 1e-8)^-1 / scale²`, `[*batch, rank, rank]`; of numpy where it can be, so that no program needs `a`."""
        a = paths.lookup(self.frozen, site.keys)["a"]
        if isinstance(a, jax.ShapeDtypeStruct):
            raise TypeError(f"{site.path}: LoRAFA's rule needs the values of a, which has only a shape here: {a}")
        if not isinstance(a, Tracer):
            a = np.asarray(placement.complete(a), np.float64)
        xp = jnp if isinstance(a, Tracer) else np
        gram = xp.swapaxes(a, -1, -2) @ a + _DELTA * xp.eye(a.shape[-1])
        return xp.linalg.inv(gram) / self.scale**2
