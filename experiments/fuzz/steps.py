"""What may happen to a weight: steps it passes, things that go around the rest of a program, and ends that use it.

Each is a function `(shape, draw) -> Python text` of an expression in `w`, the weight so far; None where it does not fit.
`shape` is a `jax.ShapeDtypeStruct` and `draw` a `random.Random`, so that the same number always gives the same text. In the
texts `t` is a scalar that scales activations, `x(*shape)` a constant array and `p` the params.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from random import Random
from typing import Any

import jax
import jax.numpy as jnp

STEPS: dict[str, Callable[[Any, Random], str | None]] = {}
NESTS: dict[str, Callable[[Any, Random], tuple[str, Any] | None]] = {}
USES: dict[str, Callable[[Any, Random], str | None]] = {}
#: Elements above which nothing is made larger.
MOST = 150


def _into(registry: dict[str, Any]) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        registry[function.__name__.strip("_")] = function
        return function

    return register


step, nest, use = _into(STEPS), _into(NESTS), _into(USES)


def texts(**forms: str) -> None:
    """Steps that are one text whatever the shape."""
    for name, text in forms.items():
        STEPS[name] = lambda shape, draw, text=text: text


texts(
    transposed="w.T",
    reversed_axes="jnp.flip(w)",
    barrier="lax.optimization_barrier(w)",
    copied="jnp.array(w, copy=True)",
    named="checkpoint_name(w, 'weight')",
    stopped="lax.stop_gradient(w)",
    halved="w / 4 + w / 4",
    negated="-w",
    tanh="jnp.tanh(w)",
    normalised="w / jnp.sqrt(1e-3 + jnp.sum(w * w))",
    softmax="jax.nn.softmax(w, axis=-1) if w.ndim else w",
    absolute="jnp.abs(w)",
    clipped="jnp.clip(w, -0.4, 0.4)",
    straight_through="w + lax.stop_gradient(jnp.round(4 * w) / 4 - w)",
    zero_added="w + jnp.zeros_like(w)",
    jitted="jax.jit(lambda w: w * 1)(w)",
    complex_and_back="jnp.real(w.astype(jnp.complex64) * 1j * -1j)",
    cast_to_half="w.astype(jnp.float16)",
    cast_to_bfloat="w.astype(jnp.bfloat16)",
    cast_to_single="w.astype(jnp.float32)",
    cast_through_bfloat="w.astype(jnp.bfloat16).astype(w.dtype)",
    cast_through_float8="w.astype(jnp.float8_e4m3fn).astype(w.dtype)",
    cast_through_int8="(8 * w).astype(jnp.int8).astype(w.dtype) / 8",
    reduced_precision="lax.reduce_precision(w, 5, 3)",
    raveled="w.ravel()",
    raveled_by_columns="w.ravel(order='F')",
    squeezed="jnp.squeeze(w)",
    nan_to_num="jnp.nan_to_num(w)",
    own_product="w @ w.T @ w if w.ndim == 2 else w",
    own_sum="w + jnp.flip(w)",
)


def axis_of(shape: Any, draw: Random) -> int | None:
    """Some axis of at least two entries."""
    wide = [axis for axis, size in enumerate(shape.shape) if size > 1]
    return draw.choice(wide) if wide else None


def factorised(size: int, draw: Random) -> tuple[int, ...]:
    """Some shape of one to four axes with that many elements."""
    sizes = []
    for _ in range(draw.randint(0, 3)):
        divisors = [n for n in range(1, size + 1) if size % n == 0]
        sizes.append(draw.choice(divisors[:-1] or divisors))
        size //= sizes[-1]
    return (*sizes, size)


@step
def permuted(shape, draw):
    order = draw.sample(range(len(shape.shape)), len(shape.shape))
    return f"jnp.transpose(w, {tuple(order)})"


@step
def reshaped(shape, draw):
    return f"w.reshape{factorised(math.prod(shape.shape), draw)}"


@step
def reshaped_by_columns(shape, draw):
    return f"w.reshape({factorised(math.prod(shape.shape), draw)}, order='F')"


@step
def axes_merged(shape, draw):
    if len(shape.shape) < 2:
        return None
    first = draw.randrange(len(shape.shape) - 1)
    merged = (*shape.shape[:first], shape.shape[first] * shape.shape[first + 1], *shape.shape[first + 2 :])
    return f"w.reshape({merged}{draw.choice(['', '', ', order=' + repr('F')])})"


@step
def axis_split(shape, draw):
    axis = axis_of(shape, draw)
    if axis is None:
        return None
    outer = draw.choice([n for n in range(1, shape.shape[axis] + 1) if shape.shape[axis] % n == 0])
    split = (*shape.shape[:axis], outer, shape.shape[axis] // outer, *shape.shape[axis + 1 :])
    return f"w.reshape({split}{draw.choice(['', '', ', order=' + repr('F')])})"


@step
def lax_reshaped(shape, draw):
    order = draw.sample(range(len(shape.shape)), len(shape.shape))
    return f"lax.reshape(w, {factorised(math.prod(shape.shape), draw)}, dimensions={tuple(order)})"


@step
def expanded(shape, draw):
    return f"jnp.expand_dims(w, {draw.randint(0, len(shape.shape))})" if len(shape.shape) < 5 else None


@step
def swapped(shape, draw):
    n = len(shape.shape)
    return f"jnp.{draw.choice(['swapaxes', 'moveaxis'])}(w, {draw.randrange(n)}, {draw.randrange(n)})" if n else None


@step
def sliced(shape, draw):
    axis = axis_of(shape, draw)
    if axis is None:
        return None
    size, step = shape.shape[axis], draw.choice([1, 1, 2, -1, -2])
    first = draw.randrange(size)
    limit = draw.randint(first + 1, size)
    span = f"{first}:{limit}:{step}" if step > 0 else f"{limit - 1}:{first - 1 if first else ''}:{step}"
    return f"w[{':, ' * axis}{span}]"


@step
def lax_sliced(shape, draw):
    starts = [draw.randrange(n) for n in shape.shape]
    limits = [draw.randint(first + 1, n) for first, n in zip(starts, shape.shape)]
    strides = [draw.choice([1, 1, 2]) for _ in shape.shape]
    return f"lax.slice(w, {tuple(starts)}, {tuple(limits)}, {tuple(strides)})"


@step
def indexed(shape, draw):
    axis = axis_of(shape, draw)
    return None if axis is None else f"w[{':, ' * axis}{draw.randrange(-shape.shape[axis], shape.shape[axis])}]"


@step
def dynamically_indexed(shape, draw):
    axis = axis_of(shape, draw)
    if axis is None:
        return None
    function = draw.choice(["dynamic_index_in_dim", "dynamic_slice_in_dim"])
    index, size = draw.randrange(shape.shape[axis]), draw.randint(1, shape.shape[axis])
    more = f"{size}, axis={axis}" if "slice" in function else f"axis={axis}, keepdims={draw.random() < 0.5}"
    return f"lax.{function}(w, jnp.int32({index}) + jnp.int32(t * 0), {more})"


@step
def numpy_indexed(shape, draw):
    axis = axis_of(shape, draw)
    return (
        None if axis is None else f"w[{':, ' * axis}jnp.int32({draw.randrange(shape.shape[axis])}) + jnp.int32(t * 0)]"
    )


@step
def permuted_entries(shape, draw):
    axis = axis_of(shape, draw)
    if axis is None:
        return None
    order = draw.sample(range(shape.shape[axis]), shape.shape[axis])
    return f"jnp.take(w, jnp.array({order}), axis={axis})"


@step
def taken(shape, draw):
    axis = axis_of(shape, draw)
    if axis is None or math.prod(shape.shape) > MOST:
        return None
    return f"jnp.take(w, {_ids(shape.shape[axis], draw)}, axis={axis}, mode='clip')"


@step
def unstacked(shape, draw):
    if not shape.shape or shape.shape[0] > 4:
        return None
    return f"[*w][{draw.randrange(shape.shape[0])}]"


@step
def split(shape, draw):
    axis = axis_of(shape, draw)
    if axis is None:
        return None
    at = draw.randrange(1, shape.shape[axis])
    return f"jnp.split(w, [{at}], axis={axis})[{draw.randrange(2)}]"


@step
def masked(shape, draw):
    return f"{draw.choice(['w * (x{0} > 0)', 'jnp.where(x{0} > 0, w, 0.0)', 'jnp.where(x{0} > 0, 1.5, w)'])}".format(
        _arguments(shape.shape)
    )


@step
def triangular(shape, draw):
    return f"jnp.{draw.choice(['tril', 'triu'])}(w)" if len(shape.shape) >= 2 else None


@step
def scaled(shape, draw):
    factor = draw.choice(["0.5", "3", "jnp.float32(0.7)", "t", "np.float32(1.5)", "(1 + t)", "2.0 ** -1"])
    return f"{draw.choice(['w * {0}', '{0} * w', 'w / {0}'])}".format(factor)


@step
def scaled_along(shape, draw):
    axis = axis_of(shape, draw)
    if axis is None:
        return None
    row = tuple(n if at == axis else 1 for at, n in enumerate(shape.shape))
    return f"w * x{_arguments(row)}"


@step
def shifted(shape, draw):
    return f"w {draw.choice('+-')} {draw.choice(['0.25', 'x' + _arguments(shape.shape)])}"


@step
def padded(shape, draw):
    if math.prod(shape.shape) > MOST or not shape.shape:
        return None
    widths = tuple((draw.choice([0, 0, 1]), draw.choice([0, 0, 2])) for _ in shape.shape)
    return f"jnp.pad(w, {widths})"


@step
def lax_padded(shape, draw):
    if math.prod(shape.shape) > MOST or not shape.shape:
        return None
    widths = [(draw.choice([0, 0, 1, -1]), draw.choice([0, 1]), draw.choice([0, 0, 1])) for _ in shape.shape]
    return f"lax.pad(w, jnp.zeros((), w.dtype), {tuple(widths)})"


@step
def rolled(shape, draw):
    axis = axis_of(shape, draw)
    return None if axis is None else f"jnp.roll(w, {draw.randint(-2, 2)}, axis={axis})"


@step
def reversed_(shape, draw):
    axis = axis_of(shape, draw)
    return None if axis is None else f"lax.rev(w, ({axis},))"


@step
def concatenated(shape, draw):
    axis = axis_of(shape, draw)
    if axis is None or math.prod(shape.shape) > MOST:
        return None
    other = draw.choice(["w", f"x{_arguments(shape.shape)}", "2 * w", "jnp.flip(w)"])
    return f"jnp.concatenate([{', '.join(draw.sample(['w', other], 2))}], axis={axis})"


@step
def joined_with_another(shape, draw):
    if math.prod(shape.shape) > MOST or not shape.shape:
        return None
    axis = draw.randrange(len(shape.shape))
    return f"join(w, p[{draw.choice(['w0', 'w1'])!r}], {axis})"


@step
def stacked(shape, draw):
    if math.prod(shape.shape) > MOST or len(shape.shape) > 3:
        return None
    other, axis = draw.choice(["w", "0.5 * w", "x" + _arguments(shape.shape)]), draw.randint(0, len(shape.shape))
    return f"jnp.stack([w, {other}], axis={axis})"


@step
def repeated(shape, draw):
    axis = axis_of(shape, draw)
    if axis is None or math.prod(shape.shape) > MOST:
        return None
    tiles = tuple(2 if at == axis else 1 for at in range(len(shape.shape)))
    return draw.choice([f"jnp.repeat(w, 2, axis={axis})", f"jnp.tile(w, {tiles})"])


@step
def broadcast(shape, draw):
    if math.prod(shape.shape) > MOST or len(shape.shape) > 3:
        return None
    axis = draw.randint(0, len(shape.shape))
    wide = (*shape.shape[:axis], draw.choice([1, 2]), *shape.shape[axis:])
    return f"jnp.broadcast_to(jnp.expand_dims(w, {axis}), {wide})"


@step
def updated(shape, draw):
    axis = axis_of(shape, draw)
    if axis is None:
        return None
    where = f"{':, ' * axis}{draw.randrange(shape.shape[axis])}"
    return f"w.at[{where}].{draw.choice(['set(0.5)', 'add(1.0)', 'multiply(2.0)'])}"


@step
def summed(shape, draw):
    axis = axis_of(shape, draw)
    if axis is None:
        return None
    return f"jnp.{draw.choice(['sum', 'mean', 'max', 'cumsum', 'sort'])}(w, axis={axis})"


@step
def multiplied_by_another(shape, draw):
    return f"meet(w, p[{draw.choice(['w0', 'w1'])!r}])" if shape.shape else None


def _arguments(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def _ids(size: int, draw: Random, beyond: bool = True) -> str:
    low, high = (-size - 2, size + 2) if beyond else (0, size - 1)
    rows = [[draw.randint(low, high) for _ in range(draw.choice([1, 2, 3]))]]
    return f"jnp.array({draw.choice([rows, rows[0]])})"


# --- around the rest ---------------------------------------------------------------------------------------------------------
# A nest is a text in `f`, the rest as a function of the weight and `t`, with the shape that the rest's weight has.


@nest
def jit(shape, draw):
    return "jax.jit(f)(w, t)", shape


@nest
def checkpoint(shape, draw):
    return f"jax.checkpoint(f{draw.choice(['', ', policy=jax.checkpoint_policies.dots_saveable'])})(w, t)", shape


@nest
def vmap_over_inputs(shape, draw):
    return "jax.vmap(lambda s: f(w, t * s))(x(3))", shape


@nest
def vmap_over_weight(shape, draw):
    if not shape.shape or shape.shape[0] > 6:
        return None
    axis = draw.randrange(len(shape.shape))
    inner = (*shape.shape[:axis], *shape.shape[axis + 1 :])
    return f"jax.vmap(f, in_axes=({axis}, None), out_axes={draw.choice([0, 0, -1])})(w, t)", _like(shape, inner)


@nest
def scan_over_weight(shape, draw):
    if not shape.shape or shape.shape[0] > 6:
        return None
    options = draw.choice(["", ", reverse=True", ", unroll=2"])
    return f"lax.scan(lambda c, w: (0.5 * c + mean(f(w, c)), f(w, c)), t * 1.0, w{options})", _like(
        shape, shape.shape[1:]
    )


@nest
def scan_with_constant(shape, draw):
    return "lax.scan(lambda c, s: (0.5 * c + mean(f(w, s)), None), t * 1.0, x(3))[0]", shape


@nest
def scan_with_carried(shape, draw):
    return "lax.scan(lambda c, s: ((c[0], c[1] + mean(f(c[0], s))), None), (w, t * 1.0), x(2))[0][1]", shape


@nest
def mapped(shape, draw):
    return "lax.map(lambda s: f(w, s), x(2))", shape


@nest
def fori(shape, draw):
    return "lax.fori_loop(0, 2, lambda i, c: 0.5 * c + mean(f(w, c)), t * 1.0)", shape


@nest
def while_(shape, draw):
    return (
        "lax.while_loop(lambda s: s[0] < 2 + (t > 0), lambda s: (s[0] + 1, 0.5 * s[1] + mean(f(w, s[1]))), (0, t * 1.0))[1]",
        shape,
    )


@nest
def cond(shape, draw):
    sign = draw.choice(["<", ">"])
    return f"lax.cond(jnp.sum(t) {sign} 0, lambda w: f(w, t), lambda w: f(w, 0.5 * t), w)", shape


@nest
def switch(shape, draw):
    return "lax.switch(jnp.int32(jnp.sum(t) * 0) + 1, [lambda w: f(0.5 * w, t), lambda w: f(w, t)], w)", shape


@nest
def custom_jvp(shape, draw):
    return "with_jvp(f)(w, t * 1.0)", shape


@nest
def custom_vjp(shape, draw):
    return "with_vjp(f)(w, t * 1.0)", shape


@nest
def inner_gradient(shape, draw):
    return "jax.grad(lambda t: mean(f(w, t)))(t * 1.0)", shape


@nest
def inner_derivative(shape, draw):
    return "jax.jvp(lambda t: f(w, t), (t * 1.0,), (1.0,))[1]", shape


@nest
def used_twice(shape, draw):
    return "(f(w, t), f(w, 2 * t))", shape


@nest
def in_tuple(shape, draw):
    return "jax.jit(lambda w: (lambda y, w: (y, f(w, t)))(f(w, t), w))(w)", shape


@nest
def returned_by_remat(shape, draw):
    return "(lambda v: f(v[1], t + v[0] * 0))(jax.checkpoint(lambda w: (mean(w), w))(w))", shape


def _like(shape: Any, sizes: tuple[int, ...]) -> Any:
    return jax.ShapeDtypeStruct(sizes, shape.dtype)


# --- ends --------------------------------------------------------------------------------------------------------------------


def _float(shape: Any) -> bool:
    return jnp.issubdtype(shape.dtype, jnp.floating)


@use
def product(shape, draw):
    """`x @ w` or `w @ x` over some axes, the activation on either side."""
    n = len(shape.shape)
    if not n:
        return None
    axes = draw.sample(range(n), draw.randint(1, min(2, n)))
    x = f"t * x{_arguments((*(shape.shape[axis] for axis in axes), *draw.choice([(), (3,), (2, 2)])))}"
    count = list(range(len(axes)))
    return draw.choice([f"jnp.tensordot({x}, w, ({count}, {axes}))", f"jnp.tensordot(w, {x}, ({axes}, {count}))"])


@use
def matmul(shape, draw):
    n = len(shape.shape)
    if n < 2:
        return None
    left = draw.random() < 0.5
    size = shape.shape[-2] if left else shape.shape[-1]
    lead = draw.choice([(), (3,), (*shape.shape[:-2], 2)])
    return (
        f"(t * x{_arguments((*lead, size))}) @ w" if left else f"w @ (t * x{_arguments((*shape.shape[:-2], size, 2))})"
    )


@use
def einsum(shape, draw):
    """Some axes contracted, some kept apart as experts are."""
    n = len(shape.shape)
    if not n:
        return None
    letters = "abcdefg"[:n]
    met = [letter for letter in letters if draw.random() < 0.6] or [letters[0]]
    batch = [letter for letter in met[1:] if draw.random() < 0.5]
    x = draw.sample([*met, "y"], len(met) + 1)
    out = [letter for letter in [*letters, "y"] if letter not in met or letter in batch]
    out = draw.sample(out, len(out))
    sizes = dict(zip(letters, shape.shape)) | {"y": 2}
    operands = [("".join(x), f"t * x{_arguments(tuple(sizes[each] for each in x))}"), (letters, "w")]
    draw.shuffle(operands)
    return f"jnp.einsum('{operands[0][0]},{operands[1][0]}->{''.join(out)}', {operands[0][1]}, {operands[1][1]})"


@use
def precise_product(shape, draw):
    if not shape.shape:
        return None
    axis = draw.randrange(len(shape.shape))
    more = draw.choice(["preferred_element_type=jnp.float32", "precision='highest'"])
    return (
        f"lax.dot_general((t * x({shape.shape[axis]}, 2)).astype(w.dtype), w, ((((0,), ({axis},)), ((), ()))), {more})"
    )


@use
def two_products(shape, draw):
    if not shape.shape:
        return None
    x = f"t * x(2, {shape.shape[0]})"
    return f"(lambda z: (jnp.tensordot(z, w, 1), jnp.tensordot(z, 2 * w, 1), jnp.tensordot(z, w[:, None], 1)))({x})"


@use
def transposed_twice(shape, draw):
    """A tied head: the same weight both ways."""
    if len(shape.shape) != 2:
        return None
    return f"jnp.tanh((t * x(3, {shape.shape[0]})) @ w) @ w.T"


@use
def with_another(shape, draw):
    if not shape.shape:
        return None
    return f"(lambda z: (jnp.tensordot(z, w, 1), meet(z, p['w0']), meet(z, p['w1'])))(t * x(2, {shape.shape[0]}))"


@use
def lookup(shape, draw):
    axis = axis_of(shape, draw)
    if axis is None:
        return None
    mode = draw.choice([None, None, "clip", "fill", "wrap"])
    ids = _ids(shape.shape[axis], draw, beyond=draw.random() < 0.7)
    more = "" if mode is None else f", mode={mode!r}" + (", fill_value=0.5" if mode == "fill" else "")
    return f"t * jnp.take(w, {ids}, axis={axis}{more})"


@use
def lookup_by_index(shape, draw):
    axis = axis_of(shape, draw)
    if axis is None:
        return None
    beyond = draw.random() < 0.7
    ids = _ids(shape.shape[axis], draw, beyond)
    more = draw.choice(["", "mode='clip'", "mode='fill'", "mode='drop', fill_value=2.0", "mode='fill', fill_value=0.0"])
    if not beyond and draw.random() < 0.3:
        more = "mode='promise_in_bounds'"
    return f"t * w.at[{':, ' * axis}{ids}].get({more})"


@use
def masked_lookup(shape, draw):
    if not shape.shape or shape.shape[0] < 2:
        return None
    n = shape.shape[0]
    ids = f"jnp.array({[draw.randint(0, 2 * n) for _ in range(3)]})"
    rows = ", ".join(["None"] * (len(shape.shape) - 1))
    return f"jnp.where(({ids} < {n})[:{', ' + rows if rows else ''}], t * jnp.take(w, {ids}, axis=0), 0.0)"


@use
def lookup_of_entries(shape, draw):
    if len(shape.shape) < 2:
        return None
    rows, columns = ([draw.randint(-n, n) for _ in range(3)] for n in shape.shape[:2])
    return f"t * w[jnp.array({rows}), jnp.array({columns})]"


@use
def lookup_along(shape, draw):
    axis = axis_of(shape, draw)
    if axis is None:
        return None
    sizes = tuple(1 if at == axis else n for at, n in enumerate(shape.shape))
    ids = f"jnp.full({sizes}, {draw.randint(-shape.shape[axis], shape.shape[axis])})"
    return f"t * jnp.take_along_axis(w, {ids}, axis={axis}{draw.choice(['', ', mode=' + repr('clip')])})"


@use
def expert_of_each_row(shape, draw):
    if len(shape.shape) != 3:
        return None
    ids = f"jnp.array({[draw.randrange(shape.shape[0]) for _ in range(3)]})"
    return f"jnp.einsum('bi,bio->bo', t * x(3, {shape.shape[1]}), w[{ids}])"


@use
def experts_in_groups(shape, draw):
    if len(shape.shape) != 3 or not _float(shape):
        return None
    sizes = [draw.randrange(3) for _ in range(shape.shape[0])]
    rows = max(1, sum(sizes))
    return f"lax.ragged_dot((t * x({rows}, {shape.shape[1]})).astype(w.dtype), w, jnp.array({sizes}))"


@use
def convolution(shape, draw):
    n = len(shape.shape)
    if n not in (3, 4) or not _float(shape):
        return None
    spatial = "HW"[: n - 2]
    kernel = "".join(draw.sample(f"IO{spatial}", n))
    sizes = dict(zip(kernel, shape.shape))
    groups = draw.choice([g for g in (1, 1, 2, 3) if sizes["O"] % g == 0])
    image = (2, sizes["I"] * groups, *(sizes[letter] + 2 for letter in spatial))
    options = draw.choice(
        [
            "padding='SAME'",
            "padding='VALID'",
            f"padding='SAME', window_strides={(2,) * len(spatial)}",
            f"padding='SAME', rhs_dilation={(2,) * len(spatial)}",
            f"padding='SAME', lhs_dilation={(2,) * len(spatial)}",
        ]
    )
    if "window_strides" not in options:
        options += f", window_strides={(1,) * len(spatial)}"
    if "lhs_dilation" in options:
        options = options.replace("padding='SAME'", f"padding={((1, 1),) * len(spatial)}")
    return (
        f"lax.conv_general_dilated((t * x{_arguments(image)}).astype(w.dtype), w, {options}, "
        f"dimension_numbers=('NC{spatial}', '{kernel}', 'NC{spatial}'), feature_group_count={groups})"
    )


@use
def elementwise(shape, draw):
    return draw.choice(
        ["t * w * x{0}", "jnp.tanh(t * w)", "t + w", "w * w * t", "jnp.maximum(w, 0.1) * t", "jnp.sum(w) * t"]
    ).format(_arguments(shape.shape))


@use
def output(shape, draw):
    return draw.choice(["w", "(w, t * w)", "(w, jnp.sum(w))"])


@use
def statistics(shape, draw):
    if not shape.shape:
        return None
    texts = [
        "jnp.linalg.norm(w)",
        "jnp.var(w, axis=0)",
        "jnp.max(w)",
        "jnp.sum(jnp.outer(w, w))",
        "jnp.sort(w, axis=0)",
    ]
    return f"t * {draw.choice(texts)}"


@use
def dead_code(shape, draw):
    """A product, and things that are computed and thrown away."""
    if not shape.shape:
        return None
    return f"(jnp.tanh(w), jnp.take(w, 0, axis=0), jnp.tensordot(t * x(2, {shape.shape[0]}), w, 1))[2]"


@use
def column_by_column(shape, draw):
    if len(shape.shape) != 2:
        return None
    return f"jnp.stack([jnp.dot(t * x({shape.shape[0]}), w[:, i]) for i in range({shape.shape[1]})])"


@use
def dot_of_vectors(shape, draw):
    if not shape.shape:
        return None
    return f"jnp.vdot(x({math.prod(shape.shape)}), t * w)"


def kinds() -> list[str]:
    """The names of all steps, nests and ends."""
    return list(itertools.chain(STEPS, NESTS, USES))
