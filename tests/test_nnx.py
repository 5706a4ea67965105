"""`jlora.nnx`: a model that holds its adapters as LoRAParams, in NNX's own loops, optimizers and checkpoints."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jlora

X = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4)), jnp.float32)
SPEC = {jlora.ALL_LINEAR: jlora.LoRA(rank=2, init="random"), "head/bias": jlora.Full()}


class Network(nnx.Module):
    """State of every kind: batch statistics, random keys, a counter, a setting."""

    def __init__(self, rngs):
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))
        self.config = {"width": 8}

    def __call__(self, x, *, scale=1.0):
        self.calls[...] += 1
        return self.head(self.features(x)) * scale

    def features(self, x):
        return self.drop(nnx.relu(self.norm(self.up(x))))

    def named(self, width):
        return {"name": "network", "zeros": jnp.zeros(width), "width": width}


@pytest.fixture
def network():
    return Network(nnx.Rngs(0))


def params_of(model):
    return jax.tree.leaves(nnx.state(model, nnx.Param))


def test_a_call_is_the_merged_models_and_the_start_is_the_bases(network):
    exact = jlora.nnx.adapt(network, {jlora.ALL_LINEAR: jlora.LoRA(rank=2)}, X)
    model = jlora.nnx.adapt(network, SPEC, X, key=jax.random.key(3))
    for each in (network, exact, model):
        each.eval()
    call = nnx.jit(lambda model: (model(X, scale=2.0), model.features(X)))
    merged = model.merged()
    assert type(merged) is Network and np.array_equal(call(exact)[0], call(network)[0])
    for got, wanted, plain in zip(call(model), call(merged), call(network)):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
        assert not np.allclose(got, plain)
    assert all(one is other for one, other in zip(params_of(model.base), params_of(network)))


def test_what_a_call_writes_is_there_afterwards_and_is_not_the_given_models(network):
    model, plain = jlora.nnx.adapt(network, {jlora.ALL_LINEAR: jlora.LoRA(rank=2)}, X), nnx.clone(network)
    call = nnx.jit(lambda model: model(X))
    assert np.array_equal(call(model), call(plain))
    assert not np.array_equal(call(model), call(model)), "each call draws its own dropout"
    call(plain), call(plain)
    rest = nnx.Not(nnx.Any(nnx.Param, nnx.LoRAParam))
    written, wanted = (jax.tree.leaves(nnx.state(each, rest)) for each in (model.base, plain))
    assert len(written) == 5 and all(map(_equal, written, wanted))
    assert int(model.calls[...]) == 3 and int(network.calls[...]) == 0


def _equal(one, other):
    if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
        one, other = jax.random.key_data(one), jax.random.key_data(other)
    return np.allclose(one, other, rtol=1e-6)


def test_signature_attributes_and_methods_are_the_models(network):
    model = jlora.nnx.adapt(network, SPEC, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert inspect.signature(model) == inspect.signature(model.__call__) == inspect.signature(network)
    assert model.config == {"width": 8} and model.head.kernel[...].shape == (8, 3)
    found = model.named(2)
    assert (found["name"], found["width"], found["zeros"].shape) == ("network", 2, (2,))
    with pytest.raises(AttributeError, match="nothing"):
        _ = model.nothing
    assert not hasattr(model, "init_cache")


def test_nnx_trains_the_adapters_alone_and_allocates_ranks(network, tmp_path):
    method = jlora.AdaLoRA(rank=2, target=1, steps=2, orthogonality=0.0)
    make = lambda: jlora.nnx.adapt(network, {"(up|head)/kernel": method}, X)
    model = make()
    model.eval()
    tx = jlora.nnx.on_state(jlora.optimizer(model.adapted(), optax.adamw, learning_rate=0.02))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    before = jax.device_get(params_of(network))

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.mean((model(X) - 1) ** 2)
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(3)]
    gates = [model.adapted().params[name]["kernel"]["e"] for name in ("up", "head")]
    assert losses[2] < losses[0] and sum(int(jnp.sum(gate != 0)) for gate in gates) == 2
    assert all(map(np.array_equal, before, params_of(network)))
    assert all(one is other for one, other in zip(params_of(model.base), params_of(network))), "the base is there twice"

    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", nnx.state(model, nnx.LoRAParam))
        saver.wait_until_finished()
        restored = make()
        nnx.update(restored, saver.restore(tmp_path / "state", nnx.state(restored, nnx.LoRAParam)))
    assert all(map(np.array_equal, jax.tree.leaves(restored.adapted().params), jax.tree.leaves(model.adapted().params)))


@pytest.mark.once
def test_the_adapters_dropout_follows_train_and_eval_and_constants_get_no_gradient(network):
    method = {"up/kernel": jlora.LoRA(rank=2, init="random", dropout=0.5), "head/kernel": jlora.VeRA(rank=2)}
    adapted = jlora.adapterize(nnx.state(network, nnx.Param), method)
    adapted = adapted.replace(
        params=jax.tree.map(jnp.ones_like, adapted.params), context={"dropout": jax.random.key(7)}
    )
    model = jlora.nnx.attach(network, adapted)
    call = nnx.jit(lambda model: model.features(X))
    model.base.eval()
    assert not np.array_equal(call(model), call(model))
    model.eval()
    assert np.array_equal(call(model), call(model))
    grads = nnx.jit(nnx.grad(lambda model: model(X).sum(), argnums=nnx.DiffState(0, nnx.Param)))(model)
    assert all(not leaf.any() for leaf in jax.tree.leaves(nnx.state(grads, jlora.nnx.Constant)))
    assert any(leaf.any() for leaf in jax.tree.leaves(nnx.state(grads, nnx.LoRAParam)))


@pytest.mark.once
def test_updates_go_where_their_gradients_are():
    grads = nnx.State({"lora": {"layers": {"10": {"b": np.ones(1)}, "9": {"a": np.full(1, 2.0), "B": np.zeros(1)}}}})
    tx = jlora.nnx.on_state(optax.scale(3.0))
    updates, _ = tx.update(grads, tx.init(grads), grads)
    assert updates == nnx.State(
        {"lora": {"layers": {"10": {"b": np.full(1, 3.0)}, "9": {"a": np.full(1, 6.0), "B": np.zeros(1)}}}}
    )


@pytest.mark.once
def test_a_quantized_base_is_attached(network):
    spec = {"up/kernel": jlora.LoRA(rank=2, init="random")}
    params = jlora.quantize(nnx.state(network, nnx.Param), {"up/kernel": jlora.Int8()})
    network.eval()
    model = jlora.nnx.attach(network, jlora.adapterize(params, spec))
    loss = lambda model: model(X).sum()
    grads, got = nnx.jit(lambda model: (nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model), model(X)))(
        model
    )
    np.testing.assert_allclose(got, nnx.jit(lambda model: model(X))(model.merged()), rtol=1e-5, atol=1e-5)
    assert all(leaf.any() for leaf in jax.tree.leaves(grads))


class Changing(nnx.Module):
    """Keeps something: a new Variable, or what it must not, a new weight or an attribute that is no Variable."""

    def __init__(self, rngs):
        self.up = nnx.Linear(4, 3, rngs=rngs)
        self.seen = 0

    def __call__(self, x, what="nothing"):
        if what == "weight":
            self.up.bias[...] = self.up.bias[...] + 1
        if what == "attribute":
            self.seen += 1
        if what == "variable":
            self.mean = nnx.Variable(x.mean())
        return self.up(x)


def test_calls_whose_effects_would_be_lost_are_refused():
    model = jlora.nnx.adapt(Changing(nnx.Rngs(0)), {"up/kernel": jlora.LoRA(rank=2)}, X)
    model(X, "variable")
    assert np.allclose(model.mean[...], X.mean())
    with pytest.raises(ValueError, match="the call changes the parameter up/bias, which stays as it is under adapters"):
        model(X, "weight")
    with pytest.raises(ValueError, match=r"Changing.__call__ changes attributes that are no nnx.Variable"):
        model(X, "attribute")


@pytest.mark.once
def test_what_can_not_be_adapted_is_refused(network):
    lora = {"up/kernel": jlora.LoRA(rank=2)}
    with pytest.raises(TypeError, match="takes an nnx.Module, got function; for a Linen module there is jlora.linen"):
        jlora.nnx.adapt(lambda x: x, lora, X)
    with pytest.raises(TypeError, match="needs the inputs of one call, arrays or jax.ShapeDtypeStructs"):
        jlora.nnx.adapt(network, lora)
    with pytest.raises(ValueError, match="'nothing' matches no leaf"):
        jlora.nnx.adapt(network, {"nothing": jlora.LoRA(rank=2)}, X)
    model = jlora.nnx.adapt(network, lora, X)
    with pytest.raises(ValueError, match="lora/up/kernel/a is an nnx.LoRAParam already"):
        jlora.nnx.adapt(model, lora, X)
    with pytest.raises(TypeError, match=r"takes a jlora.Adapted, got State"):
        jlora.nnx.attach(network, nnx.state(network))
    other = jlora.adapterize(nnx.state(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Param), {"kernel": jlora.LoRA(rank=2)})
    with pytest.raises(ValueError, match=r"on other params than .* of this Network: bias is \(8,\), not None"):
        jlora.nnx.attach(network, other)
    with pytest.raises(ValueError, match="unread must be"):
        jlora.nnx.attach(network, model.adapted(), unread="no")
    tx = jlora.nnx.on_state(optax.adam(1e-3))
    with pytest.raises(ValueError, match=r"with wrt=nnx.LoRAParam, .* got \['base', 'lora'\]"):
        nnx.Optimizer(model, tx, wrt=nnx.Param)


@pytest.mark.once
def test_an_unread_leaf_is_an_error_of_the_call_unless_allowed_and_none_of_other_methods(network):
    adapted = jlora.adapterize(nnx.state(network, nnx.Param), {"head/kernel": jlora.LoRA(rank=2)})
    model = jlora.nnx.attach(network, adapted)
    assert model.features(X).shape == (6, 8)
    adapted = jlora.adapterize(nnx.state(tower := Tanh(nnx.Rngs(0)), nnx.Param), {".*": jlora.LoRA(rank=2)})
    with pytest.raises(ValueError, match="the function never reads the adapted leaf unread"):
        jlora.nnx.attach(tower, adapted)(X)
    assert jlora.nnx.attach(tower, adapted, unread="allow")(X).shape == (6, 4)
    with pytest.raises(ValueError, match="strict: the effective weight of w,"):
        jlora.nnx.attach(tower, adapted, unread="allow", strict=True)(X)


class Tanh(nnx.Module):
    """Reads one weight in a form that has no factors, and another not at all."""

    def __init__(self, rngs):
        self.w = nnx.Param(rngs.params.normal((4, 4)))
        self.unread = nnx.Param(rngs.params.normal((4, 4)))

    def __call__(self, x):
        return x @ jnp.tanh(self.w[...])
