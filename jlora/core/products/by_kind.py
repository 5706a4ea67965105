"""The form of slots of several kinds: some hold factors, others the arrays of any method, and a call chooses by row.

A slot of another kind has its method's own product, computed for each row with the arrays of its slot. Products of a kind
that no row of a call has are passed over while the program runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp

from jlora.core.products.contraction import Options
from jlora.core.products.formed import Formed
from jlora.core.products.slots import Slots, taken
from jlora.core.products.update import Unfit, Update


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ByKind(Update):
    """The updates of slots of several kinds.

    Attributes:
        slots: those of kind 0, low-rank ones, and what a call chooses.
        kind: int32 `[slots]`, the kind of each slot.
        fields: for the kinds 1, 2, .. the trained arrays and the constants of the method, `[slots, ...]` each.
        view: the base's matrix, as methods see it.
        sites: for the same kinds the leaf with the method; static.
        number: what the function multiplied the weight with, or None.
    """

    slots: Slots
    kind: jax.Array
    fields: tuple[tuple[dict[str, jax.Array], dict[str, jax.Array]], ...]
    view: Any
    sites: tuple[Any, ...] = field(metadata={"static": True})
    number: jax.Array | None = None

    def times(self, number: jax.Array) -> Self:
        """With the number for the results."""
        mine = number if self.number is None else number * self.number
        return replace(self, slots=self.slots.times(number), number=mine)

    def cost(self, rows: int, columns: int, lookup: bool) -> int:
        """That of a low-rank slot; what another kind costs depends on what is chosen."""
        return self.slots.cost(rows, columns, lookup)

    def dense(self, x: jax.Array, w: jax.Array, key: jax.Array | None, options: Options) -> jax.Array:
        """`x [*leading, ..., in] @ v`, for each row with its own."""
        y, slot, leading = self.slots.dense(x, w, key, options), self.slots.slot, self.slots.leading
        if slot is None:
            raise Unfit(f"{self.slots.name}: slots that hold no factors are chosen by slot=, and can't be mixed")
        # Of a slot that there is none of, the low-rank product is NaN.
        kind = self.kind.at[slot].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        for n, (fields, site) in enumerate(zip(self.fields, self.sites, strict=True), 1):
            mine = kind == n
            spread = mine.reshape(*mine.shape, *([1] * (y.ndim - leading)))

            def with_kind(y: jax.Array, fields: Any = fields, site: Any = site, spread: Any = spread) -> jax.Array:
                return jnp.where(spread, self._of_kind(x, w, fields, site, options), y)

            y = jax.lax.cond(jnp.any(mine), with_kind, lambda y: y, y)
        return y

    def weight(self, w: jax.Array) -> jax.Array:
        """The matrix `v [in, out]` of a choice that is one for all rows.

        Raises:
            Unfit: where rows choose for themselves, nothing is chosen, or a kind has no matrix.
        """
        v, slot = self.slots.chosen("weight").weight(w), self.slots.slot
        assert slot is not None
        for n, (fields, site) in enumerate(zip(self.fields, self.sites, strict=True), 1):
            if not site.method.mergeable:
                raise Unfit(f"{self.slots.name}: a slot may hold {site.method}, which has no weight to form")
            params, frozen = _of(fields, slot)
            view = replace(self.view, params=params, frozen=frozen, site=site)
            mine = self.kind[slot] == n
            v = jax.lax.cond(mine, lambda v, view=view: view.site.method.weight(view).astype(v.dtype), lambda v: v, v)
        return v

    def _of_kind(self, x: jax.Array, w: jax.Array, fields: Any, site: Any, options: Options) -> jax.Array:
        """The products of one kind for all rows, whatever kind they have."""

        def one(x: jax.Array, fields: Any) -> jax.Array:
            view = replace(self.view, params=fields[0], frozen=fields[1], site=site)
            update = Formed(view) if site.method.form is None else site.method.update(view)
            return (update if self.number is None else update.times(self.number)).dense(x, w, None, options)

        slot, leading = self.slots.slot, self.slots.leading
        assert slot is not None
        if not leading:
            return one(x, _of(fields, slot))
        mine = fields if self.slots.own else _of(fields, slot.reshape(-1))
        y = jax.vmap(one)(x.reshape(math.prod(x.shape[:leading]), -1, x.shape[-1]), mine)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def _of(fields: Any, slot: jax.Array) -> Any:
    """The arrays of the chosen slots; positions and other whole numbers have no NaN."""
    return jax.tree.map(lambda x: taken(x, slot) if jnp.issubdtype(x.dtype, jnp.inexact) else x[slot], fields)
