"""`jlora.linen.Lifted`: a Linen module whose params are base and adapters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora

X = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4)), jnp.float32)
SPEC = {jlora.ALL_LINEAR: jlora.LoRA(rank=2), "head/bias": jlora.Full()}
KEY = jax.random.key(0)


class Model(nn.Module):
    """Batch statistics, dropout and a sown value beside the params."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8, name="up")(x))
        self.sow("intermediates", "mean", x.mean())
        return nn.Dense(3, name="head")(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


@pytest.fixture(scope="module")
def made():
    lifted = jlora.linen.Lifted(Model(), SPEC)
    return lifted, jax.jit(lifted.init)(KEY, X)


def below(name, variables):
    """What the variables hold of one of the two."""
    return {collection: held[name] for collection, held in variables.items() if name in held}


def test_the_params_are_base_and_lora_and_the_start_is_the_models(made):
    lifted, variables = made
    assert jax.tree.structure(below("base", variables)) == jax.tree.structure(jax.eval_shape(Model().init, KEY, X))
    assert sorted(variables["params"]["lora"]) == ["head", "up"]
    plain = jax.jit(Model().apply)(below("base", variables), X)
    assert np.array_equal(jax.jit(lifted.apply)(variables, X), plain)


def test_only_the_adapters_get_gradients_and_state_and_merged_params_give_the_same(made):
    lifted, variables = made
    tx = optax.partition({"lora": optax.adam(0.1), "base": optax.set_to_zero()}, {"base": "base", "lora": "lora"})

    @jax.jit
    def step(params, state):
        loss = lambda p: jnp.mean((lifted.apply({**variables, "params": p}, X) - 1) ** 2)
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, grads["base"]

    params, state = variables["params"], tx.init(variables["params"])
    values = []
    for _ in range(3):
        params, state, value, base_grads = step(params, state)
        values.append(float(value))
    assert values[-1] < values[0]
    assert not any(leaf.any() for leaf in jax.tree.leaves(base_grads))
    assert all(map(np.array_equal, jax.tree.leaves(params["base"]), jax.tree.leaves(variables["params"]["base"])))
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(leaf.size for leaf in arrays) == 2 * sum(leaf.size for leaf in jax.tree.leaves(params["lora"]))

    trained = {**variables, "params": params}
    merged = {**below("base", trained), "params": lifted.apply(trained, X, method="merged")}
    got = jax.jit(lifted.apply)(trained, X)
    np.testing.assert_allclose(got, jax.jit(Model().apply)(merged, X), rtol=1e-5, atol=1e-6)
    adapted = lifted.apply(trained, X, method="adapted")
    assert [site.path for site in adapted.plan.sites] == ["head/bias", "up/kernel"]


@pytest.mark.once
def test_other_collections_and_random_streams_are_the_models_own(made):
    lifted, variables = made
    options = {"train": True, "mutable": ["batch_stats", "intermediates"]}
    rngs = {"dropout": jax.random.key(1)}
    out, changed = lifted.apply(variables, X, **options, rngs=rngs)
    plain, wanted = Model().apply(below("base", variables), X, **options, rngs={"dropout": jax.random.key(1)})
    assert not np.array_equal(out, lifted.apply(variables, X, **options, rngs={"dropout": jax.random.key(2)})[0])
    assert out.shape == plain.shape
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5), below("base", changed), wanted)


@pytest.mark.once
def test_adapters_start_from_given_params_and_a_stream_switches_their_dropout_on(made):
    variables = below("base", made[1])
    lifted = jlora.linen.Lifted(Model(), {"up/kernel": jlora.LoRA(rank=2, init="random", dropout=0.5)})
    given = {collection: {"base": held} for collection, held in variables.items()}
    started = lifted.apply(given, X, rngs={"params": KEY}, mutable=True)[1]
    assert all(
        map(np.array_equal, jax.tree.leaves(below("base", started)["params"]), jax.tree.leaves(variables["params"]))
    )
    assert started["params"]["lora"]["up"]["kernel"]["a"].shape == (4, 2)
    one, other = (lifted.apply(started, X, rngs={"dropout": jax.random.key(n)}) for n in (1, 2))
    assert not np.array_equal(one, other)


@pytest.mark.once
def test_constants_are_a_collection_that_a_call_asks_for():
    lifted = jlora.linen.Lifted(nn.Dense(3), {"kernel": jlora.VeRA(rank=2)})
    variables = jax.jit(lifted.init)(KEY, X)
    assert sorted(variables) == ["lora_constants", "params"]
    with pytest.raises(
        ValueError,
        match="lora_constants/~shared/VeRA/a would be .4, 2., but is None; name the leaves .* pass the collection",
    ):
        lifted.apply({"params": variables["params"]}, X)


@pytest.mark.once
def test_what_can_not_be_adapted_is_refused(made):
    lifted, variables = made
    with pytest.raises(TypeError, match="Lifted takes a Linen module, got function"):
        jlora.linen.Lifted(lambda x: x, SPEC).init(KEY, X)
    with pytest.raises(ValueError, match="'nothing' matches no leaf"):
        jax.eval_shape(jlora.linen.Lifted(nn.Dense(3), {"nothing": jlora.LoRA(2)}).init, KEY, X)
    with pytest.raises(ValueError, match=r'are \{"base": …, "lora": …\}, got \[\'BatchNorm_0\', \'head\', \'up\'\]'):
        lifted.apply(below("base", variables), X)
    with pytest.raises(TypeError, match="a spec maps patterns to methods"):
        jax.eval_shape(jlora.linen.Lifted(nn.Dense(3), jlora.LoRA(2)).init, KEY, X)
