"""A lifted function equals the function of the merged params, in values and gradients, in every form that models use."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract.problems import jit
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jlora

METHODS = {
    "lora": jlora.LoRA(rank=2, alpha=3, init="random"),
    "dora": jlora.DoRA(jlora.LoRA(rank=2, alpha=3, init="random")),
    "full": jlora.Full(),
}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / 3


X = normal(100, 3, 5, 6)  # batch, tokens, features
SQUARE = {"w": normal(0, 6, 6)}
PAIR = {"w": normal(0, 6, 4), "v": normal(1, 4, 6)}
STACK = {"w": normal(0, 3, 6, 6)}


def through(primitive, w):
    """A custom rule around a product, so that the weight meets `primitive`."""
    f = primitive(lambda x, w: jnp.tanh(x @ w))
    if primitive is jax.custom_jvp:
        f.defjvp(lambda xs, ts: (jnp.tanh(xs[0] @ xs[1]), 0.5 * (ts[0] @ xs[1] + xs[0] @ ts[1])))
    else:
        f.defvjp(lambda x, w: (jnp.tanh(x @ w), (x, w)), lambda res, g: (0.5 * g @ res[1].T, 0.5 * res[0].T @ g))
    return f(X[0], w)


def stacked_scan(p, checkpoint):
    body = lambda x, w: (jnp.tanh(x @ w), x.sum())
    return lax.scan(jax.checkpoint(body) if checkpoint else body, X, p["w"])


def two_places(p, x):
    return jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"])


def on_two_devices(p, spec_w, spec_x, spec_y, reduce):
    mesh = jax.make_mesh((2,), ("d",), (AxisType.Auto,), devices=jax.devices()[:2])
    body = lambda w, x: lax.psum(x @ w, "d") if reduce else jnp.tanh(x @ w)
    return jax.shard_map(body, mesh=mesh, in_specs=(spec_w, spec_x), out_specs=spec_y)(p["w"], X[0])


def conv(p, x, dims, **options):
    return lax.conv_general_dilated(x, p["w"], dimension_numbers=dims, **options)


# name: (params, function of params, whether LoRA's weight has to be formed)
FORMS = {
    "matmul": (SQUARE, lambda p: X @ p["w"], False),
    "vector times matrix": (SQUARE, lambda p: X[0, 0] @ p["w"], False),
    "weight on the left": (SQUARE, lambda p: jnp.einsum("io,bti->obt", p["w"], X), False),
    "einsum with several in-axes": ({"w": normal(0, 2, 3, 4)}, lambda p: jnp.einsum("...hd,hdo->...o", X.reshape(3, 5, 2, 3), p["w"]), False),
    "einsum with several out-axes": ({"w": normal(0, 6, 2, 5)}, lambda p: jnp.einsum("btd,dhk->bhtk", X, p["w"]), False),
    "einsum with in-axes out of order": ({"w": normal(0, 3, 4, 2)}, lambda p: jnp.einsum("bthd,doh->bto", X.reshape(3, 5, 2, 3), p["w"]), False),
    "transposed": ({"w": normal(0, 4, 6)}, lambda p: X @ p["w"].T, False),
    "tied embedding": ({"w": normal(0, 7, 6)}, lambda p: jnp.take(p["w"], jnp.array([[1, 6, 0]]), axis=0) @ p["w"].T, False),
    "lookup by indexing": ({"w": normal(0, 7, 6)}, lambda p: p["w"][jnp.array([[1, 6, 0]])], False),
    "lookup of columns": ({"w": normal(0, 6, 7)}, lambda p: jnp.take(p["w"], jnp.array([1, 6, 0]), axis=1), False),
    "cast": (SQUARE, lambda p: (X.astype(jnp.float16) @ p["w"].astype(jnp.float16)).astype(jnp.float32), False),
    "reshape that splits": ({"w": normal(0, 6, 8)}, lambda p: jnp.einsum("btd,dhk->bthk", X, p["w"].reshape(6, 2, 4)), False),
    "reshape that merges": ({"w": normal(0, 2, 3, 4)}, lambda p: X @ p["w"].reshape(6, 4), False),
    "new axes of size 1": (SQUARE, lambda p: jnp.einsum("btd,xdo->btxo", X, p["w"][None]), False),
    "stack under scan": (STACK, partial(stacked_scan, checkpoint=False), False),
    "stack under scan and remat": (STACK, partial(stacked_scan, checkpoint=True), False),
    "unrolled loop over a stack": (STACK, lambda p: jnp.tanh(jnp.tanh(X @ p["w"][0]) @ p["w"][2]), False),
    "loop over a stack": (STACK, lambda p: functools.reduce(lambda x, w: jnp.tanh(x @ w), p["w"], X), False),
    "stack split in two": (STACK, lambda p: X @ jnp.split(p["w"], [1])[1][0], False),
    "stack indexed by a traced number": (STACK, lambda p: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i]), X), False),
    "stack split into two scans": (STACK | {"w": normal(0, 4, 6, 6)}, lambda p: lax.scan(lambda x, ws: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws), X, p["w"].reshape(2, 2, 6, 6))[0], False),
    "jit in jit": (SQUARE, lambda p: jax.jit(lambda w: jax.jit(lambda x, w: x @ w)(X, w))(p["w"]), False),
    "vmap over the activation": (SQUARE, lambda p: jax.vmap(lambda x: x @ p["w"])(X), False),
    "vmap over a stack": (STACK, lambda p: jax.vmap(lambda x, w: x @ w)(X, p["w"]), False),
    "scan with the weight as constant": (SQUARE, lambda p: lax.scan(lambda c, x: (jnp.tanh(c @ p["w"] + x), c), X[0], X), False),
    "while": (SQUARE, lambda p: lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"])), (0, X))[1], False),
    "cond": (PAIR, lambda p: lax.cond(X.sum() > 0, lambda: X @ p["w"] @ p["v"], lambda: jnp.tanh(X @ p["w"]) @ p["v"]), False),
    "custom_jvp": (SQUARE, lambda p: through(jax.custom_jvp, p["w"]), True),
    "custom_vjp": (SQUARE, lambda p: through(jax.custom_vjp, p["w"]), True),
    "shard_map over out": (SQUARE, lambda p: on_two_devices(p, P(None, "d"), P(), P(None, "d"), False), False),
    "shard_map over in": (SQUARE, lambda p: on_two_devices(p, P("d"), P(None, "d"), P(), True), False),
    "shard_map over data": (SQUARE, lambda p: on_two_devices(p, P(), P(None), P(None), False), False),
    "inner grad": (PAIR, lambda p: jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["w"]) @ p["v"]))(X), False),
    "conv 1-D": ({"w": normal(0, 3, 6, 4)}, lambda p: conv(p, X, ("NWC", "WIO", "NWC"), window_strides=(1,), padding="SAME"), False),
    "conv 2-D strided": ({"w": normal(0, 2, 3, 3, 4)}, lambda p: conv(p, normal(9, 2, 5, 6, 3), ("NHWC", "HWIO", "NHWC"), window_strides=(2, 1), padding="VALID"), False),
    "conv grouped": ({"w": normal(0, 4, 3, 3)}, lambda p: conv(p, X.transpose(0, 2, 1), ("NCW", "OIW", "NCW"), window_strides=(1,), padding="SAME", feature_group_count=2), False),
    "experts by batched einsum": (STACK, lambda p: jnp.einsum("etd,edf->etf", X, p["w"]), False),
    "experts by ragged_dot": (STACK, lambda p: lax.ragged_dot(X[0], p["w"], jnp.array([2, 0, 3])), False),
    "one leaf at two places": (SQUARE, lambda p: two_places(p, X), False),
    "several leaves concatenated": ({"q": normal(0, 6, 4), "k": normal(1, 6, 3)}, lambda p: X @ jnp.concatenate([p["q"], p["k"]], axis=1), True),
    "elementwise use": (SQUARE, lambda p: X @ jnp.tanh(p["w"]), True),
    "times a number": (SQUARE, lambda p: X @ (-p["w"] / 4), False),
    "stack times a traced number": (STACK, lambda p: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), X, X.mean() * p["w"])[0], False),
    "lookup times a number": (SQUARE, lambda p: (p["w"] * 3)[jnp.array([1, 5])], False),
    "elementwise use of a multiple": (SQUARE, lambda p: X @ jnp.tanh(3 * p["w"]), True),
    "repeated": (SQUARE, lambda p: jnp.einsum("etd,edf->etf", X, jnp.broadcast_to(p["w"], (3, 6, 6))), True),
    "row by row": (SQUARE, lambda p: jnp.einsum("io,io->i", X.reshape(-1, 6)[:6], p["w"]), True),
    "divided by the weight": ({"w": 2 + normal(0, 6, 6)}, lambda p: X @ (1 / p["w"]), True),
    "reshape in column-major order": ({"w": normal(0, 2, 3, 4)}, lambda p: X @ p["w"].reshape(6, 4, order="F"), False),
    "cast to 8 bits and back": (SQUARE, lambda p: X @ p["w"].astype(jnp.float8_e4m3fn).astype(jnp.float32), True),
    "cast to integers": (SQUARE, lambda p: X @ (8 * p["w"]).astype(jnp.int32).astype(jnp.float32), True),
    "reduced precision": (SQUARE, lambda p: X @ lax.reduce_precision(p["w"], 5, 3), True),
    "lookup beyond the rows, filled": (SQUARE, lambda p: p["w"].at[jnp.array([0, 3, 99])].get(mode="fill", fill_value=2.0), False),
    "lookup beyond the rows, masked": (SQUARE, lambda p: jnp.where(jnp.array([[True], [False]]), jnp.take(p["w"], jnp.array([3, 99]), axis=0), 0), False),
    "lookup of columns beyond the last": (SQUARE, lambda p: p["w"].at[:, jnp.array([0, -99])].get(mode="fill", fill_value=2.0), False),
    "lookup beyond the rows, clipped": (SQUARE, lambda p: jnp.take(p["w"], jnp.array([0, 99]), axis=0, mode="clip"), False),
    "lookup beyond the rows, promised not to be": (SQUARE, lambda p: p["w"][jnp.array([0, 99])], False),
    "columns permuted": (SQUARE, lambda p: X @ p["w"][:, jnp.array([3, 1, 0, 2, 5, 4])], False),
    "experts by index": (STACK, lambda p: jnp.einsum("ti,tkio->tko", X[0], p["w"][jnp.array([[0, 2], [1, 1], [2, 0], [0, 0], [1, 2]])]), False),
    "experts by index, filled": (STACK, lambda p: X[0, :2] @ p["w"].at[jnp.array([0, 99])].get(mode="fill", fill_value=2.0), True),
    "experts by index, beyond the stack": (STACK, lambda p: jnp.einsum("ti,tio->to", X[0, :2], jnp.take(p["w"], jnp.array([0, 99]), axis=0)), False),
    "experts by index under vmap": (STACK, lambda p: jax.vmap(lambda x, i: x @ p["w"][i])(X, jnp.array([2, 0, 7])), False),
    "experts of a stack under vmap of both": ({"w": normal(0, 3, 2, 6, 4)}, lambda p: jax.vmap(lambda x, w, i: x @ w[i])(X, p["w"], jnp.array([1, 0, 1])), False),
    "lookup by slices under vmap": ({"w": normal(0, 7, 6)}, lambda p: jax.vmap(lambda i: lax.dynamic_slice(p["w"], (i, 0), (1, 6)))(jnp.array([1, 9])), False),
    "stack indexed far before its first": (STACK, lambda p: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i - 5]), X), False),
    "layers by take": (STACK, lambda p: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ jnp.take(p["w"], i, axis=0)), X), False),
    "experts of layers by two indices": ({"w": normal(0, 2, 3, 6, 4)}, lambda p: jnp.einsum("ti,tio->to", X[0, :2], p["w"][jnp.array([1, 0]), jnp.array([2, 1])]), False),
    "weight as output": (SQUARE, lambda p: (X @ p["w"], p["w"]), True),
    "two weights multiplied": (PAIR, lambda p: X @ (p["w"] @ p["v"]), True),
    "stop_gradient": (PAIR, lambda p: X @ p["w"] @ lax.stop_gradient(p["v"]), False),
}  # fmt: skip


@functools.cache
def report(name):
    params, f, needs_weight = FORMS[name]
    matrices = all(leaf.ndim == 2 for leaf in params.values())
    # No product says the roles where the weight is needed, save those of a stack.
    return None if needs_weight and matrices else jlora.sites(f, params)


def adapted_form(name, method):
    params, f, _ = FORMS[name]
    return f, jlora.adapterize(params, {".*": METHODS[method]}, sites=report(name))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FORMS)
def test_lifted_equals_merged_in_values_and_gradients(name, method):
    f, adapted = adapted_form(name, method)

    def through_merge(p):
        return f(jlora.merge(adapted.replace(params=p)))

    def through_lift(p):
        return jlora.lift(f)(adapted.replace(params=p))

    def loss(outputs):
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(outputs))

    def derivative(g, p):
        if name == "while":  # has no reverse mode
            return jax.jvp(lambda p: loss(g(p)), (p,), (jax.tree.map(jnp.sin, p),))
        return jax.grad(lambda p: loss(g(p)))(p)

    @jit
    def both(p):
        return [(g(p), derivative(g, p)) for g in (through_merge, through_lift)]

    wanted, got = both(jax.tree.map(lambda x: x + 0.1, adapted.params))
    tolerance = 4e-3 if name == "cast" else 2e-5
    jax.tree.map(partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), got, wanted)
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, wanted)


def test_without_a_trace_a_lookup_may_go_along_the_out_axis():
    f = lambda p: jnp.take(p["w"], jnp.array([1, 6, 0]), axis=1)

    @jit
    def both():
        adapted = jlora.adapterize({"w": normal(0, 6, 7)}, {"w": METHODS["dora"]})
        adapted = adapted.replace(params=jax.tree.map(lambda x: x + 0.1, adapted.params))
        return jlora.lift(f, strict=True)(adapted), f(jlora.merge(adapted))

    np.testing.assert_allclose(*both(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.int8])
def test_activations_of_8_bits_get_the_formed_weight(dtype):
    def f(p):
        x = (3 * X[0]).astype(dtype)
        return lax.dot_general(x, p["w"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    adapted = jlora.adapterize(SQUARE, {"w": METHODS["lora"]})
    np.testing.assert_array_equal(jlora.lift(f)(adapted), f(jlora.merge(adapted)))


def test_a_slice_without_entries_is_one():
    spec = {"w": jlora.Axes("out batch in", jlora.LoRA(1, init="random"))}
    adapted = jlora.adapterize({"w": normal(0, 4, 3, 5)}, spec)
    f = lambda p: jnp.concatenate([p["w"], p["w"][:, :0]], axis=1)
    np.testing.assert_allclose(jax.jit(jlora.lift(f))(adapted), f(jlora.merge(adapted)), rtol=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_strict_refuses_exactly_the_forms_that_need_the_weight_itself(name):
    f, adapted = adapted_form(name, "lora")
    lifted = jlora.lift(f, strict=True)
    if FORMS[name][2]:
        with pytest.raises(ValueError, match=r"strict: the effective weight of \w, shape .*, would have to be formed"):
            lifted(adapted)
    else:
        jax.eval_shape(lifted, adapted)


def test_an_adapted_without_sites_runs_as_its_base():
    base = {"w": jnp.ones((2, 3))}
    adapted = jlora.adapterize(base, {})
    x = jnp.arange(2.0)[None]
    assert jlora.lift(lambda params, x: x @ params["w"])(adapted, x).tolist() == (x @ base["w"]).tolist()
