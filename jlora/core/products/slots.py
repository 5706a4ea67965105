"""The form of a bank: many low-rank updates, of which a call chooses by row or by token, or mixes all.

With `s` the slot of a row, its effective weight is `(w + a_s @ b_s) * gain_s`. The leading axes of what is chosen are those of
the activation: a number for all, `[rows]`, or `[rows, tokens]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora.core.products.contraction import Options, accumulation_dtype, at_most, matmul
from jlora.core.products.low_rank import Factors
from jlora.core.products.update import Linear, Unfit, Update

#: All slots are computed for a choice where slots times its tokens are at most this many (see `by_slot`); not measured.
FEW = 32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots(Update):
    """The updates of a bank, and what a call chooses.

    Attributes:
        a: `[slots, in, r]`.
        b: `[slots, r, out]`.
        gain: `[slots, out]`, or None for ones.
        slot: whole numbers `[*leading]`, or None.
        weights: numbers `[*leading, slots]`, or None.
        leading: how many leading axes of the activation that is chosen for; static.
        name: path of the leaf; static.
        own: every row has the slot of its number, so that nothing is gathered; static.
    """

    a: jax.Array
    b: jax.Array
    gain: jax.Array | None = None
    slot: jax.Array | None = None
    weights: jax.Array | None = None
    leading: int = field(default=0, metadata={"static": True})
    name: str = field(default="", metadata={"static": True})
    own: bool = field(default=False, metadata={"static": True})
    refuses_forming: ClassVar[bool] = True

    def times(self, number: jax.Array) -> Self:
        """With all `b` times the number."""
        return replace(self, b=self.b * number.astype(self.b.dtype))

    def cost(self, rows: int, columns: int, lookup: bool) -> int:
        """That of one slot; of all, where they are mixed."""
        slots, _, rank = self.a.shape
        if self.weights is not None:
            return slots * rank * (rows + columns)
        return rank * (columns if lookup else rows + columns) + (0 if self.gain is None else columns)

    def chosen(self, use: str) -> Factors:
        """The update of a choice that is one for all rows.

        Raises:
            Unfit: where rows choose for themselves, or nothing is chosen.
        """
        self._check_chosen()
        if self.leading:
            raise Unfit(
                f"{self.name}: rows that choose for themselves have no {use} in common; choose one slot for all, as in "
                "on(slot=1)"
            )
        if self.weights is not None:
            return Factors(*mixed(self.a, self.b, self.weights))
        slot = self._slot()
        return Factors(taken(self.a, slot), taken(self.b, slot), self._gain())

    def dense(self, x: jax.Array, w: jax.Array, key: jax.Array | None, options: Options) -> jax.Array:
        """`x [*leading, ..., in] @ v`, for each row with its own."""
        return self.together(x, [(w, self)], options)[0]

    @staticmethod
    def together(x: jax.Array, members: Sequence[tuple[jax.Array, Slots]], options: Options) -> list[jax.Array]:
        """The products with several weights; in 16 bits each is rounded once."""
        first = members[0][1]
        first._check_chosen()
        if not first.leading:
            # A formed weight is no gain where few rows meet it, and under `vmap` it would be one for each row.
            options = replace(options, plan="factored" if options.plan == "auto" else options.plan)
            return Factors.together(x, [(w, member.chosen("product")) for w, member in members], options)
        if options.plan == "merged":
            raise Unfit(f"{first.name}: the plan 'merged' has one weight for all rows; lift with plan='auto'")
        first._check_rows(x.shape[:-1])
        return [member._by_row(x, w, options) for w, member in members]

    def transposed(self, x: jax.Array, w: jax.Array, key: jax.Array | None, options: Options) -> jax.Array:
        """`x [*leading, ..., out] @ v.T`."""
        if not self.leading:
            return self.chosen("transposed product").transposed(x, w, key, options)
        self._check_rows(x.shape[:-1])
        gain = self._gain()
        x = x if gain is None else x * self._spread(gain, x.ndim).astype(x.dtype)
        turned = replace(self, a=jnp.swapaxes(self.b, 1, 2), b=jnp.swapaxes(self.a, 1, 2), gain=None)
        return turned.dense(x, w.T, key, options)

    def lookup(self, base: jax.Array, w: jax.Array, take: Callable[[jax.Array], jax.Array], side: str) -> jax.Array:
        """Rows of each position's `v`, or columns."""
        if not self.leading:
            return self.chosen("lookup").lookup(base, w, take, side)
        self._check_rows(base.shape[:-1])
        table, other = (self.a, self.b) if side == "in" else (jnp.swapaxes(self.b, 1, 2), jnp.swapaxes(self.a, 1, 2))
        slots, size, rank = table.shape
        found = take(jnp.moveaxis(table, 0, 1).reshape(size, slots * rank)).astype(base.dtype)
        accumulate = accumulation_dtype(base.dtype)
        thin = found.reshape(*base.shape[:-1], slots, rank)
        if self.weights is not None:
            low = jnp.einsum("...sr,...s,sro->...o", thin, self._amounts(base), other.astype(base.dtype))
            return (base + low.astype(accumulate)).astype(base.dtype)
        slot = self._slot()
        chosen = jnp.broadcast_to(self._spread(slot[..., None], base.ndim), (*base.shape[:-1], 1))
        thin = jnp.take_along_axis(thin, chosen[..., None], axis=-2)[..., 0, :]
        total = base + self._grouped(thin, lambda thin: second(thin, other, slot.reshape(-1))).astype(accumulate)
        if self.gain is None:
            return total.astype(base.dtype)
        if side == "in":
            gain = self._spread(taken(self.gain, slot), base.ndim)
        else:  # the gains of the columns that are looked up, of all slots first
            gain = jnp.take_along_axis(take(self.gain.T), chosen, axis=-1)
        return (total * gain.astype(accumulate)).astype(base.dtype)

    def convolve(self, x: jax.Array, w: jax.Array, key: jax.Array | None, linear: Linear) -> jax.Array:
        """A convolution of each row with its own `v`: with several slots' `a` beside each other, of which it keeps its own."""
        if not self.leading:
            return self.chosen("convolution").convolve(x, w, key, linear)
        if self.leading > 1 or linear.rows is None or linear.rescale_rows is None:
            raise Unfit(
                f"{self.name}: a convolution mixes positions, so rows choose there, and not tokens; choose by row"
            )
        self._check_rows((linear.rows,))
        a, b, own = self._beside()
        accumulate = accumulation_dtype(linear.out_dtype)
        thin = linear.rescale_rows(linear.product(x, a.astype(x.dtype), x.dtype), own.astype(x.dtype))
        y = linear.base(x, accumulate) + linear.mix(thin, b.astype(x.dtype), accumulate)
        gain = self._gain()
        return (y if gain is None else linear.rescale_rows(y, gain.astype(accumulate))).astype(linear.out_dtype)

    def experts(self, x: jax.Array, w: jax.Array, key: jax.Array | None, linear: Linear) -> jax.Array:
        """The rows of `x` in groups, each with its expert's `v`, of one choice for all."""
        return jax.vmap(lambda update: update.chosen("product of experts"))(self).experts(x, w, key, linear)

    def _by_row(self, x: jax.Array, w: jax.Array, options: Options) -> jax.Array:
        accumulate = accumulation_dtype(options.out_dtype)
        y = matmul(x, w, accumulate, options.precision)
        if self.weights is not None:
            low = with_all(x, self.a, self.b, self._amounts(x), options.precision)
        else:
            slot = self._slot().reshape(-1)
            function = own_slot if self.own else by_slot
            low = self._grouped(x, lambda x: function(x, self.a, self.b, slot, options.precision))
        y, gain = y + low.astype(accumulate), self._gain()
        return (y if gain is None else y * self._spread(gain, y.ndim).astype(accumulate)).astype(options.out_dtype)

    def _beside(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Factors `[in, k]`, `[k, out]` of all slots, or of all rows where these are fewer; each row's share `[rows, k]`."""
        a, b, share = self.a, self.b, self.weights
        if share is None:
            slot, rows, known = self._slot(), len(self._slot()), (self._slot() >= 0) & (self._slot() < len(a))
            if rows < len(a):
                a, b = (bank.at[slot].get(mode="clip") for bank in (a, b))
                slot = jnp.arange(rows)
            # A slot that there is none of is no number in its own row alone.
            share = jnp.where(known[:, None], slot[:, None] == jnp.arange(len(a)), jnp.nan)
        return *mixed(a, b, jnp.ones(len(a))), jnp.repeat(share, self.a.shape[-1], axis=1)

    def _grouped(self, x: jax.Array, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """A function of `[choices, tokens of each, in]` applied to `x [*leading, ..., in]`."""
        y = function(x.reshape(math.prod(x.shape[: self.leading]), -1, x.shape[-1]))
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _spread(self, chosen: jax.Array, ndim: int) -> jax.Array:
        """What is chosen, `[*leading, k]`, against an array of more axes before the last."""
        return chosen.reshape(*chosen.shape[:-1], *([1] * (ndim - chosen.ndim)), chosen.shape[-1])

    def _amounts(self, x: jax.Array) -> jax.Array:
        """The weights of all slots at every position of `x`, `[..., slots]`."""
        assert self.weights is not None
        return jnp.broadcast_to(self._spread(self.weights, x.ndim), (*x.shape[:-1], self.weights.shape[-1])).astype(
            x.dtype
        )

    def _gain(self) -> jax.Array | None:
        """The chosen gains, `[*leading, out]`."""
        if self.gain is None or self.own:
            return self.gain
        return taken(self.gain, self._slot())

    def _slot(self) -> jax.Array:
        assert self.slot is not None
        return self.slot

    def _check_chosen(self) -> None:
        if self.slot is None and self.weights is None:
            raise Unfit(f"{self.name}: the call must say which slots: on(slot=...) or on(weights=...)")

    def _check_rows(self, shape: tuple[int, ...]) -> None:
        """Refuses an activation whose leading axes are not those of what is chosen."""
        self._check_chosen()
        chosen = self._slot().shape if self.weights is None else self.weights.shape[:-1]
        if shape[: self.leading] != chosen:
            what = "slots" if self.weights is None else "weights"
            raise Unfit(
                f"{self.name}: {what} for {chosen} rows (and tokens), but what it is used on has the leading axes {shape}: the "
                "function must keep the batch axis in front of every product"
            )


#: What a call may choose for, by the number of axes.
_CHOICES = ("one for all", "[rows]", "[rows, tokens]")


def check_choice(name: str, chosen: jax.Array, count: int, most: int = 2) -> None:
    """Refuses what a call chooses by `on(name=chosen)`, where that is no whole numbers below `count`, of at most `most` axes.

    Raises:
        ValueError: with what is wanted.
    """
    if chosen.ndim > most or not jnp.issubdtype(chosen.dtype, jnp.integer):
        wanted = f"{', '.join(_CHOICES[:most])} or {_CHOICES[most]}"
        raise ValueError(f"{name}= takes whole numbers, {wanted}; got {chosen.dtype} of shape {chosen.shape}")
    if isinstance(chosen, Tracer):
        return
    numbers = np.unique(np.asarray(chosen))
    wrong = numbers[(numbers < 0) | (numbers >= count)]
    if wrong.size:
        raise ValueError(f"there are {name}s 0 to {count - 1}, got {int(wrong[0])}")


def taken(bank: jax.Array, slot: jax.Array) -> jax.Array:
    """`bank[slot]`; NaN for a slot that there is none of, so that no other answers in its place."""
    return bank.at[slot].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def mixed(a: jax.Array, b: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All slots as one pair of factors: `[in, slots * r]`, each with its weight, and `[slots * r, out]`."""
    scaled = a * weights.astype(a.dtype)[:, None, None]
    return jnp.moveaxis(scaled, 0, 1).reshape(a.shape[1], -1), b.reshape(-1, b.shape[2])


def with_all(x: jax.Array, a: jax.Array, b: jax.Array, weights: jax.Array, precision: Any = None) -> jax.Array:
    """`Σ_s weights_s (x @ a_s) @ b_s` by two wide products: `x [..., in]`, `weights [..., slots]`."""
    slots, size, rank = a.shape
    wide = matmul(x, jnp.moveaxis(a, 0, 1).reshape(size, -1).astype(x.dtype), x.dtype, precision)
    wide = wide.reshape(*x.shape[:-1], slots, rank) * weights[..., None].astype(x.dtype)
    return matmul(wide.reshape(*x.shape[:-1], -1), b.reshape(slots * rank, -1).astype(x.dtype), x.dtype, precision)


def by_slot(x: jax.Array, a: jax.Array, b: jax.Array, slot: jax.Array, precision: Any = None) -> jax.Array:
    """`(x_n @ a_s) @ b_s` with `s = slot[n]`: `x [choices, tokens, in]`, `slot [choices]`.

    Either each choice gets its factors, which moves `choices * r * (in + out)` values, or every token meets those of all slots,
    which multiplies `slots` times as much. The former where choices are not more than slots, or have many tokens.
    """
    choices, tokens = x.shape[:2]
    if at_most(a.shape[0] * tokens, FEW) and not at_most(choices, a.shape[0]):
        chosen = slot[:, None, None] == jnp.arange(a.shape[0])
        known = (slot >= 0) & (slot < a.shape[0])
        weights = jnp.where(known[:, None, None], chosen.astype(x.dtype), jnp.nan)
        return with_all(x, a, b, jnp.broadcast_to(weights, (choices, tokens, a.shape[0])), precision)
    thin = jnp.einsum("nti,nir->ntr", x, taken(a, slot).astype(x.dtype), precision=precision)
    return second(thin, b, slot, precision)


def own_slot(x: jax.Array, a: jax.Array, b: jax.Array, slot: jax.Array, precision: Any = None) -> jax.Array:
    """`by_slot` where `slot[n] = n`: factors are read where they are."""
    thin = jnp.einsum("nti,nir->ntr", x, a.astype(x.dtype), precision=precision)
    return jnp.einsum("ntr,nro->nto", thin, b.astype(x.dtype), precision=precision)


def second(thin: jax.Array, b: jax.Array, slot: jax.Array, precision: Any = None) -> jax.Array:
    """`thin_n @ b_s` with `s = slot[n]`: `thin [choices, tokens, r]`."""
    return jnp.einsum("ntr,nro->nto", thin, taken(b, slot).astype(thin.dtype), precision=precision)
