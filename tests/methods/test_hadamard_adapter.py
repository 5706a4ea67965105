"""The Hadamard adapter: numpy's formula in values, gradients and ten steps; the bias it is merged into; its two stages."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.problems import close as near
from contract.problems import jit, normal, perturbed, weight
from descent import descend
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jlora
from jlora import Hadamard
from jlora.models.merged import lazily_merged

pytestmark = pytest.mark.once

close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
X, W, BIAS, TARGET = (
    np.asarray(a, np.float64) for a in (normal(1, 9, 6), weight(2, 6, 5), normal(3, 5), normal(4, 9, 5))
)


def fn(params, x):
    return x @ params["kernel"] + params["bias"]


def by_numpy(side, g, b, rate, steps):
    """The output at the start, and `g`, `b` and the losses of steps of gradient descent on the mean squared error."""
    losses, first = [], None
    for _ in range(steps):
        y = (X @ W + BIAS) * g + b if side == "output" else np.einsum("ti,io->to", X * g[None] + b[None], W) + BIAS
        first = y if first is None else first
        losses.append(np.mean((y - TARGET) ** 2))
        slope = 2 * (y - TARGET) / y.size
        slope, a = (slope, X @ W + BIAS) if side == "output" else (slope @ W.T, X)
        g, b = g - rate * np.sum(slope * a, axis=0), b - rate * np.sum(slope, axis=0)
    return first, g, b, losses


@pytest.mark.parametrize("side", ["output", "input"])
def test_output_gradients_and_ten_steps_are_those_of_numpy(side):
    base = {"kernel": jnp.asarray(W, jnp.float32), "bias": jnp.asarray(BIAS, jnp.float32)}
    adapted = perturbed(jlora.adapterize(base, {"kernel": Hadamard(side)}))
    output = lambda p: jlora.lift(fn)(adapted.replace(params=p), jnp.asarray(X, jnp.float32))
    loss = lambda y: jnp.mean((y - TARGET) ** 2)
    y, losses, _, after = descend(output, adapted.params, optax.sgd(0.5), 10, loss)
    first, *wanted = by_numpy(side, *(np.asarray(adapted.params["kernel"][n], np.float64) for n in "gb"), 0.5, 10)
    close(y[0], first)
    jax.tree.map(close, [after["kernel"]["g"], after["kernel"]["b"], list(losses)], wanted)


def layers(params, x):
    def layer(x, one):
        return jnp.tanh(x @ one["kernel"] + one["bias"]), None

    return jax.lax.scan(jax.checkpoint(layer), x, params)[0]


@pytest.mark.parametrize("side", ["output", "input"])
def test_merged_weights_and_biases_of_stacked_layers_do_what_the_adapter_does(side, tmp_path):
    params, x = {"kernel": weight(0, 3, 6, 6), "bias": normal(1, 3, 6)}, normal(2, 4, 6)
    start = jlora.adapterize(params, {"kernel": Hadamard(side)}, sites=jlora.sites(layers, params, x))
    adapted = perturbed(start)
    lifted, merged, first = jit(lambda a: (jlora.lift(layers)(a, x), jlora.merge(a), jlora.lift(layers)(start, x)))(
        adapted
    )
    near(layers(merged, x), lifted)
    near(jax.tree.map(np.asarray, lazily_merged(adapted)), merged)
    near(first, layers(params, x))
    assert jnp.max(jnp.abs(lifted - first)) > 0.1
    jlora.save(tmp_path / "adapters", adapted)
    loaded = jlora.load(tmp_path / "adapters", params)
    assert loaded.plan == adapted.plan and loaded.plan.sites[0].beside == ("bias",)
    near(loaded.params, adapted.params, 0)


@pytest.mark.parametrize("side", ["output", "input"])
def test_a_sum_over_devices_changes_the_bias_once(side):
    mesh = jax.make_mesh((4,), ("model",), (AxisType.Auto,))
    params, x = {"kernel": weight(0, 8, 8), "bias": normal(1, 8)}, normal(2, 4, 8)

    def cut(params, x):
        body = lambda x, w: jax.lax.psum(x @ w, "model")
        run = jax.shard_map(body, mesh=mesh, in_specs=(P(None, "model"), P("model", None)), out_specs=P())
        return run(x, params["kernel"]) + params["bias"]

    adapted = perturbed(jlora.adapterize(params, {"kernel": Hadamard(side)}, sites=jlora.sites(fn, params, x)))
    near(jax.jit(jlora.lift(cut))(adapted, x), cut(jlora.merge(adapted), x))


def test_without_a_bias_the_gain_alone_is_trained():
    adapted = jlora.adapterize({"kernel": weight(0, 6, 5)}, {"kernel": Hadamard()})
    assert set(adapted.params["kernel"]) == {"g"}
    assert "5 values" in jlora.explain(adapted)


def classifier(params, x):
    """One layer of attention's outputs, a normalization and a head."""
    layer = params["layer"]["attention"]["output"]
    y = jnp.tanh(x @ layer["dense"]["kernel"] + layer["dense"]["bias"])
    y = (y - y.mean(-1, keepdims=True)) * layer["LayerNorm"]["scale"] + layer["LayerNorm"]["bias"]
    return y @ params["classifier"]["kernel"] + params["classifier"]["bias"]


def test_the_two_stages_train_the_head_then_adapters_and_normalization_with_the_head_as_it_is():
    dense, norm = {"kernel": weight(0, 8, 8), "bias": normal(1, 8)}, {"scale": jnp.ones(8), "bias": jnp.zeros(8)}
    params = {"layer": {"attention": {"output": {"dense": dense, "LayerNorm": norm}}}}
    params["classifier"] = {"kernel": jnp.zeros((8, 2)), "bias": jnp.zeros(2)}
    x = normal(5, 64, 8)
    labels = (x[:, 0] * x[:, 1] > 0).astype(jnp.int32)

    def loss(params):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(classifier(params, x), labels))

    @jax.jit
    def trained(adapted):
        tx = jlora.optimizer(adapted, optax.adamw, learning_rate=0.03)

        def step(carry, _):
            p, state = carry
            value, gradient = jax.value_and_grad(lambda p: jlora.lift(loss)(adapted.replace(params=p)))(p)
            updates, state = tx.update(gradient, state, p)
            return (optax.apply_updates(p, updates), state), value

        (p, _), losses = jax.lax.scan(step, (adapted.params, tx.init(adapted.params)), length=100)
        return adapted.replace(params=p), losses

    head, first = trained(jlora.adapterize(params, {r"classifier/(kernel|bias)": jlora.Full()}))
    staged = jlora.merge(head)
    adapted, second = trained(jlora.adapterize(staged, Hadamard.spec()))
    count = sum(leaf.size for leaf in jax.tree.leaves(adapted.params))
    assert count == 4 * 8, "a gain, a shift, and the normalization's two vectors"
    assert second[0] == pytest.approx(float(first[-1]), abs=0.02) and second[-1] < second[0] - 0.05
    assert np.array_equal(adapted.base["classifier"]["kernel"], staged["classifier"]["kernel"])


def test_another_side_is_refused():
    with pytest.raises(ValueError, match=r"Hadamard's side must be one of \('output', 'input'\), got 'both'"):
        Hadamard("both")
