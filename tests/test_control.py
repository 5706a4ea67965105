"""Loops, branches and checkpoints around adapted weights: what they pass on, keep, and leave out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.experimental import io_callback
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 6)) * jnp.arange(1, 5)[:, None]
SQUARE = {"w": jax.random.normal(jax.random.key(1), (6, 6)) / 3}
STACK = {"w": jax.random.normal(jax.random.key(2), (3, 6, 6)) / 3}


def adapted(params, fn, method=None, *args):
    return jlora.adapterize(
        params, {".*": method or jlora.LoRA(rank=2, init="random")}, sites=jlora.sites(fn, params, *args)
    )


def close(got, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, wanted)


def equals_merged(fn, model):
    """Whether the lifted function, which may form nothing, equals that of the merged params."""
    close(*jax.jit(lambda model, x: (jlora.lift(fn, strict=True)(model, x), fn(jlora.merge(model), x)))(model, X))


def until_small(w, x):
    """Each row has a number of steps of its own."""
    more = lambda s: (s[0] < 8) & (jnp.sum(s[1] ** 2) > 0.5)
    return lax.while_loop(more, lambda s: (s[0] + 1, 0.7 * jnp.tanh(s[1] @ w)), (0, x))[1]


def layers_of_loops(p, x):
    return jax.vmap(lambda x: lax.scan(lambda x, w: (until_small(w, x) + x, None), x, p["w"])[0])(x)


def rows_of_rows(p, x):
    return jax.vmap(jax.vmap(lambda x: until_small(p["w"], x)))(x.reshape(2, 2, 6))


def weights_by_row(p, x):
    return jax.vmap(until_small)(p["w"], x[:3])


@pytest.mark.parametrize("fn", [layers_of_loops, rows_of_rows, weights_by_row])
def test_a_vmapped_while_stops_each_row_by_its_own_predicate(fn):
    model = adapted(SQUARE if fn is rows_of_rows else STACK, fn, None, X)
    equals_merged(fn, model)


def through_remat(p, x):
    w, y = jax.checkpoint(lambda w, x: (w, jnp.tanh(x @ w)))(p["w"], x)
    return y @ w


def transposed_by_remat(p, x):
    return x @ jax.checkpoint(lambda w: w.T)(p["w"])


def through_carry(p, x):
    body = lambda s, _: ((jax.jit(lambda w: w)(s[0]), jnp.tanh(s[1] @ s[0])), None)
    w, y = lax.scan(body, (p["w"], x), length=2)[0]
    return y @ w


def through_slices(p, x):
    y, w = lax.scan(lambda x, w: jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), w))(x, w), x, p["w"], reverse=True)
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), y, w)[0]


def through_while(p, x):
    step = lambda s: (s[0] + 1, jax.checkpoint(lambda w: w)(s[1]), jnp.tanh(s[2] @ s[1]))
    _, w, y = lax.while_loop(lambda s: (s[0] < 2) & (jnp.sum(s[2] @ s[1]) < 1e3), step, (0, p["w"], x))
    return y @ w


def through_branches(p, x):
    w, y = lax.cond(x.sum() > 0, lambda w: (w, x @ w), lambda w: (w, -x @ w), p["w"])
    return y @ w


def through_shards(p, x):
    mesh = jax.make_mesh((2,), ("d",), (AxisType.Auto,), devices=jax.devices()[:2])
    shards = jax.shard_map(lambda w, x: (w, x @ w), mesh=mesh, in_specs=(P(), P("d")), out_specs=(P(), P("d")))
    w, y = shards(p["w"], x)
    return y @ w


PASSING = [
    through_remat,
    transposed_by_remat,
    through_carry,
    through_slices,
    through_while,
    through_branches,
    through_shards,
]


@pytest.mark.parametrize("fn", PASSING)
def test_a_weight_that_a_body_only_passes_on_is_not_formed(fn):
    model = adapted(STACK if fn is through_slices else SQUARE, fn, jlora.LoRA(rank=2, dropout=0.5, init="random"), X)
    equals_merged(fn, model)
    if fn is not through_shards:  # where dropout keys make a weight whole
        jax.eval_shape(jlora.lift(fn, strict=True), model.replace(context={"dropout": KEY}), X)


def test_the_derivative_that_an_author_gave_to_a_passed_weight_is_kept():
    reversed_ = jax.custom_vjp(lambda w: w)
    reversed_.defvjp(lambda w: (w, None), lambda _, g: (-g,))
    model = jlora.adapterize(SQUARE, {"w": jlora.LoRA(rank=2, init="random")})

    def gradient(fn):
        return jax.grad(lambda q: jlora.lift(fn)(model.replace(params=q)))(model.params)

    plain, turned = (lambda p: jnp.sum(jnp.sin(X @ p["w"])), lambda p: jnp.sum(jnp.sin(X @ reversed_(p["w"]))))
    close(*jax.jit(lambda: (gradient(turned), jax.tree.map(jnp.negative, gradient(plain))))())


def test_branches_by_platform_stay_so():
    def fn(p, x):
        return lax.platform_dependent(x, p["w"], cpu=lambda x, w: x @ w, default=lambda x, w: x - x @ w)

    model = adapted(SQUARE, fn, None, X)
    program = jax.make_jaxpr(jlora.lift(fn, strict=True))(model, X)
    assert "branches_platforms=(('cpu',), None)" in str(program)
    equals_merged(fn, model)


def test_effects_of_results_that_go_nowhere_stay():
    seen = []

    def fn(p, x):
        jax.debug.callback(lambda y: seen.append("debug"), x @ p["w"])
        io_callback(lambda y: seen.append("io"), None, x @ p["w"], ordered=True)
        return lax.scan(lambda c, w: (c, jax.debug.callback(lambda w: seen.append("scan"), w[0, 0])), x, p["w"][None])[
            0
        ]

    jlora.lift(fn)(jlora.adapterize(SQUARE, {"w": jlora.LoRA(rank=2)}), X)
    jax.effects_barrier()
    assert sorted(seen) == ["debug", "io", "scan"]


def recurrent(p, x):
    x = x[..., None] * jnp.ones(6)
    return lax.scan(lambda c, x: (jnp.tanh(c @ p["w"] + x), c), jnp.zeros((x.shape[0], 6)), jnp.moveaxis(x, 1, 0))[0]


def feed_forward(p, x):
    x = x[..., None] * jnp.ones(6)
    return jax.nn.softmax((x @ p["w"]) @ jnp.swapaxes(jnp.tanh(x) @ p["w"], -1, -2))


@pytest.mark.parametrize("plan", ["auto", "factored"])
@pytest.mark.parametrize("method", [jlora.LoRA(rank=2, init="random"), jlora.SHiRA(entries=4)])
@pytest.mark.parametrize("fn", [recurrent, feed_forward])
def test_a_lifted_function_and_its_gradient_are_exported_with_symbolic_sizes(fn, method, plan):
    model = jlora.adapterize(SQUARE, {"w": method})
    lifted = jlora.lift(fn, plan=plan)
    step = jax.jit(jax.value_and_grad(lambda q, x: jnp.sum(lifted(model.replace(params=q), x))))
    sizes = jax.ShapeDtypeStruct(export.symbolic_shape("b, s"), jnp.float32)
    exported = export.export(jax.jit(lambda x: step(model.params, x)))(sizes)
    if plan == "auto" and fn is recurrent:
        close(exported.call(X[:3, :5]), step(model.params, X[:3, :5]))


def test_a_symbolic_batch_that_is_large_enough_takes_the_formed_plan():
    (batch,) = export.symbolic_shape("b", constraints=["b >= 2"])
    model = jlora.adapterize(SQUARE, {"w": jlora.LoRA(rank=2)})
    text = str(jax.make_jaxpr(lambda x: jlora.lift(lambda p, x: x @ p["w"])(model, x))(jnp.ones((2, 6))))
    exported = export.export(jax.jit(lambda x: jlora.lift(lambda p, x: x @ p["w"])(model, x)))
    symbolic = exported(jax.ShapeDtypeStruct((batch, 6), jnp.float32)).mlir_module()
    assert text.count("dot_general") == symbolic.count("stablehlo.dot_general") == 2  # a @ b, and x @ (w + a @ b)


def test_remat_policies_shardings_and_scopes_are_kept():
    mesh = jax.make_mesh((2,), ("d",), (AxisType.Auto,), devices=jax.devices()[:2])
    policy = jax.checkpoint_policies.dots_saveable
    rows = NamedSharding(mesh, P("d"))
    inner = jax.jit(lambda x, w: x @ w, in_shardings=(rows, None), out_shardings=rows)

    def fn(p, x):
        with jax.named_scope("mine"):
            return jax.checkpoint(lambda x: jnp.tanh(inner(x, p["w"])), policy=policy, prevent_cse=False)(x)

    model = jlora.adapterize(SQUARE, {"w": jlora.LoRA(rank=2)})
    program = jax.make_jaxpr(jlora.lift(fn))(model, X)
    (remat,) = [eqn for eqn in program.eqns if eqn.primitive.name in ("remat2", "checkpoint", "remat")]
    assert remat.params["policy"] is policy and remat.params["prevent_cse"] is False
    assert "mine" in str(remat.source_info.name_stack)
    assert str(program).count("sharding_constraint[") == 2 and "('d'" in str(program)


def test_a_reverse_scan_runs_backwards():
    def fn(p, x):
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), c), x, p["w"], reverse=True, unroll=3)

    model = adapted(STACK, fn, None, X)
    equals_merged(fn, model)
    (scan,) = [eqn for eqn in jax.make_jaxpr(jlora.lift(fn))(model, X).eqns if eqn.primitive.name == "scan"]
    assert scan.params["unroll"] == 3


def chosen_by_a_branch(p, x):
    return x @ lax.cond(x.sum() < 1e6, lambda w: w.T, lambda w: w, p["w"])


def swapped_by_steps(p, x):
    w, v = lax.scan(lambda s, _: (s[::-1], None), (p["w"], p["v"]), length=2)[0]
    return x @ w - x @ v


@pytest.mark.parametrize("fn", [chosen_by_a_branch, swapped_by_steps])
def test_a_weight_that_only_some_branches_or_places_pass_on_is_formed(fn):
    params = SQUARE if fn is chosen_by_a_branch else {**SQUARE, "v": jnp.eye(6)}
    model = jlora.adapterize(params, {".*": jlora.LoRA(rank=2, init="random")})
    close(jlora.lift(fn)(model, X), fn(jlora.merge(model), X))


def test_a_weight_that_a_jit_moves_is_another_one():
    mesh = jax.make_mesh((2,), ("d",), (AxisType.Auto,), devices=jax.devices()[:2])
    moved = jax.jit(lambda w: w, out_shardings=NamedSharding(mesh, P("d")))

    def fn(p, x):
        return x @ lax.scan(lambda w, _: (moved(w), None), p["w"], length=2)[0]

    model = jlora.adapterize(SQUARE, {"w": jlora.LoRA(rank=2)})
    with pytest.raises(ValueError, match="strict: the effective weight of w, .* would have to be formed for `scan`"):
        jax.eval_shape(jlora.lift(fn, strict=True), model, X)
