"""Optimizers by name: each takes the steps of optax's own, matrix by matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import muon

import jlora
from jlora.training.run.schedule import make_optimizer
from jlora.training.settings.defaults import resolve
from jlora.training.settings.fields import Settings

pytestmark = pytest.mark.once

RATE, DECAY = 0.1, 0.2


def adapted():
    draw = lambda *shape: jnp.asarray(np.random.default_rng(shape).standard_normal(shape), jnp.float32)
    params = {"layers": {"kernel": draw(3, 8, 6)}, "head": {"kernel": draw(8, 5), "bias": draw(5)}}
    spec = {"layers/kernel": jlora.Axes("batch in out", jlora.DoRA(jlora.LoRA(rank=2))), "head/.*": jlora.Full()}
    return jlora.adapterize(params, spec)


def steps(tx, params, count=3):
    """Updates of some steps with gradients that follow from the arrays' shapes and the step."""
    state, found = tx.init(params), []
    update = jax.jit(tx.update)
    for number in range(count):
        draw = lambda leaf, number=number: jnp.asarray(
            np.random.default_rng((number, *leaf.shape)).standard_normal(leaf.shape), jnp.float32
        )
        updates, state = update(jax.tree.map(draw, params), state, params)
        params = optax.apply_updates(params, updates)
        found.append(updates)
    return found


def by_name(name):
    whole = adapted()
    settings = Settings(
        learning_rate=RATE, warmup=0, steps=9, schedule="constant", weight_decay=DECAY, clip=0.0, optimizer=name
    )
    params = jax.tree.map(jnp.ones_like, whole.params)
    return steps(make_optimizer(whole, settings), params), params


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("lion", lambda decay: optax.lion(RATE, weight_decay=decay)),
        (
            "adafactor",
            lambda decay: optax.chain(
                optax.adafactor(RATE, multiply_by_parameter_scale=False), optax.add_decayed_weights(-RATE * decay)
            ),
        ),
    ],
)
def test_steps_are_optax_own_and_vectors_do_not_decay(name, make):
    found, params = by_name(name)
    for field, decay in (("a", DECAY), ("m", 0.0)):
        wanted = steps(make(decay), params["layers"]["kernel"][field])
        for ours, theirs in zip(found, wanted):
            np.testing.assert_allclose(ours["layers"]["kernel"][field], theirs, rtol=1e-5, atol=1e-7)


def test_muon_makes_the_steps_of_each_matrix_of_a_stack_by_itself_and_adamw_those_of_vectors():
    found, params = by_name("muon")
    for field in "ab":
        stack = params["layers"]["kernel"][field]
        draw = lambda number, shape=stack.shape: np.random.default_rng((number, *shape)).standard_normal(shape)
        tx = muon(RATE, weight_decay=DECAY, consistent_rms=0.2)
        for layer in range(3):
            alone = stack[layer]
            state = tx.init(alone)
            for number in range(3):
                update, state = tx.update(jnp.asarray(draw(number)[layer], jnp.float32), state, alone)
                alone = alone + update
                np.testing.assert_allclose(found[number]["layers"]["kernel"][field][layer], update, atol=2e-5)
    wanted = steps(optax.nadamw(RATE, weight_decay=0.0), params["layers"]["kernel"]["m"])
    for ours, theirs in zip(found, wanted):
        np.testing.assert_allclose(ours["layers"]["kernel"]["m"], theirs, rtol=1e-5)


def test_lion_has_lower_rates_than_the_others():
    rates = {name: resolve(Settings(optimizer=name)).learning_rate for name in ("adamw", "lion", "adafactor", "muon")}
    assert rates == {"adamw": 1e-2, "lion": pytest.approx(3e-3), "adafactor": 1e-2, "muon": 1e-2}
