"""The low-rank product, `y = x @ (w + a @ b)` by a plan, and what all products have in common.

Products accumulate in float32 where the result is a 16-bit float, and the adapter's part is added before rounding, so an
update far below the weight's own resolution still moves the output.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jlora.core.products.backend import target

PLANS = ("auto", "factored", "merged")
# `w + a @ b` is formed where the contracted side is at most this many times the number of tokens (see `choose`).
# Measured on a 512-wide Llama on two CPU cores, ranks 4 to 64, 64 to 4096 tokens; see docs/speed.md.
FORWARD, BACKWARD = 3, 3
# Where several runs share the base, that many times fewer. Measured on two CPU cores, widths 128 to 1024, rank 8, 2 to 32 runs.
OF_RUNS = 4
# GPUs read rows of a product's operands in pieces of 16 bytes.
ALIGNED = 8
Matrices = list[jax.Array]


def accumulation_dtype(dtype: Any) -> Any:
    """float32 for 16-bit floats, otherwise the dtype itself."""
    return jnp.float32 if jnp.dtype(dtype).itemsize < 4 else dtype


def drop(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout: entries are zero with probability `rate`, the others divided by `1 - rate`.

    Without a key, or with rate 0, `x` itself (the very object, so that callers can tell).
    """
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


def matmul(x: jax.Array, m: jax.Array, out_dtype: Any, precision: Any = None) -> jax.Array:
    """`x [..., in] @ m [in, k]` with the result in `out_dtype`."""
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, m, dims, precision=precision, preferred_element_type=out_dtype)


@dataclass(frozen=True)
class Options:
    """What a dense product is computed with; static.

    Attributes:
        out_dtype: dtype of the result.
        precision: the precision that the function asked for.
        plan: "factored", "merged", "joined" or "auto" (see `choose`).
        cut: pieces into which a mesh cuts the input's last axis.
        runs: how many adapters of the same base the product is computed for, by `vmap`.
    """

    out_dtype: Any
    precision: Any = None
    plan: str = "auto"
    cut: int = 1
    runs: int = 1


def check_plan(plan: str, path: str, w: Any, dropped: bool) -> None:
    """Refuses the plan that was asked of `lift` where a weight can't take it.

    Raises:
        ValueError: for "merged" where the sum would be rounded to 16 bits, or where the adapter's input has dropout.
    """
    if plan != "merged":
        return
    site = f"{path} {tuple(w.shape)}"
    if w.dtype.itemsize < 4:
        raise ValueError(
            f"{site}: the plan 'merged' would round the adapted weight to {w.dtype} ({8 * w.dtype.itemsize} bits) and lose "
            "small updates; lift with plan='auto' or 'factored'"
        )
    if dropped:
        raise ValueError(
            f"{site}: the plan 'merged' has one input for the base and the adapter, but the adapter's has dropout; lift "
            "with plan='auto' or 'factored', or give no dropout key"
        )


@dataclass(frozen=True)
class LowRankPlan:
    """How the products of one input with some weights are computed; static.

    Attributes:
        forward: for each weight "apart" (`x @ w + (x @ a) @ b`), "formed" (`x @ (w + a @ b)`) or "joined"
            (`[x, x @ a] @ [w; b]`).
        backward: whether `w + a @ b` is formed for the gradient of `x`, to which all the weights contribute.
    """

    forward: tuple[str, ...]
    backward: bool


