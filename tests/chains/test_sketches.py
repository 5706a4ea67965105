"""RAC-LoRA against its theory in numpy: projected steps, full gradient descent at full rank, and a chain that converges."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora

RNG = np.random.default_rng(3)


def link(method, w, gradient, rate, key):
    """One plain gradient step of one link from `w`; returns the base of the next link and the random factor."""
    adapted = jlora.adapterize({"w": jnp.asarray(w, jnp.float32)}, {"w": method}, key)
    (trained,) = adapted.params["w"]
    (basis,) = adapted.frozen["w"].values()
    other = np.asarray(basis, np.float64)
    slope = method.scale * (other.T @ gradient if trained == "b" else gradient @ other.T)
    fields = {"w": {trained: adapted.params["w"][trained] - rate * jnp.asarray(slope, jnp.float32)}}
    return np.asarray(jlora.merge(adapted.replace(params=fields))["w"], np.float64), other


@pytest.mark.once
@pytest.mark.parametrize(("frozen", "rank"), [("in", 2), ("out", 3), ("out", 4)])
def test_one_step_of_an_orthonormal_link_is_the_projected_gradient_step(frozen, rank):
    w, gradient = RNG.standard_normal((2, 6, 4))
    method = jlora.RACLoRA(rank, alpha=3, frozen=frozen, draw="orthonormal")
    found, basis = link(method, w, gradient, 0.1 / method.scale**2, jax.random.key(rank))
    if frozen == "in":
        projector = basis @ np.linalg.pinv(basis.T @ basis) @ basis.T
        wanted = w - 0.1 * projector @ gradient
    else:
        projector = basis.T @ np.linalg.pinv(basis @ basis.T) @ basis
        wanted = w - 0.1 * gradient @ projector
    np.testing.assert_allclose(projector @ projector, projector, atol=1e-6)
    assert np.trace(projector) == pytest.approx(rank, abs=1e-5)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    if rank == 4 and frozen == "out":  # the whole side: full gradient descent
        np.testing.assert_allclose(found, w - 0.1 * gradient, atol=1e-6)


@pytest.mark.once
def test_gaussian_columns_have_about_unit_length_and_come_from_the_key():
    params, key = {"w": jnp.zeros((400, 300))}, jax.random.key(1)
    for frozen, field, axis in (("in", "a", 0), ("out", "b", 1)):
        spec = {"w": jlora.RACLoRA(8, frozen=frozen)}
        drawn, again, other = (
            np.asarray(jlora.adapterize(params, spec, k).frozen["w"][field]) for k in (key, key, jax.random.key(2))
        )
        np.testing.assert_allclose(np.linalg.norm(drawn, axis=axis), 1.0, atol=0.2)
        assert np.array_equal(drawn, again) and not np.any(drawn == other)


def test_the_random_factor_is_not_in_the_optimizers_state():
    adapted = jlora.adapterize({"w": jnp.zeros((64, 16))}, {"w": jlora.RACLoRA(4)})
    state = jlora.optimizer(adapted, optax.adamw, 1e-3).init(adapted.params)
    assert {leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim} == {(4, 16)}


@pytest.mark.once
def test_a_chain_of_sketches_converges_on_a_quadratic_where_one_sketch_stalls():
    """f(w) = wᵀ D w / 2 with D = diag(10, 1, .., 1): rank 1 of 9, one step of 1 / L a link, against a loop in numpy."""
    curvature, links = np.array([10.0, *[1.0] * 8])[:, None], 700
    method = jlora.RACLoRA(1, alpha=1, frozen="in", draw="orthonormal")
    params, tx = {"w": jnp.ones((9, 1))}, optax.sgd(0.1)
    adapted = jlora.adapterize(params, {"w": method}, jax.random.key(0))

    def value(adapted, p):
        w = jlora.merge(adapted.replace(params=p))["w"]
        return jnp.sum(w * jnp.asarray(curvature, jnp.float32) * w) / 2

    def step(carry, again):
        adapted, state, key = carry
        updates, state = tx.update(jax.grad(lambda p: value(adapted, p))(adapted.params), state, adapted.params)
        adapted = adapted.replace(params=optax.apply_updates(adapted.params, updates))
        key, own = jax.random.split(key)
        after, fresh = jlora.restart(adapted, state, tx, own)
        chosen = jax.tree.map(lambda x, y: jnp.where(again, x, y), (after, fresh), (adapted, state))
        return (*chosen, key), (value(adapted, adapted.params), carry[0].frozen["w"]["a"])

    def run(again):
        carry = (adapted, tx.init(adapted.params), jax.random.key(1))
        return jax.lax.scan(lambda c, _: step(c, again), carry, length=links)[1]

    (chain, stuck), bases = jax.jit(jax.vmap(run))(jnp.array([True, False]))
    w, wanted = np.ones((9, 1)), []
    for basis in np.asarray(bases[0], np.float64):
        w = w - 0.1 * basis @ (basis.T @ (curvature * w))
        wanted.append(np.sum(w * curvature * w) / 2)
    np.testing.assert_allclose(chain[:200], wanted[:200], rtol=1e-3)
    assert chain[-1] < 1e-4 * chain[0], "the chain did not converge"
    assert stuck[-1] > 0.3 * chain[0] and stuck[-1] == pytest.approx(float(stuck[-200]), rel=1e-3)
