"""Primitives that use a weight: contractions, lookups and convolutions, computed without forming the effective weight.

A rule is `(walk, eqn, *values) -> outputs`, or None where it does not apply; then the effective weight is formed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jlora.core.products import contraction, entries
from jlora.core.protocol.method import Factors
from jlora.core.walk import lookup
from jlora.core.walk import weight as weights
from jlora.core.walk.interpreter import Walk, bind, rule
from jlora.core.walk.weight import Axes, Piece, Weight


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
    def form(self) -> str | None:
        """ "in" for `x @ w`, "out" for `x @ w.T`, None where it is neither or the method has no factors or entries."""
        shorter = _factored(self.weight, self.x) or _by_entries(self.weight, self.x)
        return _form(self.weight, self.contract, self.batch) if shorter else None

    @property
    def order(self) -> list[Any]:
        """Labels of the result's axes."""
        axes = self.weight.axes
        x_free = [(("x", n),) for n in range(self.x.ndim) if n not in self.x_contract and n not in self.x_batch]
        free = [axes[n] for n in range(len(axes)) if n not in self.contract and n not in self.batch]
        return [*(axes[n] for n in self.batch), *(free + x_free if self.on_left else x_free + free)]

    def options(self, walk: Walk) -> contraction.Options:
        """What the product is computed with.

        Raises:
            ValueError: where the weight can't take a forced plan.
        """
        contraction.check_plan(walk.plan, self.weight.name, self.weight.array, self.weight.key is not None)
        cut = walk.cuts.get(self.weight.name, 1) if self.form == "in" else 1
        return contraction.Options(self.eqn.outvars[0].aval.dtype, self.eqn.params["precision"], walk.plan, cut)


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
    return None if use.form is None else [_contract(walk, use)]


def together(walk: Walk, uses: list[Use]) -> list[list[Any]] | None:
    """The outputs of several contractions of one activation, its thin products shared; None where they are too different.

    They must be plain products `x @ w` over the last axis of the activation, without dropout.
    """
    if any(not _is_plain(use) or use.options(walk) != uses[0].options(walk) for use in uses):
        return None
    members = [_single_matrix(use.weight) for use in uses]
    products = contraction.dense_together(uses[0].x, members, uses[0].options(walk))
    results = []
    for use, y in zip(uses, products, strict=True):
        walk.seen.add(use.weight.name)
        remaining = use.weight.with_role("out")
        y = y.reshape(*y.shape[:-1], *(piece.size for piece in remaining))
        labels = [*(("x", axis) for axis in range(use.x.ndim - 1)), *remaining]
        results.append([_arrange(y, labels, use.order, use.eqn.outvars[0].aval.shape)])
    return results


def _is_plain(use: Use) -> bool:
    stacked = _big(use.weight.batch)
    last = use.x_contract == (use.x.ndim - 1,) and not use.batch and not stacked and use.weight.key is None
    return (
        use.weight.method.low_rank
        and last
        and use.form == "in"
        and _sized(use.weight.axes[use.contract[0]]) == _sized(use.weight.with_role("in"))
    )


def _single_matrix(weight: Weight) -> tuple[jax.Array, Factors]:
    """The base matrix and the factors of a weight whose batch axes are all of size 1."""
    drop = partial(jax.tree.map, lambda m: m.reshape(m.shape[len(weight.batch) :]))
    return drop(weights.matrix(weight)), drop(weights.factors(weight))


def _factored(weight: Weight, x: jax.Array) -> bool:
    """Whether the factored form can be used; otherwise the effective weight is formed."""
    return weight.method.low_rank and _is_float(x)


def _by_entries(weight: Weight, x: jax.Array) -> bool:
    """Whether the sparse form can be used."""
    return weight.method.is_sparse and _is_float(x)


def _is_float(x: jax.Array) -> bool:
    """Whether factors can be cast to the activation's dtype; 8 bits would round them away."""
    return jnp.issubdtype(x.dtype, jnp.floating) and jnp.dtype(x.dtype).itemsize > 1


def _big(pieces: Any) -> set[Piece]:
    return {piece for piece in pieces if piece.size > 1}


