"""Models of every framework train unchanged: a few steps, then the lifted model against the merged params in the plain one."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.problems import jit
from flax import nnx
from flax.training.train_state import TrainState

import jlora

LORA = jlora.LoRA(rank=2, alpha=4)
X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6, 8)), jnp.float32)
TOKENS = jnp.array([[1, 5, 2, 7], [3, 3, 0, 1]])


def train(fn, params, spec, x, sites=None, steps=5):
    """Trains adapters of a function; checks that the loss falls, the base stays, and merged params give the same output."""
    before = jax.device_get(params)
    adapted = jlora.adapterize(params, spec, sites=sites)
    lifted, plain = jlora.lift(fn, strict=True), jit(fn)
    start = plain(params, x)
    target = start + jnp.sin(jnp.arange(start.size, dtype=start.dtype)).reshape(start.shape)
    tx = jlora.optimizer(adapted, optax.adam, learning_rate=1e-2)

    @jit
    def step(adapted, opt_state):
        def loss_fn(p):
            return jnp.mean((lifted(adapted.replace(params=p), x) - target) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(adapted.params)
        updates, opt_state = tx.update(grads, opt_state, adapted.params)
        return adapted.replace(params=optax.apply_updates(adapted.params, updates)), opt_state, loss

    call = jit(lifted)
    np.testing.assert_allclose(call(adapted, x), start, rtol=1e-4, atol=1e-5)
    losses, opt_state = [], tx.init(adapted.params)
    for _ in range(steps):
        adapted, opt_state, loss = step(adapted, opt_state)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(call(adapted, x), plain(jlora.merge(adapted), x), rtol=1e-4, atol=1e-5)
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(adapted.base)))
    return adapted


def linen(model, x, spec):
    """Trains a Linen model, `model.apply` and its params as they are."""
    params = jit(model.init)(jax.random.key(0), x)["params"]
    report = jlora.sites(model.apply, {"params": params}, x)
    return train(lambda params, x: model.apply({"params": params}, x), params, spec, x, report)


def paths_of(adapted):
    return [site.path for site in adapted.plan.sites]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.RMSNorm()(x))
        return x + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.RMSNorm()(x)))), None


class Tower(nn.Module):
    """Stacked layers under `nn.scan` and `nn.remat`."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(5, name="head")(stack(name="layers")(x, None)[0])


class TiedModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8)
        return embed.attend(nn.Dense(8)(embed(tokens)))


class Convolutions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3,), strides=2)(x))
        return nn.Conv(8, (3,), feature_group_count=4)(x)


def test_linen_dense():
    adapted = linen(
        nn.Sequential([nn.Dense(12), nn.tanh, nn.Dense(5)]), X, {jlora.ALL_LINEAR: LORA, ".*bias": jlora.Full()}
    )
    assert paths_of(adapted) == ["layers_0/bias", "layers_0/kernel", "layers_2/bias"]


def test_linen_attention_heads_are_found_by_the_trace():
    adapted = linen(
        nn.MultiHeadDotProductAttention(num_heads=2), X, {r"(query|key|value|out)/kernel": jlora.DoRA(LORA)}
    )
    sizes = {site.path: (site.in_size, site.out_size) for site in adapted.plan.sites}
    assert sizes == {f"{name}/kernel": (8, 8) for name in ("query", "key", "value", "out")}
    assert adapted.params["out"]["kernel"]["a"].shape == (8, 2)
    assert adapted.plan.sites[1].in_axes == (0, 1)


def test_linen_scan_and_remat():
    adapted = linen(Tower(), X, {jlora.ALL_LINEAR: LORA})
    assert len(adapted.plan.sites) == 6
    assert adapted.params["layers"]["Dense_1"]["kernel"]["a"].shape == (3, 8, 2)


def test_linen_tied_embedding():
    adapted = linen(TiedModel(), TOKENS, {"Embed_0/embedding": LORA})
    assert adapted.plan.sites[0].kind == "gather"


def test_linen_convolutions():
    adapted = linen(Convolutions(), X, {r"Conv_\d/kernel": LORA})
    assert [(site.kind, site.in_size, site.out_size) for site in adapted.plan.sites] == [
        ("conv", 24, 8),
        ("grouped conv", 6, 8),
    ]


