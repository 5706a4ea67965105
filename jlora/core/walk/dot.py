"""Contractions of an activation with a weight, computed by the weight's own update where that has such a use.

A rule is `(walk, eqn, *values) -> outputs`, or None where it does not apply; then the effective weight is formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax

from jlora import _compat
from jlora.core.products.by_rows import by_rows
from jlora.core.products.contraction import Options, check_plan
from jlora.core.protocol.method import View
from jlora.core.walk import notes, taps
from jlora.core.walk import weight as weights
from jlora.core.walk.decoding import decoding
from jlora.core.walk.folding import Label, arrange, big, is_float, regroup, side_of, single_matrix, sized
from jlora.core.walk.interpreter import Walk, rule
from jlora.core.walk.weight import Piece, Weight

#: The use of `Update` that contracts each side of the matrix.
USES = {"in": "dense", "out": "transposed"}


@dataclass(frozen=True)
class Use:
    """One contraction of an activation with a weight.

    Attributes:
        eqn: the equation.
        weight, x: its operands.
        contract, batch: contracted and batch axes of the weight.
        x_contract, x_batch: the same of the activation.
        on_left: whether the weight is the first operand.
    """

    eqn: Any
    weight: Weight
    x: jax.Array
    contract: tuple[int, ...]
    x_contract: tuple[int, ...]
    batch: tuple[int, ...]
    x_batch: tuple[int, ...]
    on_left: bool

    @property
    def side(self) -> str | None:
        """ "in" for `x @ w`, "out" for `x @ w.T`, None where it is neither."""
        return side_of(self.weight, self.contract, self.batch)

    @property
    def is_owned(self) -> bool:
        """Whether the weight's update has a use of its own for it."""
        return self.side is not None and self.weight.owns(USES[self.side]) and is_float(self.x)

    @property
    def order(self) -> list[Any]:
        """Labels of the result's axes."""
        axes = self.weight.axes
        x_free = [(("x", n),) for n in range(self.x.ndim) if n not in self.x_contract and n not in self.x_batch]
        free = [axes[n] for n in range(len(axes)) if n not in self.contract and n not in self.batch]
        return [*(axes[n] for n in self.batch), *(free + x_free if self.on_left else x_free + free)]

    def options(self, walk: Walk) -> Options:
        """What the product is computed with.

        Raises:
            ValueError: where the weight can't take a forced plan.
        """
        check_plan(walk.plan, self.weight.name, self.weight.array, self.weight.key is not None)
        cut = walk.cuts.get(self.weight.name, 1) if self.side == "in" else 1
        return Options(self.eqn.outvars[0].aval.dtype, self.eqn.params["precision"], walk.plan, cut, walk.runs)


def use_of(eqn: Any, lhs: Any, rhs: Any) -> Use:
    """The `Use` that a `dot_general` of a weight and an array is."""
    contract, batch = (tuple(map(tuple, pair)) for pair in eqn.params["dimension_numbers"])
    on_left = isinstance(lhs, Weight)
    w, x = (0, 1) if on_left else (1, 0)
    operands = (lhs, rhs)
    return Use(eqn, operands[w], operands[x], contract[w], contract[x], batch[w], batch[x], on_left)


@rule("dot_general")
def dot_general(walk: Walk, eqn: Any, lhs: Any, rhs: Any) -> list[Any] | None:
    """Any contraction of an activation with all in-axes, or all out-axes, of a weight, on either side."""
    if isinstance(lhs, Weight) and isinstance(rhs, Weight):
        rhs = walk.materialise(rhs, eqn)
    use = use_of(eqn, lhs, rhs)
    return [_contract(walk, use)] if use.is_owned else None


def together(walk: Walk, uses: list[Use]) -> list[list[Any]] | None:
    """The outputs of several contractions of one activation, computed together; None where they are too different.

    They must be plain products `x @ w` over the last axis of the activation, without dropout, with updates of one form.
    """
    form = uses[0].weight.form
    if not form.owns("together"):
        return None
    for use in uses:
        if use.weight.form is not form or not _is_plain(use) or use.options(walk) != uses[0].options(walk):
            return None
        if _goes_through_chain(use, math.prod(use.x.shape[:-1]), use.options(walk)):
            return None

    def computed(x: jax.Array, members: list[Weight]) -> list[jax.Array]:
        return form.together(x, [single_matrix(weight) for weight in members], uses[0].options(walk))

    joined = [use.weight for use in uses]
    products = decoding(computed, joined)(uses[0].x, joined)
    results = []
    for use, y in zip(uses, products, strict=True):
        walk.seen.add(use.weight.name)
        remaining = use.weight.with_role("out")
        y = y.reshape(*y.shape[:-1], *(piece.size for piece in remaining))
        labels = [*(("x", axis) for axis in range(use.x.ndim - 1)), *remaining]
        results.append([arrange(y, labels, use.order, use.eqn.outvars[0].aval.shape)])
    return results


