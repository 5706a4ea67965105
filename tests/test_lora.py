"""LoRA: what follows from its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) / 3, jnp.float32)


W, X = normal(0, 12, 8), normal(1, 5, 12)
FACTORS = {"a": normal(2, 12, 4), "b": normal(3, 4, 8)}


def product(params, x=X):
    return x @ params["w"]


def adapted_by(method, factors=None):
    adapted = jlora.adapterize({"w": W}, {"w": method})
    return adapted if factors is None else adapted.replace(params={"w": factors})


def delta(method, factors=FACTORS):
    return jlora.merge(adapted_by(method, factors))["w"] - W


def test_the_start_is_the_base():
    for init in ("default", "kaiming", "gaussian", "orthonormal", "orthogonal", "embedding", "olora", "pissa"):
        start = jlora.lift(product)(adapted_by(jlora.LoRA(rank=4, init=init)))
        np.testing.assert_allclose(start, X @ W, atol=1e-6)


def test_the_update_has_the_stated_rank_and_no_more():
    singular = jnp.linalg.svd(delta(jlora.LoRA(rank=4)), compute_uv=False)
    assert singular[3] > 1e-2
    assert jnp.all(singular[4:] < 1e-5)


def test_merged_equals_unmerged():
    adapted = adapted_by(jlora.LoRA(rank=4, alpha=7), FACTORS)
    np.testing.assert_allclose(jlora.lift(product)(adapted), product(jlora.merge(adapted)), rtol=1e-5, atol=1e-5)


class OnlyWeight(jlora.LoRA):
    def weight(self, view):
        return (super().weight(view) + view.w) / 2


class OnlyDoRAWeight(jlora.DoRA):
    def weight(self, view):
        return super().weight(view) / 2


@pytest.mark.parametrize("method", [OnlyWeight(4), jlora.DoRA(OnlyWeight(4)), OnlyDoRAWeight(jlora.LoRA(4))], ids=str)
def test_a_derived_class_that_changes_the_weight_alone_is_used_by_that_weight(method):
    adapted = adapted_by(method)
    adapted = adapted.replace(params={"w": {**adapted.params["w"], **FACTORS}})
    np.testing.assert_allclose(jlora.lift(product)(adapted), product(jlora.merge(adapted)), rtol=1e-5, atol=1e-5)


def test_twice_the_alpha_is_twice_the_update():
    doubled = delta(jlora.LoRA(rank=4, alpha=8))
    np.testing.assert_allclose(doubled, 2 * delta(jlora.LoRA(rank=4, alpha=4)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(doubled, 2 * FACTORS["a"] @ FACTORS["b"], rtol=1e-5, atol=1e-6)


def test_rslora_is_lora_times_the_root_of_the_rank():
    rslora, lora = (delta(jlora.LoRA(rank=4, alpha=4, scaling=scaling)) for scaling in ("rslora", "standard"))
    np.testing.assert_allclose(rslora, 2 * lora, rtol=1e-5, atol=1e-6)


def test_at_the_start_only_b_has_a_gradient():
    adapted = adapted_by(jlora.LoRA(rank=4))
    gradient = jax.grad(lambda p: jnp.sum(jnp.sin(jlora.lift(product)(adapted.replace(params=p)))))(adapted.params)["w"]
    assert jnp.all(gradient["a"] == 0)
    assert jnp.all(gradient["b"] != 0)


@pytest.mark.parametrize("shape", [(12, 8), (8, 8), (8, 20)])
def test_it_trains_rank_times_both_sides(shape):
    params = jax.eval_shape(lambda: jlora.adapterize({"w": jnp.zeros(shape)}, {"w": jlora.LoRA(rank=4)})).params
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 4 * sum(shape)


def test_a_zero_b_restores_the_base_bit_for_bit():
    adapted = adapted_by(jlora.LoRA(rank=4), {"a": FACTORS["a"], "b": jnp.zeros((4, 8))})
    assert np.array_equal(jlora.merge(adapted)["w"], W)
    assert np.array_equal(jlora.lift(product)(adapted), X @ W)


def test_orthogonal_starts_have_orthonormal_columns():
    a = adapted_by(jlora.LoRA(rank=4, init="orthonormal")).params["w"]["a"]
    np.testing.assert_allclose(a.T @ a, jnp.eye(4), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "LoRA's rank must be a positive integer, got 0"),
        ({"rank": 2.0}, "LoRA's rank must be a positive integer, got 2.0"),
        ({"alpha": 0}, "LoRA's alpha must be positive and finite, got 0"),
        ({"alpha": float("nan")}, "LoRA's alpha must be positive and finite, got nan"),
        ({"scaling": "root"}, "LoRA's scaling must be one of .*'rslora'.*, got 'root'"),
        ({"init": "pissa2"}, "LoRA's init must be one of .*'gaussian'.*, got 'pissa2'"),
        ({"dropout": 1.0}, "LoRA's dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, "LoRA's dropout must be at least 0 and below 1, got -0.1"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jlora.LoRA(**options)
