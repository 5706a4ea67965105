"""Compressed deep linear networks: the authors' numbers, the start along the gradient, the two rates."""

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

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "deeplinear.npz"))
TARGET, MASK = (jnp.asarray(GOLDEN[name], jnp.float32) for name in ("target", "mask"))
BASE = {"w": jnp.zeros_like(TARGET)}
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def loss_fn(params, batch):
    """The mean over the entries that are seen of half the squared error."""
    target, mask = batch
    return 0.5 * jnp.sum((mask * (params["w"] - target)) ** 2) / jnp.sum(mask)


def started(method, base=BASE, batch=(TARGET, MASK)):
    spec = {"w": method}
    return jlora.adapterize(base, spec, prepared=jlora.prepare(base, spec, loss_fn, [batch]))


def factors(tree):
    """The factors from the input to the output."""
    return [np.asarray(tree["w"][name], np.float64) for name in sorted(tree["w"])]


def turned(found, start, wanted):
    """Our factors with the signs of the authors' singular vectors, which no SVD determines."""
    signs = np.sign(np.sum(start[0] * wanted[0], axis=0))
    first, *inner, last = found
    return [first * signs, *(signs[:, None] * f * signs for f in inner), signs[:, None] * last]


# Not Adam at depth 3: there the gradient of the square factor is diagonal, and Adam makes whole steps of rounding beside that.
@pytest.mark.parametrize(
    ("depth", "eps", "name", "factory", "rate"),
    [(2, 1.0, "gd", optax.sgd, 5.0), (2, 1.0, "adam", optax.adam, 0.01), (3, 0.1, "gd", optax.sgd, 5.0)],
)
def test_start_losses_and_ten_steps_are_those_of_the_authors(depth, eps, name, factory, rate):
    adapted = started(jlora.DeepLinear(rank=4, depth=depth, eps=eps))
    start, theirs, after = (
        [GOLDEN[f"{depth}/{when}/f{n}"] for n in range(1, depth + 1)] for when in ("start", "start", name)
    )
    jax.tree.map(close, turned(factors(adapted.params), factors(adapted.params), theirs), start)
    tx = jlora.optimizer(adapted, factory, rate)

    def loss(p):
        return jlora.lift(loss_fn)(adapted.replace(params=p), (TARGET, MASK))

    _, losses, _, found = descend(loss, adapted.params, tx, 10, loss=lambda y: y)
    close([losses[0], loss(found)], GOLDEN[f"{depth}/{name}/losses"])
    jax.tree.map(close, turned(factors(found), factors(adapted.params), theirs), after)


def test_the_start_goes_where_a_step_of_gradient_descent_would():
    adapted = started(jlora.DeepLinear(rank=3, eps=0.1))
    gradient = np.asarray(jax.grad(loss_fn)(BASE, (TARGET, MASK))["w"], np.float64)
    u, _, vt = np.linalg.svd(-gradient)
    close(jlora.merge(adapted)["w"], 1e-3 * u[:, :3] @ vt[:3])
    assert np.sum(gradient * np.asarray(jlora.merge(adapted)["w"])) < 0


def test_a_randomised_svd_starts_at_the_same_place():
    exact, fast = (started(jlora.DeepLinear(rank=2, eps=0.5, iterations=n), batch=(TARGET, 1)) for n in (0, 4))
    close(jlora.merge(fast)["w"], jlora.merge(exact)["w"], atol=1e-4)


@pytest.mark.parametrize(("gamma", "ratio"), [(2.0, 2.0), (0.5, 0.5), (1.0, 1.0)])
def test_the_outer_factors_learn_at_gamma_times_the_rate(gamma, ratio):
    adapted = started(jlora.DeepLinear(rank=2, depth=4, gamma=gamma))
    tx = jlora.optimizer(adapted, optax.sgd, 0.1)
    ones = jax.tree.map(jnp.ones_like, adapted.params)
    steps = {name: float(step.mean()) for name, step in tx.update(ones, tx.init(ones), ones)[0]["w"].items()}
    close([steps[name] / steps["f2"] for name in ("f1", "f2", "f3", "f4")], [ratio, 1, 1, ratio])


def test_the_update_grows_along_the_gradient_of_a_low_rank_target_and_nowhere_else():
    """On a target of rank 2 that is seen whole, all factors stay in its spaces, and it is recovered."""
    adapted = started(jlora.DeepLinear(rank=4, eps=0.1), batch=(TARGET, 1))
    tx = jlora.optimizer(adapted, optax.sgd, 0.02)

    def step(carry, _):
        loss = lambda p: 0.5 * jnp.sum((jlora.merge(adapted.replace(params=p))["w"] - TARGET) ** 2)
        updates, state = tx.update(jax.grad(loss)(carry[0]), carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    (p, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=1500))(adapted.params)
    found = np.asarray(jlora.merge(adapted.replace(params=p))["w"])
    np.testing.assert_allclose(found, TARGET, atol=5e-3)
    assert np.linalg.matrix_rank(found, tol=1e-2) == 2


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"depth": 1}, "depth must be an integer of at least 2, got 1"),
        ({"eps": 0.0}, "eps must be positive and finite, got 0.0"),
        ({"gamma": 0}, "gamma must be positive and finite, got 0"),
        ({"iterations": -1}, "iterations must be an integer of at least 0, got -1"),
    ],
)
def test_hyperparameters_that_can_not_be_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        jlora.DeepLinear(**wrong)


def test_matrices_that_can_not_be_adapted_are_refused_by_name():
    with pytest.raises(
        ValueError, match=r"^w, shape \(12, 9\): rank 10 is above the smaller side of the 12 x 9 matrix"
    ):
        started(jlora.DeepLinear(rank=10))
    half = {"w": BASE["w"].astype(jnp.float16)}
    with pytest.raises(
        ValueError, match="is zero in float16, and so are its gradients; use bfloat16 or float32 params"
    ):
        started(jlora.DeepLinear(rank=2, eps=1e-3), half)
    with pytest.raises(ValueError, match="prepare"):
        jlora.adapterize(BASE, {"w": jlora.DeepLinear(rank=2)})
