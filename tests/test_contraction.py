"""The adapted product: both plans against the closed form, and what they keep and compute."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jlora
from jlora.core.products import contraction
from jlora.core.products.backend import traced_for
from jlora.core.products.contraction import LowRankPlan, Options
from jlora.core.products.low_rank import Factors

PLANS = ["factored", "merged"]
WAYS = [*PLANS, "joined"]


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def problem(tokens=12, rows=8, columns=6, rank=2):
    x, w = normal(0, 3, tokens // 3, rows), normal(1, rows, columns)
    return x, w, Factors(normal(2, rows, rank), normal(3, rank, columns))


@pytest.mark.parametrize("plan", WAYS)
def test_a_plan_equals_the_closed_form_in_value_and_every_gradient(plan):
    x, w, f = problem()
    g = normal(4, *x.shape[:-1], w.shape[1])
    y, pull = jax.vjp(
        lambda x, w, a, b: Factors(a, b).dense(x, w, None, Options(jnp.float32, None, plan)),
        x,
        w,
        f.a,
        f.b,
    )
    x2, g2 = np.reshape(x, (-1, 8)), np.reshape(g, (-1, 6))
    whole = np.asarray(w + f.a @ f.b)
    wanted = [g2 @ whole.T, x2.T @ g2, x2.T @ (g2 @ f.b.T), (x2 @ f.a).T @ g2]
    np.testing.assert_allclose(y.reshape(-1, 6), x2 @ whole, rtol=1e-5, atol=1e-5)
    for got, want in zip(pull(g), wanted, strict=True):
        np.testing.assert_allclose(got.reshape(want.shape), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plan", WAYS)
def test_constant_columns_act_and_get_no_gradient_in_any_plan(plan):
    x, w, f = problem(rank=5)
    g = normal(4, *x.shape[:-1], w.shape[1])

    def value(constants, x, a, b):
        return jnp.sum(g * Factors(a, b, constants=constants).dense(x, w, None, Options(jnp.float32, None, plan)))

    (y, some), (whole, every) = (
        jax.jit(jax.value_and_grad(partial(value, constants), (0, 1, 2)))(x, f.a, f.b) for constants in (3, 0)
    )
    np.testing.assert_allclose(y, whole, rtol=1e-5)
    wanted = (every[0], every[1] * (jnp.arange(5) < 2), every[2] * (jnp.arange(5) < 2)[:, None])
    for got, want in zip(some, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.all(every[1]) and np.all(every[2])


@pytest.mark.parametrize("plan", WAYS)
def test_a_plan_has_forward_mode_second_derivatives_and_vmap(plan):
    x, w, f = problem()
    options = Options(jnp.float32, None, plan)

    def loss(product, a):
        return jnp.sum(jnp.sin(product(a)))

    ours = lambda a: Factors(a, f.b).dense(x, w, None, options)
    plain = lambda a: x @ (w + a @ f.b)
    direction = normal(5, *f.a.shape)
    for derivative in (
        lambda product: jax.jvp(partial(loss, product), (f.a,), (direction,))[1],
        lambda product: jax.jvp(jax.grad(partial(loss, product)), (f.a,), (direction,))[1],
        lambda product: jax.vmap(jax.grad(partial(loss, product)))(jnp.stack([f.a, direction])),
    ):
        np.testing.assert_allclose(derivative(ours), derivative(plain), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("plan", WAYS)
def test_nothing_larger_than_the_input_is_kept_for_the_backward_pass(plan):
    """Kept: the input, `x a`, and the base and factors themselves; no product, no formed weight."""
    x, w, f = problem(tokens=48, rows=16, columns=64)
    forward = lambda x, a, b: Factors(a, b).dense(x, w, None, Options(jnp.float32, None, plan))
    _, pull = jax.vjp(forward, x, f.a, f.b)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(pull) if leaf.size > 1)
    known = [x.size, w.size, f.a.size, f.b.size, x.size // 16 * 2]
    assert set(sizes) <= set(known), (sizes, known)
    assert sizes.count(w.size) <= 1
    same = [leaf for leaf in jax.tree.leaves(pull) if leaf.shape == w.shape]
    assert all(leaf.unsafe_buffer_pointer() == w.unsafe_buffer_pointer() for leaf in same), "a copy of the base is kept"


@pytest.mark.parametrize("plan", WAYS)
def test_no_dense_weight_gradient_is_computed(plan):
    x, w, f = problem(tokens=96, rows=32, columns=32)
    loss = lambda a, b, x: jnp.sum(Factors(a, b).dense(x, w, None, Options(jnp.float32, None, plan)))
    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(f.a, f.b, x).compile()
    dense_gradient = 2 * 96 * 32 * 32
    thin = 2 * 96 * 32 * 2
    formed = 2 * 32 * 32 * 2
    least = dense_gradient + 4 * thin  # dx through w; x a, g bᵀ, da and db
    assert program.cost_analysis()["flops"] < least + thin + 2 * formed + 0.2 * dense_gradient


def test_a_bfloat16_base_loses_no_update_to_rounding():
    """A delta of 1e-4 of the weight is far below bfloat16's resolution, but moves the output as in float32."""
    x, w = normal(0, 32, 256), normal(1, 256, 64)
    f = Factors(normal(2, 256, 4) * 1e-2, normal(3, 4, 64) * 0.5e-2)
    assert float(jnp.linalg.norm(f.a @ f.b) / jnp.linalg.norm(w)) < 2e-4
    x16, w16 = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    none = Factors(f.a, jnp.zeros_like(f.b))
    moved = [each.dense(x16, w16, None, Options(jnp.float32)) for each in (f, none)]
    wanted = x16.astype(jnp.float32) @ (f.a @ f.b)
    error = jnp.linalg.norm(moved[0] - moved[1] - wanted) / jnp.linalg.norm(wanted)
    assert error < 2e-2
    assert contraction.choose("auto", 10**6, [w16.shape], w16.dtype) == LowRankPlan(("apart",), False)


