"""The penalty as a loss of one's own: the value and the gradient of what AdaLoRA's and ElaLoRA's transformation adds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.problems import jit, perturbed, weight

import jlora
from jlora.optimize.allocate import orthogonality, triplets

BASE = {"p": weight(0, 8, 6), "stack": weight(1, 2, 6, 8), "head": jnp.zeros(3)}
PHASES = {"steps": 9, "orthogonality": 0.3}
METHODS = {"AdaLoRA": jlora.AdaLoRA(3, 2, **PHASES), "ElaLoRA": jlora.ElaLoRA(2, max_rank=4, interval=3, **PHASES)}


def adapted(method):
    spec = {"p": method, "stack": jlora.Axes("batch in out", method), "head": jlora.Full()}
    return jlora.adapterize(BASE, spec)


@pytest.mark.once
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_value_and_gradient_are_those_of_the_penalty_inside_the_transformation(method):
    start = adapted(method)
    moved = perturbed(start, size=0.1)
    unused = jax.tree.map(lambda x, y: np.where(x == 0, x, y), start.params, moved.params)
    params = unused if type(method) is jlora.ElaLoRA else moved.params  # ranks out of use stay zero
    factors = triplets.read(params, [site for site in start.plan.sites if site.path != "head"])
    tx = jlora.with_rules(start, optax.sgd(1.0))

    @jit
    def both(params, factors):
        own = jax.value_and_grad(lambda p: jlora.losses.orthogonality(start.replace(params=p), 0.3))(params)
        inside = orthogonality.penalty(factors, [jnp.any(f.a != 0, axis=-2) for f in factors], 0.3)
        return *own, inside, tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)[0]

    value, gradient, wanted, updates = both(params, factors)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    for name in ("p", "stack"):
        for field in "ab":
            assert np.any(gradient[name][field] != 0)
            np.testing.assert_allclose(-updates[name][field], gradient[name][field], rtol=1e-4, atol=1e-6)
    assert not np.any(gradient["head"]["w"]) and value > 0


def test_lora_at_its_start_and_orthonormal_factors_have_finite_gradients():
    start = jlora.adapterize({"p": BASE["p"]}, {"p": jlora.DoRA(jlora.LoRA(2))})
    orthonormal = {"p": {**start.params["p"], "a": jnp.eye(8)[:, :2], "b": jnp.eye(6)[:2]}}
    loss = jit(jax.value_and_grad(lambda p: jlora.losses.orthogonality(start.replace(params=p))))
    value, gradient = loss(start.params)
    assert value > 0 and np.any(gradient["p"]["a"] != 0) and not np.any(gradient["p"]["b"])
    value, gradient = loss(orthonormal)
    assert value < 1e-5 and not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_where_nothing_has_such_factors_it_says_so():
    alone = jlora.adapterize({"head": BASE["head"]}, {"head": jlora.Full()})
    with pytest.raises(
        ValueError, match=r"orthogonality is about trained factors .* has any \(Full\(\)\); leave this term"
    ):
        jlora.losses.orthogonality(alone)