def _form(weight: Weight, contract: Any, batch: Any) -> str | None:
    """ "in" for `x @ w`, "out" for `x @ w.T`, None where the contraction is neither."""
    contracted = _big(piece for axis in contract for piece in weight.axes[axis])
    stacked = _big(piece for axis in batch for piece in weight.axes[axis])
    groups = [weight.axes[axis] for axis in range(len(weight.axes))]
    if any(len({weight.role(piece) for piece in _big(group)}) > 1 for group in groups):
        return None
    if any(weight.role(piece) != "batch" for piece in stacked):
        return None
    for role in ("in", "out"):
        if contracted == _big(weight.with_role(role)) and (contracted or role == "in"):
            return role
    return None


def form_of(use: Use) -> str | None:
    """ "in" for `x @ w`, "out" for `x @ w.T`, None where it is neither, whatever the method."""
    return _form(use.weight, use.contract, use.batch)


def patches(eqn: Any, x: jax.Array, weight: Weight) -> jax.Array:
    """What a convolution multiplies its weight with, `[*positions, in]` with `in` folded as in the weight's matrix.

    Raises:
        ValueError: for feature groups, where no one matrix multiplies the input.
    """
    numbers = eqn.params["dimension_numbers"]
    if eqn.params["feature_group_count"] != 1 or eqn.params["batch_group_count"] != 1:
        raise ValueError("its groups of features multiply different inputs")
    _, features, *spatial = numbers.rhs_spec
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision")
    window = [weight.array.shape[axis] for axis in spatial]
    cut = jax.lax.conv_general_dilated_patches(
        x, window, **{name: eqn.params[name] for name in names}, dimension_numbers=numbers
    )
    cut = jnp.moveaxis(cut, numbers.out_spec[1], -1)
    free = [("x", axis) for axis in range(cut.ndim - 1)]
    have = [
        *((label,) for label in free),
        tuple(_sized([p for axis in (features, *spatial) for p in weight.axes[axis]])),
    ]
    want = [*((label,) for label in free), tuple(_sized(weight.with_role("in")))]
    return _regroup(cut, have, want, {("x", axis): cut.shape[axis] for axis in range(cut.ndim)})


Label = Any  # a Piece of the weight, or ("x", axis) for an axis of the activation


def _contract(walk: Walk, use: Use) -> jax.Array:
    """The product of one use, in the axis order that its equation wants."""
    weight, form = use.weight, use.form
    x, shared, free = folded_input(use, "in" if form == "in" else "out")
    kernels, update = (contraction, weights.factors) if weight.method.low_rank else (entries, weights.sparse)
    product = partial(kernels.dense if form == "in" else kernels.dense_transposed, options=use.options(walk))
    for piece in reversed(weight.batch):
        product = jax.vmap(product, in_axes=(0 if piece in shared else None, 0, 0, 0))
    walk.seen.add(weight.name)
    key = walk.next_key(weight.key)
    if key is not None and weight.batch:
        key = jax.random.split(key, tuple(piece.size for piece in weight.batch))  # every expert drops on its own
    y = product(x, weights.matrix(weight), update(weight), key)
    remaining = weight.with_role("out" if form == "in" else "in")
    y = y.reshape(*y.shape[:-1], *(piece.size for piece in remaining))
    return _arrange(y, [*weight.batch, *free, *remaining], use.order, use.eqn.outvars[0].aval.shape)


def folded_input(use: Use, role: str) -> tuple[jax.Array, list[Piece], list[Label]]:
    """The activation as `[*shared, *free, in]` (or `out`), the batch pieces that it shares with the weight, its own axes."""
    weight, x = use.weight, use.x
    axes = {**_pieces_of(weight, use.contract, use.x_contract), **_pieces_of(weight, use.batch, use.x_batch)}
    have: list[tuple[Label, ...]] = [axes.get(axis, (("x", axis),)) for axis in range(x.ndim)]
    free = [("x", axis) for axis in range(x.ndim) if axis not in axes]
    summed = _sized(weight.with_role(role))
    shared = [piece for piece in weight.batch if any(piece in group for group in axes.values())]
    sizes = {("x", axis): x.shape[axis] for axis in range(x.ndim)}
    want = [*((piece,) for piece in shared), *((label,) for label in free), tuple(summed)]
    return _regroup(x, have, want, sizes), shared, free


