"""XGBLoRA: layers are drawn together, and those that are not drawn stay as they are, to the bit, whatever the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora import paths


def masks(params, spec, seed=0):
    adapted = jlora.adapterize(params, spec, jax.random.key(seed))
    return {site.path: np.asarray(paths.lookup(adapted.frozen, site.keys)["mask"]) for site in adapted.plan.sites}


def stacked(layers=6):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.standard_normal((layers, 4, 4)), jnp.float32) for name in ("query", "value")}


def unstacked(layers=6):
    return {f"layers_{n}": {"query": jnp.eye(4), "value": jnp.eye(4)} for n in range(layers)} | {"head": jnp.eye(4)}


@pytest.mark.once
def test_the_layers_of_stacks_and_of_numbered_paths_are_drawn_as_one():
    stack = {"query|value": jlora.Axes("batch in out", jlora.XGBLoRA(layers=2))}
    seen = set()
    for seed in range(3):
        found = masks(stacked(), stack, seed)
        assert found["query"].tolist() == found["value"].tolist() and found["query"].sum() == 2
        seen.add(tuple(found["query"]))
    assert len(seen) > 1, "every key drew the same layers"
    found = masks(unstacked(), {r"layers_.*": jlora.XGBLoRA(layers=0.5)})
    for n in range(6):
        assert found[f"layers_{n}/query"] == found[f"layers_{n}/value"]
    assert sum(found.values()) == 6  # half of six layers, with two leaves each
    assert sum(masks(unstacked(), {".*": jlora.XGBLoRA(layers=1)}, seed=4).values()) in (1, 2)


@pytest.mark.once
def test_layers_that_are_not_drawn_do_not_move_by_a_bit():
    params = stacked()
    method = jlora.Chain(jlora.XGBLoRA(rank=1, alpha=2, layers=2), links=3, prune=0.5)
    adapted = jlora.adapterize(params, {"query|value": jlora.Axes("batch in out", method)}, jax.random.key(0))
    tx = jlora.optimizer(adapted, optax.adamw, 0.1, weight_decay=0.5)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 4)), jnp.float32)

    def loss(params):
        y = x
        for n in range(6):
            y = jnp.tanh(y @ params["query"][n]) + y @ params["value"][n]
        return jnp.mean(y**2)

    @jax.jit
    def step(adapted, state):
        gradient = jax.grad(lambda p: jlora.lift(loss)(adapted.replace(params=p)))(adapted.params)
        updates, state = tx.update(gradient, state, adapted.params)
        return adapted.replace(params=optax.apply_updates(adapted.params, updates)), state, gradient

    state, drawn = tx.init(adapted.params), []
    merge = jax.jit(jlora.merge)
    before = merge(adapted)
    for number in range(3):
        mask = np.asarray(adapted.frozen["query"]["mask"]) > 0
        drawn.append(mask)
        for _ in range(3):  # moments of the last link's layers are half there still
            adapted, state, gradient = step(adapted, state)
        after = merge(adapted)
        for name in ("query", "value"):
            for field in "ab":
                assert not np.any(gradient[name][field][~mask]), "a layer that was not drawn has a gradient"
            assert np.array_equal(after[name][~mask], before[name][~mask])
            assert all(np.any(after[name][n] != before[name][n]) for n in np.flatnonzero(mask))
        if number < 2:
            adapted, state = jlora.restart(adapted, state, tx, jax.random.key(10 + number))
            before = merge(adapted)
            moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 3]
            assert all(np.any(leaf) for leaf in moments), "no moment of the last link is left, so they prove nothing"
            for name in ("query", "value"):
                np.testing.assert_allclose(before[name], after[name], atol=1e-6)
    times = np.sum(drawn, axis=0)
    ranks = [np.linalg.matrix_rank(np.asarray(after["query"][n] - params["query"][n]), tol=1e-5) for n in range(6)]
    assert all(rank <= most for rank, most in zip(ranks, times)) and max(ranks) >= 1


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match=r"layers must be a number of layers \(1, 2, ..\) or a share .* got 1.5"):
        jlora.XGBLoRA(layers=1.5)
    with pytest.raises(ValueError, match=r'init must be "kaiming", "gaussian" or "orthonormal", got \'pissa\''):
        jlora.XGBLoRA(init="pissa")
    with pytest.raises(ValueError, match=r"asks for 9 layers, but w and the like are in 1"):
        jlora.adapterize({"w": jnp.eye(4)}, {"w": jlora.XGBLoRA(layers=9)})
    with pytest.raises(ValueError, match=r'RACLoRA\'s frozen must be "in" .* got \'left\''):
        jlora.RACLoRA(frozen="left")
    with pytest.raises(ValueError, match=r"RACLoRA's draw must be one of .* got 'uniform'"):
        jlora.RACLoRA(draw="uniform")