def test_a_train_state_holds_the_adapters_as_its_params():
    model = nn.Sequential([nn.Dense(12), nn.tanh, nn.Dense(5)])
    variables = jit(model.init)(jax.random.key(0), X)
    adapted = jlora.adapterize(variables["params"], {".*kernel": LORA})
    tx = jlora.optimizer(adapted, optax.adamw, learning_rate=1e-2, ratio=4)
    state = TrainState.create(apply_fn=jlora.lift(model.apply), params=adapted.params, tx=tx)

    @jax.jit
    def step(state, adapted):
        def loss_fn(p):
            return jnp.mean((state.apply_fn({"params": adapted.replace(params=p)}, X) - 1) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(5):
        state, loss = step(state, adapted)
        losses.append(float(loss))
    trained = adapted.replace(params=state.params)
    assert losses[-1] < losses[0] and int(state.step) == 5
    merged = jit(model.apply)({"params": jlora.merge(trained)}, X)
    np.testing.assert_allclose(jit(state.apply_fn)({"params": trained}, X), merged, rtol=1e-4, atol=1e-5)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.dense = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.attention(self.norm(x)))


def test_nnx():
    graph, params, rest = nnx.split(NnxModel(nnx.Rngs(0)), nnx.Param, ...)

    def fn(params, x):
        return nnx.merge(graph, params, rest)(x)

    adapted = train(
        fn, params, {"attention/(query|value)/kernel": LORA, "dense/kernel": LORA}, X, jlora.sites(fn, params, X)
    )
    assert paths_of(adapted) == ["attention/query/kernel", "attention/value/kernel", "dense/kernel"]
    assert isinstance(jlora.merge(adapted), nnx.State)


class Residual(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 8, rngs=rngs)

    @nnx.remat
    def __call__(self, x):
        return x + jnp.tanh(self.dense(x))


@nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
def through_layers(x, layer):
    return layer(x)


def test_nnx_remat_inside_scan_with_dropout():
    graph, one = nnx.split(Residual(nnx.Rngs(0)))
    params = jax.tree.map(lambda w: jnp.stack([w, w / 2, -w]), one)

    def fn(params, x):
        return through_layers(through_layers(x, model := nnx.merge(graph, params)), model)

    adapted = jlora.adapterize(
        params,
        {"dense/kernel": jlora.LoRA(rank=2, dropout=0.5, init="random")},
        sites=jlora.sites(fn, params, X),
    )
    lifted = jit(jlora.lift(fn, strict=True))
    np.testing.assert_allclose(lifted(adapted, X), jit(fn)(jlora.merge(adapted), X), rtol=1e-4, atol=1e-5)
    assert not np.allclose(lifted(adapted.replace(context={"dropout": jax.random.key(1)}), X), lifted(adapted, X))


def test_equinox():
    params, static = eqx.partition(eqx.nn.MLP(8, 5, 12, 2, key=jax.random.key(0)), eqx.is_array)

    def fn(params, x):
        return jax.vmap(jax.vmap(eqx.combine(params, static)))(x)

    adapted = train(fn, params, {jlora.ALL_LINEAR: LORA}, X, jlora.sites(fn, params, X))
    sizes = {site.path: (site.in_size, site.out_size) for site in adapted.plan.sites}
    assert sizes == {"layers/0/weight": (8, 12), "layers/1/weight": (12, 12)}
    assert isinstance(jlora.merge(adapted), eqx.nn.MLP)


def test_haiku():
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([12, 5])(x)))
    params = jit(model.init)(jax.random.key(0), X)
    adapted = train(model.apply, params, {"mlp/~/linear_[01]/w": LORA}, X)
    assert set(adapted.params["mlp/~/linear_0"]["w"]) == {"a", "b"}


@pytest.mark.parametrize("container", [dict, tuple, list])
def test_bare_functions_with_params_in_any_container(container):
    w, v = jnp.eye(8), jnp.ones((8, 3))
    params = {"w": w, "v": v} if container is dict else container((w, v))
    first, second = ("w", "v") if container is dict else (0, 1)
    adapted = train(lambda p, x: jnp.tanh(x @ p[first]) @ p[second], params, {f"{first}|{second}": LORA}, X)
    assert paths_of(adapted) == (["v", "w"] if container is dict else ["0", "1"])
    assert type(jlora.merge(adapted)) is container
