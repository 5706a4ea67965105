"""The method of a bank's leaves: low-rank updates in slots, of which a call chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora import paths
from jlora.core.products.slots import Slots, check_choice
from jlora.core.protocol.hyperparameters import check_hyperparameters, integer
from jlora.core.protocol.method import Arrays, Method, Site, Start, View, factor_labels
from jlora.core.tree import placement
from jlora.core.tree.adapted import Adapted, Plan
from jlora.methods.lora import kaiming, trained_dtype


@dataclass(frozen=True)
class Slotted(Method):
    """Low-rank updates in slots: `(w + a_s @ b_s) * gain_s` for the slot `s` that a call chooses, or a mix of all.

    With `on(slot=s)` for whole numbers `s`: one for all, `[rows]`, or `[rows, tokens]`. With `on(weights=m)` for numbers `m
    [..., slots]`: `w + sum over s of m_s * a_s @ b_s`. Slot 0 is zero, and stays so in training. Trains
    `slots * (rank * (in + out) + (out if gains else 0))` values a matrix.

    Args:
        slots: number of slots, the one that is zero included.
        rank: columns of every `a_s`; any number, since adapters of smaller ranks are filled up with zeros.
        gains: whether slots have a gain.
        own: where a call chooses nothing, row `n` has slot `n`: as many rows as slots, and nothing is gathered.

    Raises:
        ValueError: for a hyperparameter out of range.
    """

    slots: int = 2
    rank: int = 8
    gains: bool = False
    own: bool = False

    local: ClassVar[frozenset[str]] = frozenset({"in", "out"})
    context: ClassVar[frozenset[str]] = frozenset({"slot", "weights"})
    form = Slots

    def __post_init__(self) -> None:
        check_hyperparameters(self, ("rank",), {"slots": integer(1, "a whole number of at least 1")})

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        factors = {"a": ("", "in", "rank"), "b": ("", "rank", "out")}
        return {**factors, "gain": ("", "out")} if self.gains else factors

    def check_context(self, context: Arrays) -> None:
        """Refuses slots that are no whole numbers below `slots`, and weights of another number of slots."""
        slot, weights = context.get("slot"), context.get("weights")
        if slot is not None and weights is not None:
            raise ValueError("a call chooses by slot= or by weights=, not by both; None takes one away")
        if slot is not None:
            check_choice("slot", slot, self.slots)
        if weights is None:
            return
        if weights.ndim not in (1, 2, 3) or weights.shape[-1] != self.slots:
            raise ValueError(
                f"weights= takes numbers [slots], [rows, slots] or [rows, tokens, slots] for {self.slots} slots; got shape "
                f"{weights.shape}"
            )
        if self.gains:
            raise ValueError(
                "adapters with a gain, such as DoRA, are no sums of changes, so weights= can't mix them; choose by slot="
            )

    def start(self, key: jax.Array, w: jax.Array, site: Site) -> Start:
        """LoRA's in every slot but the first, which is zero; gains are ones."""
        dtype, (rows, columns) = trained_dtype(w), w.shape
        a = kaiming(key, (rows, (self.slots - 1) * self.rank), dtype).reshape(rows, self.slots - 1, self.rank)
        a = jnp.concatenate([jnp.zeros((1, rows, self.rank), dtype), jnp.moveaxis(a, 1, 0)])
        gain = {"gain": jnp.ones((self.slots, columns), dtype)} if self.gains else {}
        return Start({"a": a, "b": jnp.zeros((self.slots, self.rank, columns), dtype), **gain})

    def weight(self, view: View) -> jax.Array:
        """That of the one choice for all rows; there is none where rows choose for themselves."""
        return self.update(view).chosen("weight").weight(view.w)

    def update(self, view: View) -> Slots:
        """All slots, and what the call chooses."""
        slot, weights = view.context.get("slot"), view.context.get("weights")
        leading = 0 if slot is None else slot.ndim
        leading = leading if weights is None else weights.ndim - 1
        mine = view.params
        own = self.own and slot is None and weights is None
        if own:
            slot, leading = jnp.arange(self.slots), 1
        return Slots(mine["a"], mine["b"], mine.get("gain"), slot, weights, leading, view.site.path, own)

    def arrays(self, site: Site, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of a leaf, `[*batch, slots, ...]`.

        Args:
            site: the leaf.
            dtype: of factors and gains.
        """
        front = (*site.batch_shape, self.slots)
        shapes = {"a": (*front, site.in_size, self.rank), "b": (*front, self.rank, site.out_size)}
        shapes |= {"gain": (*front, site.out_size)} if self.gains else {}
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}

    def labels(self, site: Site) -> dict[str, str]:
        """LoRA+'s groups; a gain learns as B does and never decays."""
        gain = {"gain": "vector"} if self.gains else {}
        return factor_labels(site, {"a": "a", "b": "b"}) | gain


Slotted.CASES = (Slotted(slots=3, rank=2), Slotted(slots=3, rank=2, gains=True))


def empty(params: Any, sites: Sequence[Site], dtype: Any) -> Adapted:
    """A bank without adapters, beside its base."""
    leaves = dict(paths.flatten_with_keys(params)[0])
    order = {keys: n for n, keys in enumerate(leaves)}
    sites = sorted(sites, key=lambda site: order[site.keys])
    made: dict[str, Any] = {}
    for site in sites:
        lie = placement.field_shardings(site, leaves[site.keys]) or {}
        kind = trained_dtype(leaves[site.keys]) if dtype is None else dtype
        fields = {
            name: jnp.full(each.shape, name == "gain", each.dtype, device=lie.get(name))
            for name, each in arrays_of(site, kind).items()
        }
        paths.insert(made, site.keys, fields)
    return Adapted(params, made, {}, {}, Plan(tuple(sites)))


def arrays_of(site: Site, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """A leaf's arrays; `dtype` that of factors and gains."""
    assert isinstance(site.method, Slotted)
    return site.method.arrays(site, dtype)


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def put(banks: list[Arrays], new: list[Arrays], slot: jax.Array, depths: tuple[int, ...]) -> list[Arrays]:
    """The banks with a slot overwritten, in place."""

    def one(bank: jax.Array, value: jax.Array, depth: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(bank, jnp.expand_dims(value, depth), slot, depth)

    pairs = zip(banks, new, depths, strict=True)
    return [{name: one(bank[name], fields[name], depth) for name in bank} for bank, fields, depth in pairs]
