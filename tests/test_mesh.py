"""On named meshes: adapters lie as their base does, and training gives the single-device result."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora

KEY = jax.random.key(0)
# How each layout cuts (batch, up-projection [16, 32], down-projection [32, 16], attention kernel [16, 4, 8]).
LAYOUTS = {
    "data": ({"data": 8}, P("data"), P(), P(), P()),
    "fsdp": ({"fsdp": 8}, P("fsdp"), P("fsdp"), P("fsdp"), P("fsdp")),
    "tensor": ({"model": 4}, P(), P(None, "model"), P("model"), P(None, "model")),
    "mixed": ({"data": 2, "model": 4}, P("data"), P("data", "model"), P("model", "data"), P("data", "model")),
}


def model(p, x):
    heads = jnp.einsum("btd,dhk->bthk", x, p["qkv"]["kernel"])
    x = x + jnp.einsum("bthk,hkd->btd", jnp.tanh(heads), p["out"]["kernel"])
    return x + jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"]) @ p["down"]["kernel"]


def base():
    normal = lambda n, *shape: jax.random.normal(jax.random.fold_in(KEY, n), shape) / 4
    return {
        "qkv": {"kernel": normal(0, 16, 4, 8)},
        "out": {"kernel": normal(1, 4, 8, 16)},
        "up": {"kernel": normal(2, 16, 32), "bias": jnp.zeros(32)},
        "down": {"kernel": normal(3, 32, 16)},
    }


X, Y = (jax.random.normal(jax.random.fold_in(KEY, n), (8, 4, 16)) for n in (10, 11))
SPEC = {
    "up/bias": jlora.Full(),
    "down/kernel": jlora.DoRA(jlora.LoRA(2, init="random")),
    ".*": jlora.LoRA(2, init="random"),
}


def on_mesh(layout):
    sizes, batch, up, down, qkv = LAYOUTS[layout]
    count = int(np.prod(list(sizes.values())))
    types = (AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), types, devices=jax.devices()[:count])
    specs = {
        "qkv": {"kernel": qkv},
        "out": {"kernel": P(*qkv[1:2])},
        "up": {"kernel": up, "bias": P(*up[1:2])},
        "down": {"kernel": down},
    }
    place = lambda tree, specs: jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)
    return place(base(), specs), place(X, batch), place(Y, batch)


def train(params, x, y, steps=10):
    report = jlora.sites(model, params, x)
    adapted = jlora.adapterize(params, SPEC, key=KEY, sites=report)
    tx = jlora.optimizer(adapted, optax.adamw, 1e-2, ratio=4)
    state = jax.jit(tx.init)(adapted.params)

    @jax.jit
    def step(adapted, state):
        loss_fn = lambda p: jnp.mean((jlora.lift(model)(adapted.replace(params=p), x) - y) ** 2)
        loss, grads = jax.value_and_grad(loss_fn)(adapted.params)
        updates, state = tx.update(grads, state, adapted.params)
        return adapted.replace(params=optax.apply_updates(adapted.params, updates)), state, loss

    for _ in range(steps):
        adapted, state, loss = step(adapted, state)
    return adapted, loss, step.lower(adapted, state).compile().as_text()


@pytest.fixture(scope="module")
def single():
    return train(base(), X, Y)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_steps_on_a_mesh_equal_ten_steps_on_one_device(layout, single):
    adapted, loss, _ = train(*on_mesh(layout))
    np.testing.assert_allclose(loss, single[1], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), adapted.params, single[0].params)


@pytest.mark.parametrize("layout", ["tensor", "mixed"])
def test_adapters_lie_as_their_base_does_before_and_after_training(layout):
    params, x, y = on_mesh(layout)
    report = jlora.sites(model, params, x)
    before = jlora.adapterize(params, SPEC, key=KEY, sites=report)
    after, _, _ = train(params, x, y, steps=1)
    for adapted in (before, after):
        up, down, qkv = adapted.params["up"], adapted.params["down"]["kernel"], adapted.params["qkv"]["kernel"]
        data = "data" if layout == "mixed" else None
        wanted = [
            (up["kernel"]["a"], P(data)),
            (up["kernel"]["b"], P(None, "model")),
            (up["bias"]["w"], P("model")),
            (down["a"], P("model")),
            (down["m"], P(data)),
            (qkv["b"], P(None, "model")),
        ]
        for array, spec in wanted:
            assert array.sharding.is_equivalent_to(NamedSharding(array.sharding.mesh, spec), array.ndim)


def test_a_tensor_parallel_step_gathers_no_base_weight():
    *_, text = train(*on_mesh("tensor"), steps=1)
    gathered = re.findall(r"= \w+\[([\d,]*)\][^=]* all-gather", text)
    assert all(np.prod([int(n) for n in shape.split(",") if n]) < 16 * 32 for shape in gathered), gathered


def test_merge_save_and_load_keep_the_shardings(tmp_path):
    params, x, y = on_mesh("mixed")
    adapted, *_ = train(params, x, y, steps=1)
    merged = jlora.merge(adapted)
    assert jax.tree.map(lambda leaf: leaf.sharding, merged) == jax.tree.map(lambda leaf: leaf.sharding, params)
    jlora.save(tmp_path / "adapters", adapted)
    loaded = jlora.load(tmp_path / "adapters", params)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, adapted.params)
    same = lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim)
    fresh = jlora.adapterize(params, SPEC, key=KEY, sites=jlora.sites(model, params, x))
    assert jax.tree.all(jax.tree.map(same, loaded.params, fresh.params))
    np.testing.assert_array_equal(
        jlora.load(tmp_path / "adapters", base()).params["up"]["kernel"]["a"], adapted.params["up"]["kernel"]["a"]
    )


@pytest.mark.parametrize(
    "method", [jlora.LoRA(2, init="random"), jlora.DoRA(jlora.LoRA(2, init="random")), jlora.Full()]
)
def test_a_mesh_with_explicit_axes_gives_the_same(method):
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Explicit,) * 2)

    def f(p, x):
        h = jnp.tanh(x @ p["up"])
        return (
            jnp.dot(h, p["down"], out_sharding=P("data"))
            if x.ndim == 3 and jax.typeof(x).sharding.spec[0]
            else h @ p["down"]
        )

    params = {"up": base()["up"]["kernel"], "down": base()["down"]["kernel"]}
    plain = jlora.adapterize(params, {".*": method})
    value_and_grad = lambda a, x: jax.value_and_grad(lambda p: jnp.sum(jlora.lift(f)(a.replace(params=p), x) ** 2))(
        a.params
    )
    wanted = value_and_grad(plain, X)
    with jax.set_mesh(mesh):
        specs = {"up": P(None, "model"), "down": P("model", None)}
        cut = {name: jax.device_put(w, NamedSharding(mesh, specs[name])) for name, w in params.items()}
        got = jax.jit(value_and_grad)(
            jlora.adapterize(cut, {".*": method}), jax.device_put(X, NamedSharding(mesh, P("data")))
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), jax.device_get(got), jax.device_get(wanted)
    )