def _pieces_of(weight: Weight, axes: Any, x_axes: Any) -> dict[int, tuple[Piece, ...]]:
    """For each axis of the activation that meets the weight, the pieces it is made of."""
    return {x_axis: tuple(_sized(weight.axes[axis])) for axis, x_axis in zip(axes, x_axes, strict=True)}


def _sized(group: Sequence[Piece]) -> list[Piece]:
    return [piece for piece in group if piece.size > 1]


def _regroup(x: jax.Array, have: list[Any], want: list[Any], sizes: dict[Any, int]) -> jax.Array:
    """Moves an array between two groupings of labels; pieces of size 1 may be missing on either side."""

    def size(label: Label) -> int:
        return label.size if isinstance(label, Piece) else sizes[label]

    flat = [label for group in have for label in group]
    x = x.reshape([size(label) for label in flat])
    target = [label for group in want for label in group]
    present = [label for label in target if label in flat]
    if present != flat:
        x = jax.lax.transpose(x, [flat.index(label) for label in present])
    return x.reshape([math.prod(size(label) for label in group) for group in want])


def _arrange(y: jax.Array, labels: list[Label], order: list[Any], shape: tuple[int, ...]) -> jax.Array:
    """The product in the axis order of the equation's result."""
    target = [label for group in order for label in group if label in labels]
    target += [label for label in labels if label not in target]  # hidden axes of size 1
    if target != labels:
        y = jax.lax.transpose(y, [labels.index(label) for label in target])
    return y.reshape(shape)


@rule("ragged_dot_general")
def ragged_dot(walk: Walk, eqn: Any, x: Any, weight: Any, group_sizes: Any, *offset: Any) -> list[Any] | None:
    """Rows of an activation in groups, each with the matrix of its expert."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_contract, contract), batch = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    by_rows = tuple(x_contract) == (1,) and groups and batch == ((), ()) and not offset
    if not isinstance(weight, Weight) or isinstance(x, Weight) or x.ndim != 2 or not by_rows:
        return None
    if _form(weight, contract, groups) != "in" or not _factored(weight, x) or len(_big(weight.batch)) != 1:
        return None
    stacked = next(iter(_big(weight.batch)))
    if weight.axes[groups[0]] != (stacked,):
        return None
    by_expert = partial(jax.tree.map, lambda m: m.reshape(stacked.size, *m.shape[len(weight.batch) :]))
    f, w = by_expert(weights.factors(weight)), by_expert(weights.matrix(weight))
    product = partial(_ragged, group_sizes=group_sizes, precision=eqn.params["precision"])
    expert = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(x.shape[0]), side="right", method="compare_all")
    walk.seen.add(weight.name)
    out_dtype = eqn.outvars[0].aval.dtype
    y = contraction.forward(
        product, product, x, w, f, walk.next_key(weight.key), out_dtype, lambda y, scale: y * scale[expert]
    )
    return [y.reshape(eqn.outvars[0].aval.shape)]


def _ragged(x: jax.Array, m: jax.Array, out_dtype: Any, group_sizes: jax.Array, precision: Any) -> jax.Array:
    return jax.lax.ragged_dot(x, m, group_sizes, precision=precision, preferred_element_type=out_dtype)


@rule("gather")
def gather(walk: Walk, eqn: Any, weight: Any, indices: Any) -> list[Any] | None:
    """Matrices out of a stack, which go on as a stack, or an embedding's lookup (see `jlora.core.walk.lookup`)."""
    if not isinstance(weight, Weight) or isinstance(indices, Weight):
        return None
    matrices = lookup.select(eqn, weight, indices)
    if matrices is not None:
        return [matrices]
    found = lookup.lookup_of(eqn)
    if found is None or len(found.axes) != 1 or found.paired or eqn.params["mode"] not in lookup.MODES:
        return None
    form = _form(weight, found.axes, ())
    if form is None or not weight.method.low_rank or _big(weight.batch):
        return None
    return [_lookup(walk, eqn, weight, indices, form, found)]


