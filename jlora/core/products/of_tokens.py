"""The form of a mixture whose tokens choose: a gate gives each token the few of several low-rank updates that it adds up.

What is added to a token's product is `Σ_j g_j (x @ a_ij) @ b_ij` over its choices `i_1, .., i_k`. Three ways compute it; see
`way`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp

from jlora.core.products.contraction import Options, accumulation_dtype, at_most, matmul
from jlora.core.products.slots import with_all
from jlora.core.products.update import Unfit, Update

#: Rows that one pair of factors is read for where tokens are sorted by their choice; not measured.
BLOCK = 64


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OfTokens(Update):
    """The updates `(a_s, b_s)`, and the gate by which every token chooses `k` of them.

    The gate's logits are `l = x @ gate`; the choices are the `k` largest, in amounts `softmax(l / tau)` over these alone.

    Attributes:
        a: `[slots, in, r]`.
        b: `[slots, r, out]`.
        gate: `[in, slots]`.
        k: choices of a token; static.
        tau: temperature; static.
        name: path of the leaf; static.
    """

    a: jax.Array
    b: jax.Array
    gate: jax.Array
    k: int = field(default=1, metadata={"static": True})
    tau: float = field(default=1.0, metadata={"static": True})
    name: str = field(default="", metadata={"static": True})

    def times(self, number: jax.Array) -> Self:
        """With all `b` times the number."""
        return replace(self, b=self.b * number.astype(self.b.dtype))

    def cost(self, rows: int, columns: int, lookup: bool) -> int:
        """That of the gate and of `k` updates."""
        return rows * self.gate.shape[-1] + self.k * self.a.shape[-1] * (rows + columns)

    def dense(self, x: jax.Array, w: jax.Array, key: jax.Array | None, options: Options) -> jax.Array:
        """`x [..., in] @ w`, and what each token's choices add."""
        return self.spoken(x, w, key, options)[0]

    def spoken(self, x: jax.Array, w: jax.Array, key: jax.Array | None, options: Options) -> tuple[jax.Array, Any]:
        """`dense`, and the gate's logits `[..., slots]`."""
        if options.plan == "merged":
            raise Unfit(f"{self.name}: the plan 'merged' has one weight for all tokens; lift with plan='auto'")
        logits, chosen, amounts = self.choices(x, options.precision)
        accumulate = accumulation_dtype(options.out_dtype)
        y = matmul(x, w, accumulate, options.precision)
        low = of_chosen(x, self.a, self.b, chosen, amounts, options.precision)
        return (y + low.astype(accumulate)).astype(options.out_dtype), {"gate_logits": logits}

    def choices(self, x: jax.Array, precision: Any = None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The gate's logits `[..., slots]` for `x [..., in]`, and the slots and amounts `[..., k]` of what is chosen."""
        logits = matmul(x.astype(self.gate.dtype), self.gate, self.gate.dtype, precision)
        top, chosen = jax.lax.top_k(logits, self.k)
        return logits, chosen, jax.nn.softmax(top / self.tau)


Way = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, Any], jax.Array]


def of_chosen(
    x: jax.Array, a: jax.Array, b: jax.Array, chosen: jax.Array, amounts: jax.Array, precision: Any = None
) -> jax.Array:
    """`Σ_j amounts_j (x @ a_s) @ b_s` with `s = chosen_j`: `x [..., in]`, `chosen` and `amounts [..., k]`.

    The thin products are in the dtype of `x`.
    """
    tokens = math.prod(x.shape[:-1])
    flat, ids, shares = (each.reshape(tokens, each.shape[-1]) for each in (x, chosen, amounts.astype(x.dtype)))
    computed = way(tokens, ids.shape[-1], a.shape, b.shape[-1])
    y = computed(flat, a.astype(x.dtype), b.astype(x.dtype), ids, shares, precision)
    return y.reshape(*x.shape[:-1], b.shape[-1])


def way(tokens: int, k: int, a: tuple[int, ...], columns: int) -> Way:
    """Which of the ways computes the choices of some tokens, by shapes alone: `a` is `(slots, in, r)`.

    `gathered` where there are no more choices than slots, as in decoding: it reads no more factors than there are. Else
    `wide`, where the products with all slots multiply no more than the base's own. Beyond that `by_blocks`, if it at least
    halves them. The rule is of numbers of multiplications and reads; no times were measured.
    """
    slots, rows, rank = a
    if at_most(tokens * k, slots):
        return gathered
    if slots * rank * (rows + columns) <= rows * columns:
        return wide
    return by_blocks if at_most(2 * (tokens * k + slots * BLOCK), tokens * slots) else wide


def wide(
    x: jax.Array, a: jax.Array, b: jax.Array, chosen: jax.Array, amounts: jax.Array, precision: Any = None
) -> jax.Array:
    """By the products with all slots, each in its amount, which is zero for what is not chosen: `x [tokens, in]`."""
    places = jax.nn.one_hot(chosen, a.shape[0], dtype=amounts.dtype)
    return with_all(x, a, b, jnp.einsum("tks,tk->ts", places, amounts), precision)


def gathered(
    x: jax.Array, a: jax.Array, b: jax.Array, chosen: jax.Array, amounts: jax.Array, precision: Any = None
) -> jax.Array:
    """By the factors of every choice, `tokens * k * r * (in + out)` values."""
    thin = jnp.einsum("ti,tkir->tkr", x, a[chosen], precision=precision) * amounts[..., None]
    return jnp.einsum("tkr,tkro->to", thin, b[chosen], precision=precision)


def by_blocks(
    x: jax.Array, a: jax.Array, b: jax.Array, chosen: jax.Array, amounts: jax.Array, precision: Any = None
) -> jax.Array:
    """By the choices sorted by slot, in blocks of `BLOCK` that have one slot each; a slot's last block is filled with zeros.

    A `ragged_dot` of equal groups, so to speak: batched products, which every backend has, and which `vmap` maps.
    """
    (tokens, k), slots = chosen.shape, a.shape[0]
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat)
    by_slot = flat[order]
    counts = jnp.zeros(slots, jnp.int32).at[flat].add(1)
    last = jnp.cumsum(-(-counts // BLOCK))  # where the blocks of each slot end
    first = last - -(-counts // BLOCK)
    place = first[by_slot] * BLOCK + jnp.arange(tokens * k) - (jnp.cumsum(counts) - counts)[by_slot]
    blocks = tokens * k // BLOCK + slots  # as many as there may be
    slot = jnp.minimum(jnp.searchsorted(last, jnp.arange(blocks), side="right", method="compare_all"), slots - 1)
    rows = jnp.zeros((blocks * BLOCK, x.shape[-1]), x.dtype).at[place].set(x[order // k])
    thin = jnp.einsum("nti,nir->ntr", rows.reshape(blocks, BLOCK, -1), a[slot], precision=precision)
    y = jnp.einsum("ntr,nro->nto", thin, b[slot], precision=precision).reshape(blocks * BLOCK, -1)
    placed = jnp.zeros_like(order).at[order].set(place).reshape(tokens, k)
    return jnp.einsum("tko,tk->to", y[placed], amounts, precision=precision)