def choose(plan: str, tokens: int, shapes: Sequence[tuple[int, int]], dtype: Any, runs: int = 1) -> LowRankPlan:
    """The plan of the products `x [tokens, in] @ (w + a @ b)` for weights of the given shapes `[in, out]`.

    Forming `w + a @ b` costs `2 * rank * in * out` flops and moves about four arrays of `in * out` values. Adding
    `(x @ a) @ b` to `x @ w` costs `2 * rank * tokens * out` flops and moves up to four arrays of `tokens * out` values,
    fewer where the compiler adds it together with something else; the two parts may also both be kept for the backward
    pass. So whatever the rank, forming is cheaper where `in <= FORWARD * tokens`. In the backward pass `in` and `out`
    change places, and the weights of one input share the factored form's cost, since `g_q bᵀ`, `g_k bᵀ`, .. meet all `a`
    in one product. `w + a @ b` is rounded to the dtype of `w`, so it is formed for 32-bit bases alone. Where `tokens` is
    symbolic (`jax.export`), it is formed if that is cheaper for every size.

    Several runs have `tokens` rows each. There the base's product is one of all their rows, and forming makes as many products
    of few rows out of it, so it pays later (`OF_RUNS`).

    On a GPU the parts of a 16-bit product can't be added inside it, and the wide one is written in 32 bits and read again:
    about five arrays of `tokens * out` 16-bit values. Joined, all is summed in one product, and what is moved more are
    copies of each `w` and, once for all weights of the input, of `x`. In the backward pass a formed weight rounds the gradient
    alone, by 2⁻⁹, and never the output, so it is formed where that takes fewer bytes than the thin path. With several devices
    nothing is joined: an axis that is cut would be sent round.
    """
    if plan != "auto":
        form = {"merged": "formed", "factored": "apart", "joined": "joined"}[plan]
        return LowRankPlan((form,) * len(shapes), plan == "merged")
    backward = sum(columns for _, columns in shapes)
    if jnp.dtype(dtype).itemsize < 4:
        if target().platform != "gpu" or runs > 1:
            return LowRankPlan(("apart",) * len(shapes), False)
        rows = shapes[0][0]
        copies, sums = 2 * rows * (backward + tokens), 5 * tokens * backward
        form = "joined" if target().devices == 1 and at_most(copies + 1, sums) else "apart"
        return LowRankPlan((form,) * len(shapes), at_most(backward + 1, tokens))
    fewer = 1 if runs == 1 else OF_RUNS
    return LowRankPlan(
        tuple("formed" if at_most(fewer * rows, FORWARD * tokens) else "apart" for rows, _ in shapes),
        at_most(fewer * backward, BACKWARD * tokens),
    )


def at_most(small: int, large: int) -> bool:
    """`small <= large`; of sizes that `jax.export` leaves open, whether it holds for all of them."""
    try:
        return bool(small <= large)
    except jax.errors.InconclusiveDimensionOperation:
        return False


