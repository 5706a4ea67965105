"""Low-rank updates that are mixed from skills by what a router gives a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from jlora.core.products.contraction import Options
from jlora.core.products.low_rank import Factors
from jlora.core.products.slots import Slots
from jlora.core.products.update import Linear, Unfit, Update

#: Keeps a mixture finite whose numbers are all zero.
_TINY = 1e-12


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routed(Update):
    """`w + a_t @ b_t` for the task `t` of all rows, or of each: the rows of `a_t`, and the columns of `b_t`, in splits.

    `m [..., splits, skills]` are `sigmoid(logits)`, made to sum to 1 over the skills, and split `q` of `a_t` is
    `Σ_s m_qs * a_s` there; so with `b_t`. With a key, logistic noise is added to the logits first: a relaxed Bernoulli draw of
    temperature 1 for each row that chooses.

    Attributes:
        a: `[skills, in, r]`.
        b: `[skills, r, out]`.
        logits: `[splits, skills]` of one task for all rows, or `[rows, splits, skills]`; None where the call names no task.
        name: path of the leaf; static.
    """

    a: jax.Array
    b: jax.Array
    logits: jax.Array | None = None
    name: str = field(default="", metadata={"static": True})
    refuses_forming: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    def times(self, number: jax.Array) -> Self:
        """With all `b` times the number."""
        return replace(self, b=self.b * number.astype(self.b.dtype))

    def cost(self, rows: int, columns: int, lookup: bool) -> int:
        """That of one mixture's factors, without the mixing, which is done once for a task and not for each row of input."""
        return self.a.shape[-1] * (columns if lookup else rows + columns)

    def dense(self, x: jax.Array, w: jax.Array, key: jax.Array | None, options: Options) -> jax.Array:
        """`x [rows, ..., in] @ v`, for each row with its own."""
        return self._mixed_for(x.shape, key).dense(x, w, None, options)

    def transposed(self, x: jax.Array, w: jax.Array, key: jax.Array | None, options: Options) -> jax.Array:
        """`x [rows, ..., out] @ v.T`."""
        return self._mixed_for(x.shape, key).transposed(x, w, None, options)

    def lookup(self, base: jax.Array, w: jax.Array, take: Callable[[jax.Array], jax.Array], side: str) -> jax.Array:
        """Rows of each position's `v`, or columns."""
        return self._mixed_for(base.shape, None).lookup(base, w, take, side)

    def convolve(self, x: jax.Array, w: jax.Array, key: jax.Array | None, linear: Linear) -> jax.Array:
        """A convolution of `x` with the `v` of one task for all rows."""
        return self.chosen("convolution", key).convolve(x, w, None, linear)

    def experts(self, x: jax.Array, w: jax.Array, key: jax.Array | None, linear: Linear) -> jax.Array:
        """Each row with its expert's `v`, of one task for all; every expert draws on its own."""
        keys = None if key is None else jax.random.split(key, len(self.a))
        chosen = jax.vmap(lambda update, key: update.chosen("product of experts", key))(self, keys)
        return chosen.experts(x, w, None, linear)

    def chosen(self, use: str, key: jax.Array | None = None) -> Factors:
        """The factors of a task that is one for all rows.

        Raises:
            Unfit: where rows are of tasks of their own, or the call names none.
        """
        found = self.mixed(key)
        if isinstance(found, Slots):
            raise Unfit(f"{self.name}: rows of several tasks have no {use} in common; name one for all: on(task=1)")
        return found

    def mixed(self, key: jax.Array | None) -> Factors | Slots:
        """One pair of factors, or where rows choose a pair for each.

        Raises:
            Unfit: where the call names no task.
        """
        if self.logits is None:
            raise Unfit(f"{self.name}: the call must say which task: on(task=...)")
        amounts = routing(self.logits, key).astype(self.a.dtype)
        a, b = _in_splits(amounts, self.a), jnp.swapaxes(_in_splits(amounts, jnp.swapaxes(self.b, 1, 2)), -1, -2)
        if a.ndim == 2:
            return Factors(a, b)
        return Slots(a, b, slot=jnp.arange(a.shape[0]), leading=1, name=self.name)

    def _mixed_for(self, shape: tuple[int, ...], key: jax.Array | None) -> Factors | Slots:
        """`mixed`, for an activation of that shape; refuses one whose rows are not those that the tasks are of."""
        found = self.mixed(key)
        if isinstance(found, Slots) and shape[:1] != found.a.shape[:1]:
            raise Unfit(
                f"{self.name}: tasks for {len(found.a)} rows, but what it is used on has the leading axes {shape[:-1]}: the "
                "function must keep the batch axis in front of every product"
            )
        return found


def routing(logits: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """How much of each skill: `sigmoid(logits [..., skills])`, with the key of a relaxed Bernoulli draw, over its sum."""
    noise = 0.0 if key is None else jax.random.logistic(key, logits.shape, logits.dtype)
    amounts = jax.nn.sigmoid(logits + noise)
    return amounts / (amounts.sum(-1, keepdims=True) + _TINY)


def _in_splits(amounts: jax.Array, skills: jax.Array) -> jax.Array:
    """`skills [skills, size, r]` mixed by `amounts [..., splits, skills]`, each split its part of the `size` rows."""
    count, size, rank = skills.shape
    parts = skills.reshape(count, amounts.shape[-2], -1, rank)
    return jnp.einsum("...qs,sqir->...qir", amounts, parts).reshape(*amounts.shape[:-2], size, rank)