def _lookup(walk: Walk, eqn: Any, weight: Weight, indices: jax.Array, form: str, found: lookup.Lookup) -> jax.Array:
    """Rows of the base plus rows of `a`, times `b`. Dropout does not act on it."""
    walk.seen.add(weight.name)
    base = bind(eqn, [weight.array, indices])[0]
    indices = found.indices(indices)
    accumulate = contraction.accumulation_dtype(base.dtype)
    f = jax.tree.map(lambda m: m.reshape(m.shape[len(weight.batch) :]), weights.factors(weight))
    table, other = (f.a, f.b) if form == "in" else (f.b.T, f.a.T)
    rows = lookup.rows(eqn, table, indices).astype(base.dtype)

    # The result has the looked-up positions and the weight's remaining axes in the order that the function wants.
    positions = [("x", n) for n in range(indices.ndim - 1)]
    remaining = weight.with_role("out" if form == "in" else "in")
    order = lookup.interleaved(eqn, found, [(label,) for label in positions], weight.axes)

    def place(y: jax.Array) -> jax.Array:
        y = y.reshape(*y.shape[:-1], *(piece.size for piece in remaining))
        return _arrange(y, [*positions, *remaining], order, base.shape)

    def adapted(base: jax.Array) -> jax.Array:
        delta = contraction.matmul(rows, other.astype(base.dtype), accumulate)
        total = base + place(delta)
        if f.scale is not None:
            scale = f.scale.astype(accumulate)
            scale = scale if form == "in" else lookup.rows(eqn, scale[:, None], indices)
            total = total * place(jnp.broadcast_to(scale, delta.shape))
        return total.astype(base.dtype)

    return lookup.in_bounds(eqn, indices, weight.array.shape[found.axes[0]], base, adapted)


@rule("conv_general_dilated")
def convolution(walk: Walk, eqn: Any, x: Any, weight: Any) -> list[Any] | None:
    """A convolution with kernel `a`, then `b` on the features; with feature groups, `a` serves every group."""
    numbers = eqn.params["dimension_numbers"]
    if not isinstance(weight, Weight) or eqn.params["batch_group_count"] != 1:
        return None
    x = walk.materialise(x, eqn)
    out_axis = numbers.rhs_spec[0]
    taps = tuple(axis for axis in range(x.ndim) if axis != out_axis)
    if _form(weight, taps, ()) != "in" or not _factored(weight, x) or _big(weight.batch):
        return None
    walk.seen.add(weight.name)
    return [_convolve(walk, eqn, x, weight)]


def _convolve(walk: Walk, eqn: Any, x: jax.Array, weight: Weight) -> jax.Array:
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    out_axis, feature = numbers.rhs_spec[0], numbers.out_spec[1]
    f = jax.tree.map(lambda m: m.reshape(m.shape[len(weight.batch) :]), weights.factors(weight))

    def product(x: jax.Array, m: jax.Array, dtype: Any) -> jax.Array:
        kernel = m if m.ndim == x.ndim else _kernel(weight, m, out_axis, groups)
        return bind(eqn, [x, kernel], preferred_element_type=jnp.dtype(dtype))[0]

    def mix(low: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
        low = jnp.moveaxis(low, feature, -1)
        if groups == 1:
            return jnp.moveaxis(contraction.matmul(low, b, dtype), -1, feature)
        low = low.reshape(*low.shape[:-1], groups, b.shape[0])
        b = b.reshape(b.shape[0], groups, -1)
        mixed = jnp.einsum("...gr,rgo->...go", low, b, preferred_element_type=dtype)
        return jnp.moveaxis(mixed.reshape(*mixed.shape[:-2], -1), -1, feature)

    def rescale(y: jax.Array, scale: jax.Array) -> jax.Array:
        return y * jnp.expand_dims(scale, [axis for axis in range(y.ndim) if axis != feature])

    key = walk.next_key(weight.key)
    return contraction.forward(product, mix, x, weight.array, f, key, eqn.outvars[0].aval.dtype, rescale)


def _kernel(weight: Weight, a: jax.Array, out_axis: int, groups: int) -> jax.Array:
    """`a [in, r]` as a convolution kernel with `groups * r` output features."""
    rank = Piece((-1,), a.shape[1])
    have: Axes = (tuple(weight.with_role("in")), (rank,))
    want = tuple((rank,) if axis == out_axis else group for axis, group in enumerate(weight.axes))
    kernel = weights.rearrange(a, have, want)
    return jnp.concatenate([kernel] * groups, axis=out_axis) if groups > 1 else kernel
