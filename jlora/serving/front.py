"""What an adapter puts in front of a text: the keys and values that its virtual tokens leave in a cache."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.core.protocol.wrapping import innermost
from jlora.core.transforms.lift import lift
from jlora.core.tree.adapted import Adapted
from jlora.models.attention import empty_cache
from jlora.models.prefix_layout import PrefixLayout, peft_prefix
from jlora.prompts.prompted import prompted
from jlora.prompts.virtual import Virtual


@dataclass(frozen=True, eq=False)
class Front:
    """Keys and values of virtual tokens, which no later token changes.

    Attributes:
        keys, values: `[layers, tokens, kv_heads, head_dim]`.
    """

    keys: np.ndarray
    values: np.ndarray

    @property
    def tokens(self) -> int:
        """How many virtual tokens there are."""
        return self.keys.shape[1]

    def padded(self, tokens: int) -> Front:
        """With room for more tokens, which are zero."""
        room = [(0, 0), (0, tokens - self.tokens), *[(0, 0)] * (self.keys.ndim - 2)]
        return Front(np.pad(self.keys, room), np.pad(self.values, room))


def layout_of(model: Any) -> PrefixLayout | None:
    """How PEFT keeps a prefix of a model; None where it can't be read."""
    with contextlib.suppress(ValueError, TypeError):
        return peft_prefix(model)
    return None


def parted(adapted: Adapted) -> tuple[Adapted, int]:
    """The adapter without what stands in front of a text, and how many virtual tokens that is."""
    virtual = [site for site in adapted.plan.sites if isinstance(innermost(site.method), Virtual)]
    rest = tuple(site for site in adapted.plan.sites if site not in virtual)
    lengths = [getattr(innermost(site.method), "tokens") for site in virtual]  # noqa: B009
    return adapted.replace(plan=replace(adapted.plan, sites=rest)), max(lengths, default=0)


def front_of(name: str, model: Any, adapted: Adapted) -> Front | None:
    """What an adapter puts in front of a text, read by the whole of it once; None where it puts nothing there.

    Raises:
        ValueError: for one whose leaves have different numbers of virtual tokens, and where the keys and values are not finite.
    """
    tokens = parted(adapted)[1]
    if not tokens:
        return None
    apply = prompted(lift(model.apply, unread="allow"))

    @jax.jit
    def read(adapted: Adapted) -> tuple[jax.Array, jax.Array]:
        _, cache = apply({"params": adapted}, jnp.zeros((1, 1), jnp.int32), cache=empty_cache(1, 1))
        return cache.keys[:, 0, :tokens], cache.values[:, 0, :tokens]

    found = Front(*jax.device_get(read(adapted.replace(context={}))))
    if not all(np.all(np.isfinite(np.asarray(each, np.float32))) for each in (found.keys, found.values)):
        raise ValueError(f"{name!r} gives virtual tokens whose keys or values are not finite")
    return found
