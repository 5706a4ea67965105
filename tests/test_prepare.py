"""`prepare`: gradients become starts, group by group, and constants that a method's leaves share."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.core.protocol.method import Start

RNG = np.random.default_rng(0)
PARAMS = {
    "u": jnp.asarray(RNG.standard_normal((6, 4)), jnp.float32),
    "v": jnp.asarray(RNG.standard_normal((2, 4, 6)), jnp.float32),
}
BATCHES = [jnp.asarray(RNG.standard_normal((3, 6)), jnp.float32) for _ in range(2)]


@dataclass(frozen=True)
class Gradient(jlora.Method):
    """Keeps what it is given; shares a constant; asks for half the rate and a rule."""

    absolute: bool = False

    @property
    def axes(self):
        return {"g": ("in", "out")}

    @property
    def needs(self):
        return frozenset({"absolute_gradient" if self.absolute else "gradient"})

    @property
    def shared_fields(self):
        return ("c",)

    def shared(self, key, sites):
        return {"c": jnp.full(3, float(len(sites)))}

    def start(self, key, w, site, **statistics):
        (given,) = statistics.values()
        return Start({"g": given})

    def weight(self, view):
        return view.w + jnp.sum(view.shared["c"]) * view.params["g"]

    def rates(self, site):
        return {"g": 0.5}


SPEC = {"u": Gradient(), "v": jlora.Axes("batch in out", Gradient(absolute=True))}


def model(params, x):
    for w in params["v"]:
        x = jnp.sin(x @ params["u"]) @ w
    return x


def loss_fn(params, batch):
    return jnp.mean(model(params, batch) ** 2)


def prepared(**options):
    return jlora.prepare(PARAMS, SPEC, loss_fn, BATCHES, **options)


@pytest.mark.parametrize("memory", [2**30, 1])
def test_starts_are_made_of_the_mean_gradients(memory):
    adapted = jlora.adapterize(PARAMS, SPEC, prepared=prepared(memory=memory))
    gradients = [jax.grad(loss_fn)(PARAMS, batch) for batch in BATCHES]
    np.testing.assert_allclose(
        adapted.params["u"]["g"], (gradients[0]["u"] + gradients[1]["u"]) / 2, rtol=1e-5, atol=1e-6
    )
    wanted = (abs(gradients[0]["v"]) + abs(gradients[1]["v"])) / 2
    np.testing.assert_allclose(adapted.params["v"]["g"], wanted, rtol=1e-5, atol=1e-6)


def test_shared_constants_reach_every_leaf():
    adapted = jlora.adapterize(PARAMS, SPEC, prepared=prepared())
    assert {name: d["c"].tolist() for name, d in adapted.frozen["~shared"].items()} == {
        "Gradient": [1.0] * 3,
        "Gradient_1": [1.0] * 3,
    }
    y = jax.jit(jlora.lift(model))(adapted, BATCHES[0])
    written = {name: PARAMS[name] + 3 * adapted.params[name]["g"] for name in PARAMS}
    np.testing.assert_allclose(y, model(written, BATCHES[0]), rtol=1e-3)
    gradient = jax.grad(lambda p: jnp.sum(jlora.lift(model)(adapted.replace(params=p), BATCHES[0])))(adapted.params)
    assert np.all(gradient["v"]["g"] != 0)


def test_a_rate_of_its_own_scales_the_fields_updates():
    adapted = jlora.adapterize(PARAMS, SPEC, prepared=prepared())
    tx = jlora.optimizer(adapted, optax.sgd, learning_rate=0.5)
    updates, _ = tx.update(adapted.params, tx.init(adapted.params), adapted.params)
    np.testing.assert_array_equal(updates["u"]["g"], -0.25 * adapted.params["u"]["g"])


def test_a_method_that_needs_data_says_so_when_it_gets_none():
    with pytest.raises(ValueError, match=r"u: Gradient\(absolute=False\) starts from data \(gradient\).*jlora.prepare"):
        jlora.adapterize(PARAMS, SPEC)


def test_what_was_prepared_otherwise_is_refused():
    other = {**SPEC, "u": Gradient(absolute=True)}
    with pytest.raises(
        ValueError, match=r"u with Gradient\(absolute=True\) was not prepared; prepared are: u with Gra"
    ):
        jlora.adapterize(PARAMS, other, prepared=prepared())


def test_a_spec_without_need_no_batches_and_infinite_gradients_are_refused():
    with pytest.raises(ValueError, match="no method of the spec starts from data"):
        jlora.prepare(PARAMS, {"u": jlora.LoRA(2)}, loss_fn, BATCHES)
    with pytest.raises(ValueError, match="prepare got no batch"):
        jlora.prepare(PARAMS, SPEC, loss_fn, [])
    with pytest.raises(ValueError, match="u: the gradient of loss_fn is not finite"):
        jlora.prepare(PARAMS, SPEC, lambda p, x: loss_fn(p, x) / 0.0, BATCHES)