def test_the_cost_model_forms_the_weight_only_for_many_tokens_and_32_bit_bases():
    choose = lambda plan, tokens, shapes, dtype=jnp.float32: contraction.choose(plan, tokens, shapes, dtype)
    up, down = (512, 1408), (1408, 512)
    assert choose("auto", 64, [up]) == LowRankPlan(("apart",), False)
    assert choose("auto", 4096, [up]) == LowRankPlan(("formed",), True)
    assert choose("auto", 256, [up]) == LowRankPlan(
        ("formed",), False
    )  # cheap to form for 512 inputs, not for 1408 gradients
    assert choose("auto", 256, [down]) == LowRankPlan(("apart",), True)
    assert choose("auto", 512, [up, up]) == LowRankPlan(
        ("formed", "formed"), False
    )  # the two share the factored form's cost
    assert choose("auto", 4096, [up], jnp.bfloat16) == LowRankPlan(("apart",), False)
    assert choose("factored", 4096, [up, up]) == LowRankPlan(("apart", "apart"), False)
    assert choose("merged", 1, [up, up], jnp.bfloat16) == LowRankPlan(("formed", "formed"), True)


def test_a_gpu_joins_where_that_moves_less():
    choose = lambda tokens, *shapes, runs=1: contraction.choose("auto", tokens, shapes, jnp.bfloat16, runs)
    width, hidden = 4096, 11008
    with traced_for("cuda"):
        assert choose(16384, *[(width, width)] * 3) == LowRankPlan(("joined",) * 3, True)
        assert choose(16384, (hidden, width)) == LowRankPlan(("apart",), True)  # the copy of a wide input
        assert choose(512, (width, width)) == LowRankPlan(("apart",), False)  # the copy of the weight
        assert choose(16384, *[(width, width)] * 3, runs=2) == LowRankPlan(("apart",) * 3, False)
        assert contraction.choose("auto", 4096, [(512, 1408)], jnp.float32) == LowRankPlan(("formed",), True)
    with traced_for("cuda", devices=8):
        assert choose(16384, *[(width, width)] * 3) == LowRankPlan(("apart",) * 3, True)
    assert choose(16384, *[(width, width)] * 3) == LowRankPlan(("apart",) * 3, False)


