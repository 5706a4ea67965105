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


@pytest.mark.once
@pytest.mark.parametrize("memory", [2**30, 1])
def test_starts_are_made_of_the_mean_gradients(memory):
    adapted = jlora.adapterize(PARAMS, SPEC, prepared=prepared(memory=memory))
    gradients = [jax.grad(loss_fn)(PARAMS, batch) for batch in BATCHES]
    np.testing.assert_allclose(
        adapted.params["u"]["g"], (gradients[0]["u"] + gradients[1]["u"]) / 2, rtol=1e-5, atol=1e-6
    )
    wanted = (abs(gradients[0]["v"]) + abs(gradients[1]["v"])) / 2
    np.testing.assert_allclose(adapted.params["v"]["g"], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.once
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


@pytest.mark.once
def test_a_rate_of_its_own_scales_the_fields_updates():
    adapted = jlora.adapterize(PARAMS, SPEC, prepared=prepared())
    tx = jlora.optimizer(adapted, optax.sgd, learning_rate=0.5)
    updates, _ = tx.update(adapted.params, tx.init(adapted.params), adapted.params)
    np.testing.assert_array_equal(updates["u"]["g"], -0.25 * adapted.params["u"]["g"])


@pytest.mark.once
def test_a_method_that_needs_data_says_so_when_it_gets_none():
    with pytest.raises(ValueError, match=r"u: Gradient\(absolute=False\) starts from data \(gradient\).*jlora.prepare"):
        jlora.adapterize(PARAMS, SPEC)


@pytest.mark.once
def test_what_was_prepared_otherwise_is_refused():
    other = {**SPEC, "u": Gradient(absolute=True)}
    with pytest.raises(
        ValueError, match=r"u with Gradient\(absolute=True\) was not prepared; prepared are: u with Gra"
    ):
        jlora.adapterize(PARAMS, other, prepared=prepared())


@pytest.mark.once
def test_a_spec_without_need_no_batches_and_infinite_gradients_are_refused():
    with pytest.raises(ValueError, match="no method of the spec starts from data"):
        jlora.prepare(PARAMS, {"u": jlora.LoRA(2)}, loss_fn, BATCHES)
    with pytest.raises(ValueError, match="prepare got no batch"):
        jlora.prepare(PARAMS, SPEC, loss_fn, [])
    with pytest.raises(ValueError, match="u: the gradient of loss_fn is not finite"):
        jlora.prepare(PARAMS, SPEC, lambda p, x: loss_fn(p, x) / 0.0, BATCHES)


@dataclass(frozen=True)
class Inputs(jlora.Method):
    """Keeps all that it is given."""

    names: tuple[str, ...] = ("covariance", "mean")

    @property
    def axes(self):
        return {name: ("in",) * (1 if name == "mean" else 2) for name in self.names}

    @property
    def needs(self):
        return frozenset(self.names)

    def start(self, key, w, site, **statistics):
        return Start(statistics)

    def weight(self, view):
        return view.w


LAYERS = {
    "heads": jnp.asarray(RNG.standard_normal((6, 2, 3)), jnp.float32),
    "output": jnp.asarray(RNG.standard_normal((2, 3, 6)), jnp.float32),
    "stack": jnp.asarray(RNG.standard_normal((3, 6, 6)) / 2, jnp.float32),
    "pool": jnp.asarray(RNG.standard_normal((6, 4)), jnp.float32),
}
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
SENTENCES = [jnp.asarray(RNG.standard_normal((3, 5, 6)), jnp.bfloat16) for _ in range(2)]


def attention(params, x, note=lambda name, x: None):
    """Attention's kernels, a scanned and rematerialised stack, and a product of one vector a row."""
    note("heads", x)
    x = jnp.einsum("btd,dhk->bthk", x, params["heads"])
    note("output", x.reshape(3, 5, 6))
    x = jnp.tanh(jnp.einsum("bthk,hkd->btd", x, params["output"]))
    x, inputs = jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), x)), x, params["stack"])
    note("stack", inputs)
    note("pool", x[:, 0])
    return x[:, 0] @ params["pool"]


def attention_loss(params, x):
    return jnp.mean(attention(params, x.astype(jnp.float32)) ** 2)


def by_hand(name, mask, finish):
    """What `finish` makes of all rows of a weight's input, of every batch, without those that the mask leaves out."""
    rows = []
    for batch in SENTENCES:
        attention(LAYERS, batch.astype(jnp.float32), lambda n, x: rows.append((x, mask)) if n == name else None)
    keep = np.concatenate([np.asarray(mask, bool).reshape(-1)] * 2)
    stacked = [np.concatenate([np.asarray(x[n] if name == "stack" else x, np.float64).reshape(-1, 6) for x, _ in rows])
               for n in range(3 if name == "stack" else 1)]  # fmt: skip
    found = [finish(x if name == "pool" else x[keep]) for x in stacked]
    return np.stack(found) if name == "stack" else found[0]


