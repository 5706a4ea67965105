"""Weights that code under `shard_map` gathers or passes round keep their update: values, gradients, and what is sent."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jlora

MESH = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
KEY = jax.random.key(1)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


W, X = normal(0, 8, 12), normal(1, 16, 8)


def adapt(w, method):
    """Adapted params with noise on what is trained."""
    adapted = jlora.adapterize({"w": w}, {"w": method}, key=KEY)
    noisy = lambda leaf: leaf + 0.3 * normal(leaf.size, *leaf.shape)
    return adapted.replace(params=jax.tree.map(noisy, adapted.params))


def same_as_plain(fn, plain, w, method, **options):
    """Asserts values and gradients of the lifted function, and gives the compiled text."""
    adapted = adapt(w, method)
    lifted = jlora.lift(fn, strict=True, **options)
    loss = lambda f: jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(f(p)))))
    run = loss(lambda p: lifted(adapted.replace(params=p), X))
    wanted = loss(lambda p: plain(jlora.merge(adapted.replace(params=p)), X))(adapted.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), run(adapted.params), wanted)
    return run.lower(adapted.params).compile().as_text()


def sums(text):
    """The shapes that devices sum, whole or scattered."""
    kinds = r"= (\(?[^=]*?) (?:all-reduce|reduce-scatter|all-reduce-start)\("
    return {shape for found in re.findall(kinds, text) for shape in re.findall(r"\[([\d,]*)\]", found)}


def gathering(axes):
    """`x @ w` with `w` cut along some axes, and gathered in the body."""
    spec = P(*(axes.get(n) for n in range(2)))

    def body(w, x):
        for axis, name in axes.items():
            w = jax.lax.all_gather(w.astype(jnp.float32), name, axis=axis, tiled=True)
        return x @ w

    cut = {"mesh": MESH, "in_specs": (spec, P("data")), "out_specs": P("data")}
    return lambda p, x: jax.shard_map(body, **cut, check_vma="model" not in axes.values())(p["w"], x)


IN, OUT, BOTH = {0: "data"}, {1: "data"}, {1: "model", 0: "data"}


@pytest.mark.parametrize(
    ("method", "axes"),
    [
        (jlora.LoRA(2), IN),
        (jlora.LoRA(2), BOTH),
        (jlora.DoRA(jlora.LoRA(2)), OUT),
        (jlora.DoRA(jlora.LoRA(2)), IN),
        (jlora.SHiRA(density=0.2), BOTH),
        (jlora.VeRA(3), IN),
        (jlora.HiRA(2), OUT),
    ],
    ids=str,
)
def test_a_weight_that_is_gathered_in_shard_map_sums_no_gradient_of_its_size(method, axes):
    text = same_as_plain(gathering(axes), lambda p, x: x @ p["w"], W, method)
    assert not sums(text) & {"8,12", "4,12", "8,6", "8,3", "4,3"}, sums(text)


def test_a_weight_in_a_code_is_gathered_as_its_codes():
    base = jlora.quantize({"w": normal(2, 64, 16)}, {"w": jlora.NF4(block=32)})
    adapted = jlora.adapterize(base, {"w": jlora.LoRA(2, init="random")}, key=KEY)
    x = normal(3, 16, 64)
    run = jax.jit(jlora.lift(gathering(IN), strict=True))
    np.testing.assert_allclose(run(adapted, x), x @ jlora.merge(jlora.dequantize(adapted))["w"], rtol=1e-4, atol=1e-4)


def test_shards_that_are_passed_round_take_their_rows_of_the_factors_with_them():
    def ring(w, x):
        here, y = jax.lax.axis_index("model"), 0
        for turn in range(4):
            y = y + jax.lax.dynamic_slice_in_dim(x, (here + turn) % 4 * 2, 2, 1) @ w
            w = jax.lax.ppermute(w, "model", [(n, (n - 1) % 4) for n in range(4)])
        return y

    cut = {"mesh": MESH, "in_specs": (P("model"), P("data")), "out_specs": P("data"), "check_vma": False}
    text = same_as_plain(lambda p, x: jax.shard_map(ring, **cut)(p["w"], x), lambda p, x: x @ p["w"], W, jlora.LoRA(2))
    assert not sums(text) & {"8,12", "2,12,8"} and "collective-permute" in text


def test_what_a_gather_can_not_follow_is_formed_and_strict_says_what_to_do():
    def stacked(w, x):
        return x @ jax.lax.all_gather(w, "data").reshape(8, 12)

    def half(w, x):
        return x[:, :4] @ jax.lax.ppermute(w, "data", [(0, 1)])

    for body in (stacked, half):
        cut = {"mesh": MESH, "in_specs": (P("data"), P()), "out_specs": P("data"), "check_vma": False}
        fn = lambda p, x, body=body, cut=cut: jax.shard_map(body, **cut)(p["w"], x)
        adapted = adapt(W, jlora.LoRA(2))
        np.testing.assert_allclose(jlora.lift(fn)(adapted, X), fn(jlora.merge(adapted), X), rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="would have to be formed for `(all_gather|ppermute)`"):
            jlora.lift(fn, strict=True)(adapted, X)
    used = lambda p, x: jax.shard_map(
        lambda w, x: x @ w, mesh=MESH, in_specs=(P(None, "model"), P()), out_specs=P(None, "model")
    )(p["w"], x)
    with pytest.raises(ValueError, match=r"gathered there before anything else, by jax.lax.all_gather\(w"):
        jlora.lift(used, strict=True)(adapt(W, jlora.VeRA(4)), X)


def dropped(out, x_spec, check=True):
    """The part of `x @ w` that LoRA with dropout adds, for an input of ones and a base of zeros."""
    method = jlora.LoRA(2, dropout=0.5)
    adapted = adapt(jnp.zeros((8, 12)), method).replace(context={"dropout": jax.random.key(0)})
    body = lambda w, x: jax.lax.psum(x @ w, "model") if x_spec == P(None, "model") else x @ w
    w_spec = P("model") if x_spec == P(None, "model") else P(None, *out[1:])
    cut = {"mesh": MESH, "in_specs": (w_spec, x_spec), "out_specs": out, "check_vma": check}
    fn = lambda p, x: jax.shard_map(body, **cut)(p["w"], x)
    return adapted, lambda p: jlora.lift(fn, strict=True)(adapted.replace(params=p), jnp.ones((16, 8)))


def masks(adapted, y):
    """Which entries of each row were kept, from what remains of them."""
    a, b = adapted.params["w"]["a"], adapted.params["w"]["b"] * adapted.plan.sites[0].method.alpha / 2
    every = np.array(np.meshgrid(*[[0, 2]] * 8, indexing="ij")).reshape(8, -1).T
    outputs = every @ np.asarray(a) @ np.asarray(b)
    nearest = [np.argmin(np.abs(outputs - row).max(1)) for row in np.asarray(y)]
    assert max(np.abs(outputs[n] - row).max() for n, row in zip(nearest, np.asarray(y))) < 1e-4
    return every[nearest] / 2


def test_dropout_in_shard_map_drops_what_differs_between_devices_by_itself():
    adapted, call = dropped(P("data"), P("data"))
    by_rows = masks(adapted, jax.jit(call)(adapted.params))
    assert np.any(by_rows[:8] != by_rows[8:]) and 0.3 < by_rows.mean() < 0.7
    adapted, call = dropped(P(), P(None, "model"))
    by_features = masks(adapted, jax.jit(call)(adapted.params))
    assert any(np.any(by_features[:, :2] != by_features[:, n : n + 2]) for n in (2, 4, 6))
    adapted, call = dropped(P(None, "model"), P())
    masks(adapted, jax.jit(call)(adapted.params))  # all devices drop the same of the same input
    loss = lambda b: jnp.sum(jnp.sin(call({"w": {**adapted.params["w"], "b": b}})))
    b, step = adapted.params["w"]["b"], normal(4, 2, 12)
    slope = (jax.jit(loss)(b + 1e-2 * step) - jax.jit(loss)(b - 1e-2 * step)) / 2e-2
    np.testing.assert_allclose(jnp.vdot(jax.jit(jax.grad(loss))(b), step), slope, rtol=2e-2)


def test_dropout_in_shard_map_without_check_vma_is_refused():
    adapted, call = dropped(P("data"), P("data"), check=False)
    with pytest.raises(ValueError, match="w: dropout inside `shard_map` needs check_vma=True"):
        call(adapted.params)


def test_entries_in_many_blocks_pass_check_vma():
    whole = {"mesh": MESH, "in_specs": (P(), P("data")), "out_specs": P("data")}
    fn = lambda p, x: jax.shard_map(lambda w, x: x @ w, **whole)(p["w"], x)
    same_as_plain(fn, lambda p, x: x @ p["w"], W, jlora.SHiRA(density=0.5), plan="factored", rows=2)


def test_experts_as_one_einsum_have_an_update_each_and_lie_on_their_devices():
    method = jlora.Axes("batch in out", jlora.LoRA(2))
    cut = {"mesh": MESH, "in_specs": (P("model"), P("data")), "out_specs": P("model", "data")}
    product = lambda w, x: jnp.einsum("sd,edf->esf", x, w)
    fn = lambda p, x: jax.shard_map(product, **cut)(p["w"], x)
    text = same_as_plain(fn, lambda p, x: product(p["w"], x), normal(5, 4, 8, 12), method)
    assert "all-gather" not in text
