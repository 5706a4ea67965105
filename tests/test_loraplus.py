"""LoRA+: which trained array learns at which rate and decays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.core.protocol.method import Start
from jlora.optimize.optimizer import labels

pytestmark = pytest.mark.once


def model(params, tokens):
    x = jnp.take(params["embedding"], tokens, axis=0)
    x = jnp.tanh(x @ params["up"]["kernel"] * params["norm"] + params["up"]["bias"])
    return jnp.tanh(x @ params["down"]) @ params["head"]


PARAMS = {
    "embedding": jnp.ones((11, 6)),
    "up": {"kernel": jnp.eye(6), "bias": jnp.ones(6)},
    "norm": jnp.ones(6),
    "down": jnp.eye(6),
    "head": jnp.ones((6, 3)),
}
SPEC = {
    "embedding|up/kernel": jlora.LoRA(rank=2, init="default"),
    "down": jlora.DoRA(jlora.LoRA(rank=2)),
    ".*": jlora.Full(),
}
TOKENS = jnp.array([1, 2])
WANTED = {
    "embedding": {"a": "embedding", "b": "embedding"},
    "up": {"kernel": {"a": "a", "b": "b"}, "bias": {"w": "vector"}},
    "norm": {"w": "vector"},
    "down": {"a": "a", "b": "b", "m": "vector"},
    "head": {"w": "a"},
}


@pytest.fixture(scope="module")
def adapted():
    return jlora.adapterize(PARAMS, SPEC, sites=jlora.sites(model, PARAMS, TOKENS))


def updates(adapted, tx, steps=1):
    """What each trained array is changed by, with gradients of ones."""
    p, state = adapted.params, tx.init(adapted.params)
    ones = jax.tree.map(jnp.ones_like, p)
    for _ in range(steps):
        change, state = tx.update(ones, state, p)
        p = optax.apply_updates(p, change)
    return jax.tree.map(lambda new, old: new - old, p, adapted.params)


def test_every_trained_array_is_in_the_group_that_loraplus_gives_it(adapted):
    assert labels(adapted) == WANTED


@pytest.mark.parametrize("factory", [optax.sgd, optax.adam])
def test_b_moves_ratio_times_as_far_as_a(adapted, factory):
    change = updates(adapted, jlora.optimizer(adapted, factory, learning_rate=1e-3, ratio=16))
    for product in (change["up"]["kernel"], change["down"]):
        np.testing.assert_allclose(jnp.abs(product["a"]), 1e-3, rtol=1e-3)
        np.testing.assert_allclose(jnp.abs(product["b"]), 16e-3, rtol=1e-3)
    np.testing.assert_allclose(jnp.abs(change["head"]["w"]), 1e-3, rtol=1e-3)
    for vector in (change["up"]["bias"]["w"], change["norm"]["w"], change["down"]["m"]):
        np.testing.assert_allclose(jnp.abs(vector), 16e-3, rtol=1e-3)


def test_embedding_factors_move_at_1e_6_or_at_the_rate_that_is_given(adapted):
    default = updates(adapted, jlora.optimizer(adapted, optax.sgd, learning_rate=1e-3, ratio=16))
    np.testing.assert_allclose(default["embedding"]["a"], -1e-6, rtol=1e-3)
    given = updates(
        adapted, jlora.optimizer(adapted, optax.sgd, learning_rate=1e-3, ratio=16, embedding_learning_rate=0.5)
    )
    np.testing.assert_allclose(given["embedding"]["b"], -0.5, rtol=1e-3)


def test_ratio_1_without_decay_is_the_plain_optimizer_bit_for_bit(adapted):
    rates = {"learning_rate": 1e-3, "embedding_learning_rate": 1e-3}
    ours = updates(adapted, jlora.optimizer(adapted, optax.adamw, ratio=1, weight_decay=0.0, **rates), steps=3)
    plain = updates(adapted, optax.adamw(1e-3, weight_decay=0.0), steps=3)
    jax.tree.map(np.testing.assert_array_equal, ours, plain)


def test_without_a_ratio_only_the_decay_of_vectors_differs_from_the_plain_optimizer(adapted):
    ours = updates(adapted, jlora.optimizer(adapted, optax.adamw, learning_rate=1e-3, weight_decay=0.1), steps=3)
    decayed = updates(adapted, optax.adamw(1e-3, weight_decay=0.1), steps=3)
    free = updates(adapted, optax.adamw(1e-3, weight_decay=0.0), steps=3)
    groups = jax.tree.leaves(labels(adapted))
    assert set(groups) == {"a", "b", "vector", "embedding"}
    for group, mine, with_decay, without in zip(groups, *map(jax.tree.leaves, (ours, decayed, free)), strict=True):
        np.testing.assert_array_equal(mine, without if group == "vector" else with_decay)


def test_a_schedule_is_scaled_too(adapted):
    schedule = optax.linear_schedule(1e-3, 0, 2)
    change = updates(adapted, jlora.optimizer(adapted, optax.sgd, learning_rate=schedule, ratio=4), steps=2)
    np.testing.assert_allclose(change["up"]["kernel"]["a"], -1.5e-3, rtol=1e-2)
    np.testing.assert_allclose(change["up"]["kernel"]["b"], -6e-3, rtol=1e-3)


def test_a_ratio_that_is_not_positive_is_refused(adapted):
    with pytest.raises(ValueError, match="LoRA\\+'s ratio must be positive, got 0"):
        jlora.optimizer(adapted, optax.adamw, learning_rate=1e-3, ratio=0)


def test_options_that_the_factory_does_not_know_are_refused_by_it(adapted):
    with pytest.raises(TypeError, match="weight_decay"):
        jlora.optimizer(adapted, optax.sgd, learning_rate=1e-3, weight_decay=0.1)


def test_a_trained_array_that_is_no_methods_is_refused_by_name(adapted):
    message = "more/bias: this trained array is no method's, and so has no learning rate; adapt its leaf by jlora.Full"
    more = {**adapted.params, "more": {"bias": jnp.ones(2)}}
    for make in (labels, lambda a: jlora.optimizer(a, optax.adam, 1e-3)):
        with pytest.raises(ValueError, match=message):
            make(adapted.replace(params=more))
    tx = jlora.optimizer(adapted, optax.adam, 1e-3)
    with pytest.raises(ValueError, match=message):
        tx.init(more)
    with pytest.raises(ValueError, match=message):
        tx.update(more, tx.init(adapted.params), more)
    nothing = jlora.adapterize({"w": jnp.ones(2)}, {})
    with pytest.raises(ValueError, match=message):
        jlora.optimizer(nothing, optax.adam, 1e-3).init({"more": {"bias": jnp.ones(2)}})


def test_an_array_beside_the_adapters_is_trained_by_an_optimizer_of_its_own(adapted):
    more = {**adapted.params, "more": jnp.ones(2)}
    whose = {**dict.fromkeys(adapted.params, "adapters"), "more": "rest"}
    tx = optax.partition({"adapters": jlora.optimizer(adapted, optax.sgd, 1e-3), "rest": optax.sgd(0.5)}, whose)
    change, _ = tx.update(more, tx.init(more), more)
    np.testing.assert_allclose(change["more"], -0.5)
    jax.tree.map(lambda u, p: np.testing.assert_allclose(u, -1e-3 * p), {**change, "more": 0.0}, {**more, "more": 0.0})


class Forgetful(jlora.LoRA):
    """Trains a field that its axes, and so its labels, don't name."""

    def start(self, key, w, site):
        start = super().start(key, w, site)
        return Start({**start.params, "gain": jnp.ones(w.shape[1])})


def test_a_field_without_a_label_is_refused_by_name():
    adapted = jlora.adapterize({"w": jnp.ones((4, 3))}, {"w": Forgetful(2)})
    with pytest.raises(
        ValueError, match="w/gain: Forgetful.*trains this array but gives it no learning-rate group: name it"
    ):
        jlora.optimizer(adapted, optax.adam, 1e-3)