EVERYTHING = np.ones((3, 5))


def normalised_covariance(x, rows=6):
    """Of all tokens of a number of rows, each divided by its largest magnitude."""
    x = x.reshape(rows, -1, 6)
    x = x / abs(x).max((1, 2), keepdims=True)
    return np.einsum("nti,ntj->ij", x, x) / rows


@pytest.mark.parametrize("memory", [2**30, 1])
def test_means_of_inputs_are_over_all_tokens_that_the_mask_lets_count_in_every_form_of_use(memory):
    sites = jlora.sites(attention_loss, LAYERS, SENTENCES[0])
    spec = {".*": Inputs(("covariance", "mean", "normalised_covariance"))}
    options = {"sites": sites, "memory": memory, "mask": lambda batch: jnp.asarray(MASK) > 0}
    found = jlora.prepare(LAYERS, spec, attention_loss, iter(SENTENCES), **options)
    adapted = jlora.adapterize(LAYERS, spec, sites=sites, prepared=found)
    for name in LAYERS:
        close = {"rtol": 1e-4, "atol": 1e-5, "err_msg": name}
        covariance = by_hand(name, MASK, lambda x: x.T @ x / len(x))
        np.testing.assert_allclose(adapted.params[name]["covariance"], covariance, **close)
        np.testing.assert_allclose(adapted.params[name]["mean"], by_hand(name, MASK, lambda x: x.mean(0)), **close)
        # Of the pool's input a batch is one row, all of which counts.
        counts, rows = (np.ones((6, 1)), 2) if name == "pool" else (np.concatenate([MASK] * 2).reshape(-1, 1), 6)
        normalised = by_hand(name, EVERYTHING, lambda x: normalised_covariance(x * counts, rows))
        np.testing.assert_allclose(adapted.params[name]["normalised_covariance"], normalised, **close)


@pytest.mark.once
def test_methods_that_need_gradients_inputs_or_nothing_share_a_spec_and_one_reading_of_the_batches():
    spec = {
        "stack": jlora.Axes("batch in out", Inputs(("normalised_covariance", "gradient"))),
        "pool": Inputs(("mean",)),
    }
    spec["output"] = jlora.Axes("in in out", jlora.LoRA(2))
    seen = []
    found = jlora.prepare(LAYERS, spec, attention_loss, (seen.append(1) or x for x in SENTENCES))
    assert len(seen) == 2 and len(found.starts) == 2
    pool, stack = (dict(start.params) for start in found.starts.values())

    wanted = by_hand("stack", EVERYTHING, normalised_covariance)
    np.testing.assert_allclose(stack["normalised_covariance"], wanted, rtol=1e-4)
    gradients = [jax.grad(attention_loss)(LAYERS, x)["stack"] for x in SENTENCES]
    np.testing.assert_allclose(stack["gradient"], sum(gradients) / 2, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(pool["mean"], by_hand("pool", EVERYTHING, lambda x: x.mean(0)), rtol=1e-4, atol=1e-6)


@pytest.mark.once
def test_a_tied_matrix_counts_the_inputs_of_all_its_uses():
    def loss(params, x):
        return jnp.sum(jnp.tanh(x @ params["w"]) @ params["w"])

    w, x = LAYERS["stack"][0], SENTENCES[0][0].astype(jnp.float32)
    (start,) = jlora.prepare({"w": w}, {"w": Inputs()}, loss, [x]).starts.values()
    rows = np.concatenate([x, jnp.tanh(x @ w)])
    np.testing.assert_allclose(start.params["covariance"], rows.T @ rows / 10, rtol=1e-5, atol=1e-6)


def refused(message, spec=None, fn=attention_loss, batches=SENTENCES, error=ValueError, **options):
    with pytest.raises(error, match=message):
        jlora.prepare(LAYERS, spec or {"pool": Inputs()}, fn, batches, **options)


@pytest.mark.once
def test_what_inputs_can_t_tell_is_refused_with_path_and_reason():
    refused(
        r"pool: Inputs.* needs 'moment', which prepare can't take; it takes gradient, .*, mean",
        {"pool": Inputs(("moment",))},
    )
    refused("pool: the covariance of its inputs is not finite", batches=[x / 0 for x in SENTENCES])
    whole = lambda params, x: attention_loss(params, x) + jnp.sum(params["pool"])
    refused("observe: pool is taken whole by `reduce_sum`.*out of the spec that prepare got", fn=whole)
    refused("never reads the adapted leaf pool", fn=lambda params, x: jnp.sum(params["heads"]) + jnp.sum(x))
    stack = {"stack": jlora.Axes("batch in out", Inputs())}
    refused(
        r"observe: stack .*leading axes \(3, 5\), and the mask of prepare \(2, 5\)",
        stack,
        mask=lambda x: jnp.ones((2, 5)),
    )
    refused(
        r"pool: the start of .*corda.* is not finite", {"pool": jlora.LoRA(2, init="corda")}, batches=[0 * SENTENCES[0]]
    )
