"""LoRA-FA: ten steps of PEFT's optimizer, the gradient that the weight would have, and where the rule gets `a` from."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from descent import descend

import jlora

pytestmark = pytest.mark.once

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "lorafa.npz"))
LAYERS = ("up", "down")
RNG = np.random.default_rng(0)
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def fields(when, name):
    return {layer: {name: jnp.asarray(GOLDEN[f"{when}/{layer}/{name}"])} for layer in LAYERS}


def test_ten_steps_are_those_of_peft():
    adapted = jlora.adapterize({layer: GOLDEN[f"w/{layer}"] for layer in LAYERS}, {".*": jlora.LoRAFA(3, alpha=6)})
    assert jax.tree.map(jnp.shape, adapted.frozen) == jax.tree.map(jnp.shape, fields("before", "a"))
    adapted = adapted.replace(params=fields("before", "b"), frozen=fields("before", "a"))

    def model(params, x):
        return jnp.tanh(x @ params["up"] + GOLDEN["bias/up"]) @ params["down"] + GOLDEN["bias/down"]

    def outputs(p):
        return jlora.lift(model, strict=True)(adapted.replace(params=p), GOLDEN["x"])

    tx = jlora.optimizer(adapted, optax.adamw, 0.02, eps=1e-10, weight_decay=0.0)
    _, losses, _, after = descend(outputs, adapted.params, tx, steps=10)
    close(losses, GOLDEN["losses"])
    jax.tree.map(close, after, fields("after", "b"))


STACK = {"w": jnp.asarray(RNG.standard_normal((2, 8, 6)), jnp.float32), "other": jnp.ones(6)}


def stacked(**options):
    spec = {"w": jlora.Axes("batch in out", jlora.LoRAFA(3, alpha=6, **options)), "other": jlora.Full()}
    return jlora.adapterize(STACK, spec, key=jax.random.key(0))


def test_a_step_changes_each_matrix_as_the_weight_s_own_gradient_would_within_the_columns_of_a():
    adapted = stacked()
    direction = jnp.asarray(RNG.standard_normal((2, 8, 6)), jnp.float32)
    gradient = jax.grad(lambda p: jnp.sum(direction * jlora.merge(adapted.replace(params=p))["w"]))(adapted.params)
    tx = jlora.with_rules(adapted, optax.sgd(0.1))
    updates = tx.update(gradient, tx.init(adapted.params), adapted.params)[0]
    moved = jlora.merge(adapted.replace(params=optax.apply_updates(adapted.params, updates)))
    for matrix, base, wanted, a in zip(
        moved["w"], STACK["w"], np.asarray(direction, np.float64), adapted.frozen["w"]["a"]
    ):
        a = np.asarray(a, np.float64)
        close(matrix - base, -0.1 * a @ np.linalg.pinv(a) @ wanted)


def test_without_the_rule_b_is_trained_by_its_own_gradient():
    adapted = stacked(precondition=False)
    ones = jax.tree.map(jnp.ones_like, adapted.params)
    tx = jlora.optimizer(adapted, optax.sgd, 0.1)
    jax.tree.map(lambda step: close(step, -0.1), tx.update(ones, tx.init(ones), ones)[0])


def test_the_rule_is_the_same_where_the_adapters_are_traced():
    adapted = stacked()
    ones = jax.tree.map(jnp.ones_like, adapted.params)

    def first(adapted):
        tx = jlora.optimizer(adapted, optax.sgd, 0.1)
        return tx.update(ones, tx.init(ones), ones)[0]

    jax.tree.map(partial(close, rtol=1e-4), jax.jit(first)(adapted), first(adapted))


def test_the_gradients_that_are_given_stay_what_they_were():
    adapted = stacked()
    ones = jax.tree.map(jnp.ones_like, adapted.params)
    tx = jlora.optimizer(adapted, optax.sgd, 0.1)
    tx.update(ones, tx.init(ones), ones)
    assert all(np.all(leaf == 1) for leaf in jax.tree.leaves(ones))


def test_a_rule_without_the_constants_says_where_they_come_from():
    adapted = stacked()
    sites = tuple(site for site in adapted.plan.sites if isinstance(site.method, jlora.LoRAFA))
    tx = sites[0].method.optimizer_rule.wrap(optax.sgd(0.1), sites)
    with pytest.raises(
        ValueError, match=r"LoRAFA's rule lacks the frozen factors: make the optimizer by jlora.optimizer"
    ):
        tx.update(adapted.params, tx.init(adapted.params))


def test_the_frozen_factor_can_not_begin_anew_behind_the_optimizer():
    adapted = jlora.adapterize({"w": jnp.ones((8, 6))}, {"w": jlora.LoRAFA(3)})
    tx = jlora.optimizer(adapted, optax.sgd, 0.1)
    with pytest.raises(ValueError, match=r"^w: LoRAFA\(rank=3\) .* can't be restarted"):
        jlora.restart(adapted, tx.init(adapted.params), tx, jax.random.key(1))


def test_its_peft_files_are_those_of_lora(tmp_path):
    base = {"w": {"kernel": jnp.asarray(RNG.standard_normal((8, 6)), jnp.float32)}}
    adapted = jlora.adapterize(base, {"w/kernel": jlora.LoRAFA(3, alpha=6, scaling="rslora")})
    adapted = adapted.replace(params=jax.tree.map(lambda leaf: leaf + 0.5, adapted.params))
    jlora.save_peft(tmp_path, adapted, {"(?P<m>w)/kernel": "{m}"})
    found = jlora.load_peft(tmp_path, base, {"(?P<m>w)/kernel": "{m}"})
    assert [site.method for site in found.plan.sites] == [jlora.LoRA(3, 6.0, "rslora")]
    np.testing.assert_array_equal(found.params["w"]["kernel"]["a"], adapted.frozen["w"]["kernel"]["a"])
    np.testing.assert_array_equal(found.params["w"]["kernel"]["b"], adapted.params["w"]["kernel"]["b"])
    close(jlora.merge(found)["w"]["kernel"], jlora.merge(adapted)["w"]["kernel"])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"rank": 0}, "rank must be a positive whole number, got 0"),
        ({"scaling": "root"}, "scaling must be one of"),
        ({"precondition": 1}, "precondition must be True or False, got 1"),
    ],
)
def test_hyperparameters_that_can_not_be_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        jlora.LoRAFA(**wrong)
