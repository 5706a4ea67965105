"""The sparse product: `y = x @ (w + scatter(values))`, by a changed copy of `w` or entry by entry.

One entry adds `x[:, row] * value` to `y[:, column]`, and its value's gradient is `x[:, row] · g[:, column]`. Done so, no
`[in, out]` array arises but `w` itself; where tokens are many, a changed copy of `w` costs less, and where entries are
many, so does the dense gradient `xᵀ g` that the entries are then read from.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jlora import _compat
from jlora.core.products.backend import target
from jlora.core.products.contraction import Options, accumulation_dtype, at_most, in_rows, matmul

#: How many entries of `w` a dense product goes through in the time that one changed entry takes by itself. Measured on two
#: CPU cores, where a gradient by entries takes as long as the dense one when 3 to 4 % of the entries are changed
#: (docs/switching.md). Elsewhere an estimate: an accelerator's dense products are far faster, its memory is not.
ENTRY_COST = {"cpu": 32}
ENTRY_COST_ELSEWHERE = 512

#: How many products of an entry and a token are held at a time for the values' gradients, so that they stay in the cache:
#: 2**17 are 512 KB in float32.
IN_CACHE = 2**17


@dataclass(frozen=True)
class SparsePlan:
    """How one product and its gradients are computed; static.

    Attributes:
        forward: "entries", "formed" (`x @ (w + update)`) or "apart" (`x @ w + x @ update`, which rounds no sum).
        backward: the same for the gradient of `x`.
        gradient: "entries" or "dense" (the values' gradients are read from `xᵀ g`).
    """

    forward: str
    backward: str
    gradient: str


def choose(plan: str, tokens: int, shape: tuple[int, ...], entries: int, dtype: Any) -> SparsePlan:
    """The plan of a product `x [tokens, in] @ (w + scatter(values))`.

    For a 32-bit base the choice is by memory traffic: forming `w + update` moves about `in * out` values, going entry by
    entry `tokens * entries`. For a 16-bit base that sum would be rounded, so the choice is between entries and a second
    dense product, with the update alone; so it is for the values' gradients. A dense product costs `tokens * in * out`
    multiply-adds, entries `tokens * entries`, each of them slower (`ENTRY_COST`).

    Args:
        plan: "factored" (entries everywhere), "merged" or "auto".
        tokens: rows of `x`.
        shape: of `w`.
        entries: `k`.
        dtype: of `w`.
    """
    if plan != "auto":
        return (
            SparsePlan("entries", "entries", "entries")
            if plan == "factored"
            else SparsePlan("formed", "formed", "dense")
        )
    size = shape[0] * shape[1]
    few = entries * ENTRY_COST.get(target().platform, ENTRY_COST_ELSEWHERE) < size
    if jnp.dtype(dtype).itemsize < 4:
        product = "entries" if few else "apart"
    else:
        product = "entries" if at_most(entries * tokens + 1, size) else "formed"
    return SparsePlan(product, product, "entries" if few else "dense")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Entries:
    """`values [k]` at `rows [k]` and `columns [k]`; no position twice."""

    rows: jax.Array
    columns: jax.Array
    values: jax.Array

    def added_to(self, w: jax.Array) -> jax.Array:
        """`w` with the values added, each sum rounded once."""
        # By rows and columns, not by flat positions: on a mesh those would gather the whole of a `w` that is cut.
        at = w.at[self.rows, self.columns]
        wide = jnp.promote_types(w.dtype, self.values.dtype)
        if wide == w.dtype:
            return at.add(self.values.astype(wide), unique_indices=True)
        return at.set((at.get().astype(wide) + self.values).astype(w.dtype), unique_indices=True)

    def alone(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """The values in a matrix of zeros."""
        return jnp.zeros(shape, dtype).at[self.rows, self.columns].add(self.values.astype(dtype), unique_indices=True)


def product(x: jax.Array, w: jax.Array, entries: Entries, options: Options) -> jax.Array:
    """`x [..., in] @ (w + update)`."""

    def rows(x: jax.Array) -> jax.Array:
        plan = choose(options.plan, x.size // x.shape[-1], w.shape, entries.values.size, w.dtype)
        return _product(x, w, entries, _Static(options.out_dtype, options.precision, plan))

    return in_rows(rows, x)


@dataclass(frozen=True)
class _Static:
    """How a product is computed; static."""

    out_dtype: Any
    precision: Any
    plan: SparsePlan

    def matmul(self, x: jax.Array, m: jax.Array, dtype: Any = None) -> jax.Array:
        return matmul(x, m, dtype or accumulation_dtype(self.out_dtype), self.precision)

    def through(self, kind: str, x: jax.Array, w: jax.Array, entries: Entries) -> jax.Array:
        """`x @ (w + update)` by one of the kinds; linear in `x`."""
        if kind == "formed":
            return self.matmul(x, entries.added_to(w).astype(x.dtype))
        return self.matmul(x, w.astype(x.dtype)) + self.update(kind, x, w.shape, entries)

    def update(self, kind: str, x: jax.Array, shape: tuple[int, ...], entries: Entries, step: int = 0) -> jax.Array:
        """`x @ update`, by entries or dense; linear in `x` and in the values."""
        if kind == "entries":
            return by_entries(x, entries, shape[1], step).astype(accumulation_dtype(self.out_dtype))
        return self.matmul(x, entries.alone(shape, x.dtype))


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _product(x: jax.Array, w: jax.Array, entries: Entries, static: _Static) -> jax.Array:
    """`x @ (w + update)`."""
    return static.through(static.plan.forward, x, w, entries).astype(static.out_dtype)


@partial(_product.defjvp, symbolic_zeros=True)
def _product_jvp(static: _Static, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """The derivative, whose transpose is the backward pass.

    Kept for it: `x`. The barrier's transpose is a barrier on the gradients: `dx` is not used before those of the values are
    computed too, after which nothing needs `x`.
    """
    x, w, entries = primals
    live = [None if isinstance(t, SymbolicZero) else t for t in (tangents[0], tangents[1], tangents[2].values)]
    dx, dw, dvalues = jax.lax.optimization_barrier(live)
    terms = []
    if dx is not None:  # checkpointed, so that nothing formed here is kept from the forward to the backward pass
        terms.append(jax.checkpoint(partial(static.through, static.plan.backward))(dx, w, entries))
    if dw is not None:
        terms.append(static.matmul(x, dw))
    if dvalues is not None:
        moved = Entries(entries.rows, entries.columns, dvalues)
        rows = x.size // x.shape[-1]  # symbolic under `jax.export`, where nobody knows what the cache will hold
        step = min(max(w.shape), max(16, IN_CACHE // max(rows, 1) if isinstance(rows, int) else 0))
        terms.append(static.update(static.plan.gradient, x, w.shape, moved, step))
    y = _product(x, w, entries, static)
    return y, sum(terms[1:], terms[0]).astype(y.dtype) if terms else jnp.zeros_like(y)


def by_entries(x: jax.Array, entries: Entries, out: int, step: int = 0) -> jax.Array:
    """`x [..., in] @ scatter(values)`, some entries at a time, in the values' dtype.

    Features come first, since then an entry reads and adds to one contiguous row. By default `max(in, out)` entries go
    at a time, which makes the intermediate arrays as large as `x` or `y`. Fewer would cost more, since every block adds an
    array of the size of `x` to its gradient; where the values alone have a gradient, `step` may be small.
    """
    k, step = entries.values.size, step or max(x.shape[-1], out)
    features = jnp.moveaxis(x, -1, 0)
    y = jnp.zeros((out, *features.shape[1:]), entries.values.dtype)
    y = _compat.varying_as(y, features, *jax.tree.leaves(entries))

    @partial(jax.checkpoint, prevent_cse=False)
    def add(y: jax.Array, features: jax.Array, entries: Entries) -> jax.Array:
        some = features.at[entries.rows].get(mode="promise_in_bounds").astype(y.dtype)
        weighted = some * jnp.expand_dims(entries.values, range(1, y.ndim))
        return y.at[entries.columns].add(weighted, mode="drop")

    if k <= step:
        return jnp.moveaxis(add(y, features, entries), 0, -1)

    def parts(array: jax.Array, filler: int) -> jax.Array:
        return jnp.pad(array, (0, -k % step), constant_values=filler).reshape(-1, step)

    # Fillers add to a column beyond the last, where mode="drop" drops them, whatever they read.
    blocks = Entries(parts(entries.rows, 0), parts(entries.columns, out), parts(entries.values, 0))
    y, _ = jax.lax.scan(lambda y, block: (add(y, features, block), None), y, blocks)
    return jnp.moveaxis(y, 0, -1)