def test_joined_weights_of_one_input_share_a_copy_of_it():
    """Ranks whose sum is no multiple of what a GPU reads at once, and 16-bit values: what is summed is summed in 32."""
    x, shapes = normal(0, 12, 16, dtype=jnp.bfloat16), [(8, 2), (6, 3), (10, 1)]
    weights = [normal(n, 16, out, dtype=jnp.bfloat16) for n, (out, _) in enumerate(shapes)]
    a = [normal(3 + n, 16, rank, dtype=jnp.bfloat16) for n, (_, rank) in enumerate(shapes)]
    b = [normal(6 + n, rank, out, dtype=jnp.bfloat16) for n, (out, rank) in enumerate(shapes)]
    joined = lambda *given: contraction.products(*given, [None] * 3, [0] * 3, Options(jnp.float32, None, "joined"))
    program = jax.make_jaxpr(joined)(x, weights, a, b)
    wide = [eqn.outvars[0].aval.shape for eqn in equations(program.jaxpr) if eqn.primitive.name == "concatenate"]
    assert wide.count((12, 24)) == 1
    for y, w, left, right in zip(joined(x, weights, a, b), weights, a, b, strict=True):
        low = (x @ left).astype(jnp.float32)
        wanted = x.astype(jnp.float32) @ w.astype(jnp.float32) + low @ right.astype(jnp.float32)
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("plan", WAYS)
def test_a_scale_and_what_it_scales_have_their_gradients(plan):
    """Those of `(x @ (w + a @ b)) * scale`; a scale of zero has one too."""
    x, w, f = problem()
    scale, g = normal(6, 6).at[2].set(0.0), normal(4, 3, 4, 6)
    options = Options(jnp.float32, None, plan)
    ours = lambda x, w, a, b, scale: jnp.sum(g * Factors(a, b, scale).dense(x, w, None, options))
    plain = lambda x, w, a, b, scale: jnp.sum(g * (x @ (w + a @ b)) * scale)
    got, wanted = (jax.jit(jax.value_and_grad(fn, range(5)))(x, w, f.a, f.b, scale) for fn in (ours, plain))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, wanted)
    assert got[1][4][2] != 0


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_scaled_product_has_16_bit_cotangents_and_its_small_changes_arrive(platform):
    """DoRA on a bfloat16 base: no product of the gradient is one of 32-bit activations, and a magnitude moves as in float32."""
    w, x = normal(1, 128, 96).astype(jnp.bfloat16), normal(0, 512, 128).astype(jnp.bfloat16)
    adapted = jlora.adapterize({"w": w}, {"w": jlora.DoRA(jlora.LoRA(4, alpha=4))})
    apply = lambda p: jlora.lift(lambda p: x @ p["w"])(adapted.replace(params=p))
    with traced_for(platform):
        gradient = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(jnp.sin(apply(p)))))(adapted.params)
        before = apply(adapted.params).astype(jnp.float32)
        larger = {"w": {**adapted.params["w"], "m": adapted.params["w"]["m"] * 1.0003}}
        moved = apply(larger).astype(jnp.float32) - before
    of_rows = [
        [each.aval.dtype for each in eqn.invars]
        for eqn in equations(gradient.jaxpr)
        if eqn.primitive.name == "dot_general" and any(512 in each.aval.shape for each in eqn.invars)
    ]
    assert len(of_rows) > 4 and all(dtype == jnp.bfloat16 for pair in of_rows for dtype in pair)
    slope = jnp.vdot(moved, before) / jnp.vdot(before, before) / 0.0003
    assert 0.8 < slope < 1.2, slope


