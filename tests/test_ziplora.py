"""ZipLoRA: gains of input features, their penalty, and the objective that trains them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.problems import normal, perturbed, weight

import jlora

pytestmark = pytest.mark.once

PARAMS = {"stack": weight(1, 2, 6, 8), "up": weight(2, 8, 4)}
UP, STACK = jlora.LoRA(2), jlora.LoRA(2, alpha=3)
X = [normal(seed, 5, 6) for seed in (3, 4)]
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def adapter(seed, up=UP, stack=STACK):
    spec = {"stack": jlora.Axes("batch in out", stack), "up": up}
    return perturbed(jlora.adapterize(PARAMS, spec, jax.random.key(0)), seed)


def model(params, x):
    return jnp.tanh(x @ params["stack"][0] + x @ params["stack"][1]) @ params["up"]


apply = jlora.lift(model)


def change(adapted):
    return {name: np.asarray(leaf - PARAMS[name]) for name, leaf in jlora.merge(adapted).items()}


def test_gains_multiply_the_input_features_of_each_adapter():
    one, two = adapter(1), adapter(2, up=None)  # the second leaves `up` alone
    pair = jlora.zip_adapters([one, two])
    assert jax.tree.map(jnp.shape, pair.gains) == [{"stack": (2, 6), "up": (8,)}, {"stack": (2, 6)}]
    assert all(jnp.all(gain == 1) for gain in jax.tree.leaves(pair.gains))
    gains = [{path: normal(n, *gain.shape) for path, gain in each.items()} for n, each in enumerate(pair.gains)]
    found, (first, second) = change(pair.replace(gains=gains).adapted()), (change(one), change(two))
    close(
        found["stack"], gains[0]["stack"][..., None] * first["stack"] + gains[1]["stack"][..., None] * second["stack"]
    )
    close(found["up"], gains[0]["up"][:, None] * first["up"])
    for number, wanted in enumerate((first, second)):
        jax.tree.map(close, change(pair.parent(number)), wanted)
    sizes = {site.path: site.method.rank for site in pair.adapted().plan.sites}
    assert sizes == {"stack": 4, "up": 2}


def test_the_penalty_is_that_of_the_paper_or_of_its_code():
    pair = jlora.zip_adapters([adapter(1), adapter(2), adapter(3, up=None)])
    gains = [{path: normal(n, *gain.shape) for path, gain in each.items()} for n, each in enumerate(pair.gains)]
    dot = mean = 0.0
    for n, m in ((0, 1), (0, 2), (1, 2)):
        for path in gains[n].keys() & gains[m].keys():
            met = np.asarray(gains[n][path] * gains[m][path])
            dot, mean = dot + np.abs(met.sum(-1)).sum(), mean + np.abs(met).mean(-1).sum()
    close(pair.replace(gains=gains).penalty(), dot)
    close(pair.replace(gains=gains).penalty("elementwise"), mean)
    with pytest.raises(ValueError, match="form must be one of"):
        pair.penalty("sum")


def test_the_objective_is_zero_where_each_does_alone_what_all_do_and_training_lowers_it():
    pair = jlora.zip_adapters([adapter(1), adapter(2)])
    alone = [jax.tree.map(jnp.ones_like, pair.gains[0]), jax.tree.map(jnp.zeros_like, pair.gains[1])]
    difference = apply(pair.parent(0), X[1]) - apply(pair.parent(1), X[1])
    close(pair.replace(gains=alone).loss(apply, X), np.mean(np.square(difference)))
    close(pair.loss(apply, X, 0.3) - pair.loss(apply, X, 0.0), 0.3 * pair.penalty())
    with pytest.raises(ValueError, match="wanted inputs for each of 2 adapters, got 1"):
        pair.loss(apply, X[:1])

    tx = optax.adam(0.02)
    objective = jax.value_and_grad(lambda gains, pair: pair.replace(gains=gains).loss(apply, X))

    @jax.jit
    def step(gains, state, pair):
        loss, gradients = objective(gains, pair)
        updates, state = tx.update(gradients, state)
        return optax.apply_updates(gains, updates), state, loss

    gains, state, losses = pair.gains, tx.init(pair.gains), []
    for _ in range(60):
        gains, state, loss = step(gains, state, pair)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert pair.replace(gains=gains).penalty() < 0.7 * pair.penalty()


def test_what_cannot_be_zipped_is_refused():
    with pytest.raises(ValueError, match="zip_adapters puts two adapters or more together, got 1"):
        jlora.zip_adapters([adapter(1)])
    with pytest.raises(TypeError, match="up: SineLoRA.* has no factors whose inputs could get gains"):
        jlora.zip_adapters([adapter(1), adapter(2, up=jlora.SineLoRA(2))])
    with pytest.raises(TypeError, match="up: Full.* has no factors"):
        jlora.zip_adapters([adapter(1, up=jlora.Full()), adapter(2)])
    other = adapter(2).replace(base=PARAMS | {"up": PARAMS["up"] + 1})
    with pytest.raises(ValueError, match="up: adapters 0 and 1 stand on different bases"):
        jlora.zip_adapters([adapter(1), other])
    turned = jlora.Axes("out in", jlora.LoRA(2))
    with pytest.raises(
        ValueError, match=r"up: adapter 1 reads its axes .* as \(\(\), \(1,\), \(0,\)\), not \(\(\), \(0,\), \(1,\)\)"
    ):
        jlora.zip_adapters([adapter(1), adapter(2, up=turned)])
