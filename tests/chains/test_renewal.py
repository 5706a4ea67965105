"""What a restart does to an optimizer's state, whatever optimizer it is; and ReLoRA's jagged schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import jlora
from jlora.core.protocol.renewal import Renewal
from jlora.optimize.moments import renewed

PARAMS = {"stack": jnp.ones((3, 4, 5)), "head": jnp.ones((4, 4))}


def state_of(tx, seed=0):
    """A state with random moments and counts of 9, and the adapted params."""
    spec = {"stack": jlora.Axes("batch in out", jlora.LoRA(2)), "head": jlora.Full()}
    adapted = jlora.adapterize(PARAMS, spec)
    state, rng = tx(adapted).init(adapted.params), np.random.default_rng(seed)
    fill = lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype) if x.ndim else jnp.full_like(x, 9)
    return adapted, jax.tree.map(fill, state)


def anew(tx, prune=1.0, by="random"):
    adapted, state = state_of(tx)
    sites = tuple(site for site in adapted.plan.sites if site.path == "stack")
    return state, renewed(tx(adapted), state, adapted.params, sites, Renewal(prune, by), jax.random.key(1))


def by_path(state):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


@pytest.mark.parametrize(
    ("tx", "begin", "go_on"),
    [
        (lambda a: optax.adamw(optax.constant_schedule(0.1)), {"[0].count"}, {"[2].count"}),
        (lambda a: optax.sgd(optax.constant_schedule(0.1), momentum=0.9), set(), {"[1].count"}),
        (lambda a: optax.lion(0.1), {"[0].count"}, set()),
        (lambda a: optax.adafactor(0.1), {"[0].count"}, set()),
        (lambda a: optax.adan(0.1), {"[0].t"}, set()),
        (lambda a: optax.contrib.prodigy(1.0), {".count", ".numerator_weighted"}, {".estim_lr"}),
        (
            lambda a: optax.MultiSteps(optax.inject_hyperparams(optax.adam)(learning_rate=0.1), 2),
            {".inner_opt_state.inner_state[0].count"},
            {".inner_opt_state.count", ".gradient_step"},
        ),
    ],
    ids=["adamw", "sgd", "lion", "adafactor", "adan", "prodigy", "multisteps"],
)
def test_moments_of_restarted_leaves_begin_anew_with_their_counts(tx, begin, go_on):
    state, new = map(by_path, anew(tx))
    fresh = by_path(tx(None).init(state_of(tx)[0].params))
    assert begin | go_on <= set(state)
    for path, leaf in new.items():
        restarted = "['stack']" in path or path in begin
        np.testing.assert_array_equal(leaf, fresh[path] if restarted else state[path], err_msg=path)


@pytest.mark.once
@pytest.mark.parametrize("by", ["random", "magnitude"])
def test_pruned_moments_keep_a_share_and_the_counts_go_on(by):
    state, new = map(by_path, anew(lambda a: optax.adam(0.1), 0.75, by))
    assert new["[0].count"] == 9
    for path, leaf in new.items():
        if "stack" not in path:
            np.testing.assert_array_equal(leaf, state[path], err_msg=path)
        elif by == "magnitude":
            deciding = state[path.replace(".nu", ".mu")]  # of both: a mean without its square would step without bound
            for old, order, found in zip(state[path], deciding, leaf):  # matrix by matrix
                kept = sorted(range(old.size), key=lambda n, x=order: -abs(x.ravel()[n]))[: round(0.25 * old.size)]
                wanted = np.zeros(old.size, np.float32)
                wanted[kept] = old.ravel()[kept]
                np.testing.assert_array_equal(found.ravel(), wanted)
    for field in "ab":
        mu, nu = (new[f"[0].{name}['stack']['{field}']"] for name in ("mu", "nu"))
        np.testing.assert_array_equal(mu == 0, nu == 0)
        np.testing.assert_array_equal(mu[mu != 0], state[f"[0].mu['stack']['{field}']"][mu != 0])
        assert 0 < np.mean(mu != 0) < 0.6


def test_the_jagged_schedule_rises_anew_after_each_restart():
    cosine, restarts, warmup = optax.cosine_decay_schedule(2.0, 20, alpha=0.1), [6, 13], 3
    schedule = jax.jit(jax.vmap(jlora.restart_schedule(cosine, restarts, warmup)))

    def by_hand(step):
        for start in restarts:
            if start <= step < start + warmup:
                peak = 2 * (0.9 * 0.5 * (1 + np.cos(np.pi * (start + warmup) / 20)) + 0.1)
                return peak * (step - start + 1) / warmup
        return 2 * (0.9 * 0.5 * (1 + np.cos(np.pi * step / 20)) + 0.1)

    np.testing.assert_allclose(schedule(jnp.arange(20)), [by_hand(step) for step in range(20)], rtol=1e-6)
    assert jlora.restart_schedule(cosine, [], 3) is cosine
    with pytest.raises(ValueError, match=r"wants ascending restarts and a warmup of 0 or more, got \[5, 2\]"):
        jlora.restart_schedule(cosine, [5, 2], 1)