@pytest.mark.parametrize("plan", ["auto", *PLANS])
def test_lift_takes_a_plan_and_gives_the_same(plan):
    params = {"w": normal(0, 8, 6)}
    adapted = jlora.adapterize(params, {"w": jlora.LoRA(2, init="random")})
    x = normal(1, 64, 8)
    wanted = x @ jlora.merge(adapted)["w"]
    np.testing.assert_allclose(jlora.lift(lambda p: x @ p["w"], plan=plan)(adapted), wanted, rtol=1e-4, atol=1e-4)


def test_cuts_that_fit_no_leaf_are_refused():
    adapted = jlora.adapterize({"w": normal(0, 8, 6)}, {"w": jlora.LoRA(2)})
    x = normal(1, 3, 8)
    for cuts, message in (
        ({"v": 2}, "cuts names v, which is no adapted matrix; they are w"),
        ({"w": 3}, "cuts has 3 pieces for w, which do not divide its 8 inputs"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            jlora.lift(lambda p: x @ p["w"], cuts=cuts)(adapted)


def test_lift_refuses_an_unknown_plan():
    with pytest.raises(ValueError, match=r"plan must be one of .* got 'fastest'"):
        jlora.lift(lambda p: p, plan="fastest")


def test_a_plan_that_a_site_can_not_take_is_refused_with_the_site_and_the_numbers():
    x, method = normal(0, 4, 8), jlora.LoRA(2, dropout=0.5)
    product = jlora.lift(lambda p, x: x @ p["layer"]["w"], plan="merged")
    small = jlora.adapterize({"layer": {"w": normal(1, 8, 6, dtype=jnp.bfloat16)}}, {"layer/w": method})
    with pytest.raises(ValueError, match=r"layer/w \(8, 6\): the plan 'merged' would round .* bfloat16 \(16 bits\)"):
        product(small, x.astype(jnp.bfloat16))
    adapted = jlora.adapterize({"layer": {"w": normal(1, 8, 6)}}, {"layer/w": method})
    np.testing.assert_allclose(product(adapted, x), x @ adapted.base["layer"]["w"], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"layer/w \(8, 6\): the plan 'merged' has one input .* dropout"):
        product(adapted.replace(context={"dropout": jax.random.key(0)}), x)


def test_products_of_one_activation_share_their_thin_products():
    """q, k and v, cast on the way as Flax does: one product of the input with all `a`, the same values and gradients."""
    params = {name: normal(n, 8, 6) / 8 for n, name in enumerate("qkv")}
    adapted = jlora.adapterize(params, {".*": jlora.LoRA(2, init="random")})
    x = normal(9, 5, 8)

    def f(p):
        q = x @ p["q"]
        return q @ (x @ p["k"].astype(jnp.float32).reshape(8, 6)).T @ (x @ p["v"])

    def loss(f, p):
        return jnp.sum(jnp.sin(f(p)))

    lifted = lambda p: jlora.lift(f, plan="factored")(adapted.replace(params=p))
    merged = lambda p: f(jlora.merge(adapted.replace(params=p)))
    got, wanted = (jax.value_and_grad(partial(loss, g))(adapted.params) for g in (lifted, merged))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, wanted)
    program = str(jax.make_jaxpr(lifted)(adapted.params))
    assert program.count("f32[8,6] = concatenate") == 1  # the three a, side by side
    assert program.count("f32[5,6] = dot_general") == 1 + 2 * 3 + 1  # with all a; each base and each b; the last one


HIGHEST = lax.Precision.HIGHEST
convolve = partial(
    lax.conv_general_dilated, window_strides=(1,), padding="SAME", dimension_numbers=("NWC", "WIO", "NWC")
)
#: Shapes of the weights, and a function of each kind of product.
PRECISE = {
    "dense": ({"w": (6, 6)}, lambda p, x: jnp.matmul(x, p["w"], precision=HIGHEST)),
    "transposed": ({"w": (6, 6)}, lambda p, x: jnp.matmul(x, p["w"].T, precision=HIGHEST)),
    "together": ({"q": (6, 4), "k": (6, 4)}, lambda p, x: sum(jnp.matmul(x, p[n], precision=HIGHEST) for n in "qk")),
    "experts": ({"w": (3, 6, 4)}, lambda p, x: jnp.einsum("etd,edf->etf", x, p["w"], precision=HIGHEST)),
    "ragged": ({"w": (3, 6, 4)}, lambda p, x: lax.ragged_dot(x[0], p["w"], jnp.array([2, 0, 3]), precision=HIGHEST)),
    "convolution": ({"w": (3, 6, 4)}, lambda p, x: convolve(x, p["w"], precision=HIGHEST)),
    "in groups": ({"w": (3, 3, 4)}, lambda p, x: convolve(x, p["w"], precision=HIGHEST, feature_group_count=2)),
}


def equations(jaxpr):
    """All equations of a program, and of the programs in it."""
    is_program = lambda param: hasattr(param, "eqns") or hasattr(param, "jaxpr")
    for eqn in jaxpr.eqns:
        yield eqn
        for param in filter(is_program, jax.tree.leaves(list(eqn.params.values()), is_leaf=is_program)):
            yield from equations(getattr(param, "jaxpr", param))


def precisions(fn, adapted, x, **options):
    """Those of the products of a lifted function and of its gradient."""
    loss = lambda p, x: jnp.sum(jnp.sin(jlora.lift(fn, **options)(adapted.replace(params=p), x)))
    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(adapted.params, x)
    return [eqn.params["precision"] for eqn in equations(program.jaxpr) if "precision" in eqn.params]


LORA, SHIRA = jlora.LoRA(2, dropout=0.5), jlora.SHiRA(entries=4)


@pytest.mark.parametrize(
    ("name", "method"), [*((name, LORA) for name in PRECISE), ("dense", SHIRA), ("transposed", SHIRA)], ids=str
)
def test_every_product_of_a_lift_and_of_its_gradient_has_the_precision_that_was_asked_for(name, method):
    shapes, fn = PRECISE[name]
    x, params = normal(9, 3, 5, 6), {key: normal(n, *shape) for n, (key, shape) in enumerate(shapes.items())}
    adapted = jlora.adapterize(params, {".*": method}, sites=jlora.sites(fn, params, x))
    dropping = adapted.replace(context={"dropout": jax.random.key(0)})
    half = adapted.replace(base=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    tried = [(adapted, x, {"plan": "merged"}), (dropping, x, {"plan": "factored"})]
    if name == "dense":
        tried.append((half, x.astype(jnp.bfloat16), {"cuts": {"w": 2}}))
    for model, inputs, options in tried:
        found = precisions(fn, model, inputs, **options)
        assert len(found) >= 2 and set(found) <= {HIGHEST, (HIGHEST, HIGHEST)}, (options, found)


@pytest.mark.parametrize(("cuts", "platform"), [({}, "cpu"), ({"w": 4}, "cpu"), ({}, "gpu")])
def test_a_small_update_moves_bfloat16_outputs_on_average_as_in_float32(cuts, platform):
    """Each output keeps 8 bits, so most don't move; but over many the movement is the update's, not zero."""
    w, b = normal(1, 256, 256), normal(3, 4, 256) * 0.5e-2
    adapted = jlora.adapterize({"w": w.astype(jnp.bfloat16)}, {"w": jlora.LoRA(4, alpha=4)})
    x = normal(0, 512, 256).astype(jnp.bfloat16)
    a = normal(2, 256, 4) * 1e-2
    apply = jlora.lift(lambda p: x @ p["w"], cuts=cuts)
    with traced_for(platform):
        before, after = (apply(adapted.replace(params={"w": {"a": a, "b": each}})) for each in (jnp.zeros_like(b), b))
    moved = after.astype(jnp.float32) - before.astype(jnp.float32)
    wanted = x.astype(jnp.float32) @ (a @ b)
    assert after.dtype == jnp.bfloat16
    assert float(jnp.linalg.norm(a @ b) / jnp.linalg.norm(w)) < 2e-4
    slope = jnp.vdot(moved, wanted) / jnp.vdot(wanted, wanted)
    assert 0.85 < slope < 1.15, slope