def _is_plain(use: Use) -> bool:
    stacked = big(use.weight.batch)
    last = use.x_contract == (use.x.ndim - 1,) and not use.batch and not stacked and use.weight.key is None
    return (
        last
        and use.is_owned
        and use.side == "in"
        and sized(use.weight.axes[use.contract[0]]) == sized(use.weight.with_role("in"))
    )


def _contract(walk: Walk, use: Use) -> jax.Array:
    """The product of one use, in the axis order that its equation wants."""
    weight, side, options = notes.known(walk.notes, use.weight), "in" if use.side == "in" else "out", use.options(walk)
    x, shared, free = folded_input(use, side)

    def product(view: View, w: Any, key: jax.Array | None, x: jax.Array) -> Any:
        if says:
            return weights.update_of(weight, view).spoken(x, w, key, options)

        def whole(x: jax.Array, arrays: Any) -> jax.Array:
            view, w, factor = arrays
            update = weights.update_of(replace(weight, factor=factor), view)
            return update.dense(x, w, key, options) if side == "in" else update.transposed(x, w, key, options)

        # With a key a piece of the rows would not drop what the whole of them does.
        pieces = walk.rows if weight.form.sums_matrices and key is None else 1
        return by_rows(whole, x, (view, w, weight.factor), pieces)

    walk.seen.add(weight.name)
    listens, tells = taps.listens(walk, weight), bool(weight.method.tells) and weight.form.owns("spoken")
    says = side == "in" and (listens or tells)
    chained = not says and _goes_through_chain(use, math.prod(x.shape[len(shared) : -1]), options)
    key = walk.next_key(weight.key, use.x)
    if key is not None and USES[side] not in weight.form.drops:
        raise ValueError(
            f"{weight.name}: {weight.method} has dropout, which can't act where its weight is formed or transposed; set it to "
            "0 for this leaf, put jlora.Dropout around a method without, or give no dropout key"
        )
    if key is not None and weight.batch:
        key = jax.random.split(key, tuple(piece.size for piece in weight.batch))  # every expert drops on its own
    along = lambda piece: (0, 0, 0 if piece in shared else None)  # noqa: E731
    base = weights.chain(weight) if chained else weights.matrix(weight)
    y = weights.over_batch(product, weight, (base, key, x), along)
    if says:
        y, said = y
        walk.taps += notes.note(weight, said)
        if listens:
            taps.hear(walk, weight, said)
    remaining = weight.with_role("out" if side == "in" else "in")
    y = y.reshape(*y.shape[:-1], *(piece.size for piece in remaining))
    return arrange(y, [*weight.batch, *free, *remaining], use.order, use.eqn.outvars[0].aval.shape)


def _goes_through_chain(use: Use, rows: Any, options: Options) -> bool:
    """Whether a product of so many rows goes through the matrices that a code makes the weight of, and not with it decoded.

    Not where the plan is forced, nor where a mesh's pieces of the result are added up before it is rounded.
    """
    free = options.plan == "auto" and options.cut == 1 and not _compat.explicit_sharding(use.eqn.outvars[0].aval)
    return free and weights.has_chain(use.weight, rows)


def folded_input(use: Use, role: str) -> tuple[jax.Array, list[Piece], list[Label]]:
    """The activation as `[*shared, *free, in]` (or `out`), the batch pieces that it shares with the weight, its own axes."""
    weight, x = use.weight, use.x
    axes = {**_pieces_of(weight, use.contract, use.x_contract), **_pieces_of(weight, use.batch, use.x_batch)}
    have: list[tuple[Label, ...]] = [axes.get(axis, (("x", axis),)) for axis in range(x.ndim)]
    free = [("x", axis) for axis in range(x.ndim) if axis not in axes]
    summed = sized(weight.with_role(role))
    shared = [piece for piece in weight.batch if any(piece in group for group in axes.values())]
    sizes = {("x", axis): x.shape[axis] for axis in range(x.ndim)}
    want = [*((piece,) for piece in shared), *((label,) for label in free), tuple(summed)]
    return regroup(x, have, want, sizes), shared, free


def _pieces_of(weight: Weight, axes: Any, x_axes: Any) -> dict[int, tuple[Piece, ...]]:
    """For each axis of the activation that meets the weight, the pieces it is made of."""
    return {x_axis: tuple(sized(weight.axes[axis])) for axis, x_axis in zip(axes, x_axes, strict=True)}