def products(
    x: jax.Array,
    weights: Matrices,
    a: Matrices,
    b: Matrices,
    scales: Sequence[jax.Array | None],
    constants: Sequence[int],
    options: Options,
) -> Matrices:
    """`x [..., in] @ (w + a @ b) * scale` for several weights, whose products with `a` and gradients of `a` are shared.

    Of each weight the last `constants` columns of `a` and rows of `b` get no gradient, and their gradient is not computed.
    """
    ranks = [m.shape[1] - n for m, n in zip(a, constants)]
    kept = [jax.lax.stop_gradient((m[:, r:], n[r:])) for m, n, r in zip(a, b, ranks)]
    a, b = [m[:, :r] for m, r in zip(a, ranks)], [m[:r] for m, r in zip(b, ranks)]

    def rows(x: jax.Array) -> Matrices:
        shapes = [(w.shape[0], w.shape[1]) for w in weights]
        plan = choose(options.plan, x.size // x.shape[-1], shapes, weights[0].dtype, options.runs)
        group = _Group(options.out_dtype, options.precision, plan, options.cut, target().platform != "gpu")
        return _low_rank(x, weights, a, b, list(scales), kept, group)[0]

    return in_rows(rows, x)


def in_rows(product: Callable[[jax.Array], Any], x: jax.Array) -> Any:
    """Applies a function of rows `[T, in]` to the last axis of `x [..., in]`; results are arrays `[T, ...]`.

    The gradients of the factors sum over all leading axes at once; with one such axis XLA's CPU backend needs no
    transposed copy of the cotangent for that. Leading axes with an explicit sharding stay apart.
    """
    if x.ndim == 2 or any(name is not None for name in jax.typeof(x).sharding.spec):
        return product(x)
    results = product(x.reshape(-1, x.shape[-1]))
    return jax.tree.map(lambda y: y.reshape(*x.shape[:-1], y.shape[-1]), results)


@dataclass(frozen=True)
class _Group:
    """How several products with one input are computed; static.

    Attributes:
        turned: whether a thin gradient is written as `(gᵀ x)ᵀ` (see `thin_tangent`).
    """

    out_dtype: Any
    precision: Any
    plan: LowRankPlan
    cut: int = 1
    turned: bool = True

    def matmul(self, x: jax.Array, m: jax.Array, dtype: Any) -> jax.Array:
        return matmul(x, m, dtype, self.precision)

    def merged(self, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        """`w + a @ b`."""
        return w + self.matmul(a, b, w.dtype)

    def thin(self, x: jax.Array, factors: list[jax.Array]) -> list[jax.Array]:
        """`x @ a` for several `a [in, r]` by one product."""
        if len(factors) == 1:
            return [self.matmul(x, factors[0], x.dtype)]
        return _split(self.matmul(x, jnp.concatenate(factors, axis=1), x.dtype), factors)

    def thin_tangent(self, x: jax.Array, factors: list[jax.Array]) -> list[jax.Array]:
        """`thin` for tangents of the factors, written so that its transpose, their gradient, is `(gᵀ x)ᵀ` and not `xᵀ g`.

        XLA's CPU backend is five times as slow at the latter, and would turn the former into it without the barrier. GPUs
        take either.
        """
        if not self.turned:
            return self.thin(x, factors)
        a = jax.lax.optimization_barrier((jnp.concatenate(factors, axis=1) if len(factors) > 1 else factors[0]).T)
        dims = (((1,), (x.ndim - 1,)), ((), ()))
        together = jax.lax.dot_general(a, x, dims, precision=self.precision, preferred_element_type=x.dtype)
        return _split(jnp.moveaxis(together, 0, -1), factors)


def _split(together: jax.Array, factors: list[jax.Array]) -> list[jax.Array]:
    """The parts of `x @ [a_1, a_2, ..]` that belong to each."""
    ends = list(itertools.accumulate(a.shape[1] for a in factors))
    return [together[..., end - a.shape[1] : end] for a, end in zip(factors, ends)]


def _whole(a: Matrices, b: Matrices, kept: list[tuple[jax.Array, jax.Array]]) -> tuple[Matrices, Matrices]:
    """The factors with their constant columns and rows."""
    return (
        [jnp.concatenate([m, c], axis=1) if c.shape[1] else m for m, (c, _) in zip(a, kept)],
        [jnp.concatenate([m, c]) if c.shape[0] else m for m, (_, c) in zip(b, kept)],
    )


@partial(jax.custom_jvp, nondiff_argnums=(6,))
def _low_rank(
    x: jax.Array,
    weights: Matrices,
    a: Matrices,
    b: Matrices,
    scales: list[jax.Array | None],
    kept: list[tuple[jax.Array, jax.Array]],
    group: _Group,
) -> tuple[Matrices, Matrices]:
    """`x @ (w + a @ b) * scale` for each weight, by its plan, and for those with a scale the product without it.

    `kept` are the constant columns of `a` and rows of `b`.
    """
    a, b = _whole(a, b, kept)
    accumulate = accumulation_dtype(group.out_dtype)
    in_pieces = group.cut > 1 and jnp.dtype(group.out_dtype).itemsize < jnp.dtype(accumulate).itemsize
    thin = [
        n for n, form in enumerate(group.plan.forward) if form != "formed" and not (in_pieces and scales[n] is None)
    ]
    low = dict(zip(thin, group.thin(x, [a[n] for n in thin]))) if thin else {}
    together = [n for n in thin if group.plan.forward[n] == "joined"]
    wide = _beside(x, [low[n] for n in together]) if together else x
    results, plain = [], []
    for n, (w, scale) in enumerate(zip(weights, scales)):
        if n in together:
            before = sum(low[m].shape[-1] for m in together[: together.index(n)])
            y = group.matmul(wide, _below(w, b[n], before, wide.shape[-1]), accumulate)
        elif n in low:
            # The adapter's part in 16 bits: half the bytes, and compilers then add it inside the wide product.
            y = group.matmul(x, w, accumulate) + group.matmul(low[n], b[n], x.dtype).astype(accumulate)
        elif group.plan.forward[n] != "formed":
            y = _in_pieces(group, x, w, a[n], b[n])
        else:
            y = group.matmul(x, group.merged(w, a[n], b[n]).astype(x.dtype), accumulate)
        results.append(_scaled(y, scale).astype(group.out_dtype))
        if scale is not None:
            plain.append(y.astype(group.out_dtype))
    return results, plain


def _scaled(y: jax.Array, scale: jax.Array | None) -> jax.Array:
    """`y * scale` in 32 bits, in the dtype of `y`: a gradient that passes is rounded once, and none is written in 32 bits."""
    if scale is None:
        return y
    dtype = accumulation_dtype(y.dtype)
    return (y.astype(dtype) * scale.astype(dtype)).astype(y.dtype)


def _beside(x: jax.Array, low: Matrices) -> jax.Array:
    """`[x, low_1, low_2, .., 0]`, as wide as GPUs want it."""
    width = x.shape[-1] + sum(each.shape[-1] for each in low)
    rest = jnp.zeros((*x.shape[:-1], -width % ALIGNED), x.dtype)
    return jnp.concatenate([x, *low, rest], axis=-1)


def _below(w: jax.Array, b: jax.Array, before: int, rows: int) -> jax.Array:
    """`[w; 0; b; 0]`, with `before` zeros between them, `[rows, out]`: zeros stand where other weights have their `b`."""
    b = jnp.pad(b.astype(w.dtype), ((before, rows - w.shape[0] - before - b.shape[0]), (0, 0)))
    return jnp.concatenate([w, b])


def _in_pieces(group: _Group, x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`x @ (w + a @ b)` as the sum over pieces of the input, each rounded with its share of the adapter.

    Where each device holds a piece, the sum over devices is then one of 16 bits a value.
    """
    accumulate = accumulation_dtype(group.out_dtype)
    x = x.reshape(*x.shape[:-1], group.cut, -1)
    w, a = (m.reshape(group.cut, -1, m.shape[-1]) for m in (w, a))
    by_piece = (((x.ndim - 1,), (1,)), ((x.ndim - 2,), (0,)))

    def product(m: jax.Array, dtype: Any) -> jax.Array:
        return jax.lax.dot_general(x, m, by_piece, precision=group.precision, preferred_element_type=dtype)

    low = group.matmul(product(a, x.dtype), b, x.dtype)
    y = (product(w, accumulate) + low.astype(accumulate)).astype(group.out_dtype)
    # Not jnp.sum, which would add up in 32 bits, and so send 32 bits from device to device.
    return jax.lax.reduce(y, jnp.zeros((), y.dtype), jax.lax.add, (0,))


@partial(_low_rank.defjvp, symbolic_zeros=True)
def _low_rank_jvp(group: _Group, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """The derivative, written so that its transpose is what a hand-written backward pass would be.

    With cotangents `g` of the results: `da = xᵀ (g bᵀ)`, `db = (x a)ᵀ g`, and `dx` the sum of `g (w + a b)ᵀ` by the plans;
    never the dense `xᵀ g`, unless somebody differentiates the base itself. With a scale `g` is `g * scale` there, in the
    results' own dtype, and `dscale` the sum over rows of `g` times the product without it. Kept for the backward pass: `x`,
    `x a`, and that product. The
    barrier's transpose is a barrier on the gradients: `dx` is not used before `da` and `db` are computed too, after which
    nothing needs `x` and `g`, and their memory is free.
    """
    x, weights, a, b, scales, kept = primals
    live = jax.tree.map(lambda t: None if isinstance(t, SymbolicZero) else t, tangents[:-1], is_leaf=_is_zero)
    dx, dw, da, db, dscales = jax.lax.optimization_barrier(live)
    results, plain = _low_rank(x, weights, a, b, scales, kept, group)
    terms: list[list[jax.Array]] = [[] for _ in weights]
    if dx is not None:
        for n, term in enumerate(_through_input(group, dx, weights, *_whole(a, b, kept))):
            terms[n].append(term)
    dtype = group.out_dtype
    moved = [n for n, each in enumerate(da) if each is not None]
    for n, low in zip(moved, group.thin_tangent(x, [da[n] for n in moved]) if moved else []):
        terms[n].append(group.matmul(low, b[n], dtype))
    moved = [n for n, each in enumerate(db) if each is not None]
    for n, low in zip(moved, group.thin(x, [a[n] for n in moved]) if moved else []):
        terms[n].append(group.matmul(low, db[n], dtype))
    for n, each in enumerate(dw):
        if each is not None:
            terms[n].append(group.matmul(x, each, dtype))
    moved = [sum(t[1:], t[0]).astype(y.dtype) if t else jnp.zeros_like(y) for t, y in zip(terms, results)]
    without = [y for y, scale in zip(moved, scales) if scale is not None]
    moved = [_scaled(y, scale) for y, scale in zip(moved, scales)]
    of_scales = [n for n, scale in enumerate(scales) if scale is not None]
    for n, y in zip(of_scales, plain):
        if dscales[n] is not None:
            moved[n] = moved[n] + _scaled(y, dscales[n])
    return (results, plain), (moved, without)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def _through_input(group: _Group, dx: jax.Array, weights: Matrices, a: Matrices, b: Matrices) -> Matrices:
    """`dx @ (w + a @ b)` for each weight; linear in `dx`.

    In the results' own dtype: a gradient of 16 bits need not meet its parts in 32, which would cost twice the bytes.
    """
    dtype = group.out_dtype

    def formed(dx: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return group.matmul(dx, group.merged(w, a, b).astype(dx.dtype), dtype)

    if group.plan.backward:  # checkpointed, so that the formed weight is not kept from the forward to the backward pass
        return [jax.checkpoint(formed)(dx, *each) for each in zip(weights, a, b)]
    low = group.thin(dx, a)
    return [group.matmul(dx, w, dtype) + group.matmul(thin, each, dtype) for w, thin, each in zip(weights, low, b)]
