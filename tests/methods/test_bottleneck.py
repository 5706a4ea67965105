"""Bottleneck adapters: the authors' layers in values, gradients and ten steps; their placements, starts and dropout."""

import math
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from descent import descend

import jlora
from jlora import Bottleneck
from jlora.methods.bottleneck import ACTIVATIONS
from jlora.models.merged import lazily_merged

pytestmark = pytest.mark.once

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "bottleneck.npz"))
METHODS = {
    "parallel": Bottleneck(3, "parallel", "tanh", scale=1.5),
    "output": Bottleneck(3, "output", "gelu", learned_scale=True),
    "input": Bottleneck(3, "input", "silu", scale=0.5),
}
close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)


def fn(params, x):
    return x @ params["kernel"] + params["bias"]


def of(side, drawer):
    """The authors' arrays of a side, in the structure of `Adapted.params`."""
    names = ["d", "u"] + ["scale"] * METHODS[side].learned_scale
    found = {name: GOLDEN[f"{side}/{drawer}/{name}"] for name in names}
    return {"kernel": {name: jnp.asarray(a).reshape(() if name == "scale" else a.shape) for name, a in found.items()}}


@pytest.mark.parametrize("side", METHODS)
def test_output_gradients_and_ten_steps_are_those_of_the_authors_layers(side):
    w, bias, x, target = (jnp.asarray(GOLDEN[f"{side}/{name}"]) for name in ("w", "bias", "x", "target"))
    adapted = jlora.adapterize({"kernel": w, "bias": bias}, {"kernel": METHODS[side]})
    assert jax.tree.map(jnp.shape, adapted.params) == jax.tree.map(jnp.shape, of(side, "start"))
    output = lambda p: jlora.lift(fn)(adapted.replace(params=p), x)
    loss = lambda y: jnp.mean((y - target) ** 2)
    y, losses, gradients, after = descend(output, of(side, "start"), optax.sgd(0.05), 10, loss)
    close(y[0], GOLDEN[f"{side}/y"])
    jax.tree.map(close, jax.tree.map(lambda leaf: leaf[0], gradients), of(side, "gradient"))
    close(losses, GOLDEN[f"{side}/losses"])
    jax.tree.map(close, after, of(side, "after"))


def test_the_placements_are_those_of_the_study_in_models_with_the_usual_names():
    names = ["embed_tokens/embedding", *(f"layers/self_attn/{n}_proj/kernel" for n in "qkvo")]
    names += [f"layers/mlp/{n}_proj/kernel" for n in ("gate", "up", "down")]
    names += ["layer/attention/self/query/kernel", "layer/attention/output/dense/kernel"]
    names += ["layer/intermediate/dense/kernel", "layer/output/dense/kernel"]
    params = {}
    for name in names:
        jlora.paths.insert(params, tuple(name.split("/")), jnp.zeros((4, 4)))

    def placed(placement):
        sites = jlora.adapterize(params, Bottleneck.spec(placement, rank=2)).plan.sites
        assert {site.method.rank for site in sites} == {2}
        return {(site.path.split("/")[-2], site.method.side) for site in sites}

    after = {("down_proj", "output"), ("dense", "output")}
    assert placed("series_after_mlp") == after
    assert placed("series") == after | {(n, "input") for n in ("gate_proj", "up_proj", "dense")}
    assert placed("parallel_mlp") == {(n, "parallel") for n in ("up_proj", "down_proj", "dense")}
    assert placed("parallel_attention") == {(n, "parallel") for n in ("q_proj", "k_proj", "v_proj", "query")}
    paths = [s.path for s in jlora.adapterize(params, Bottleneck.spec("series_after_mlp")).plan.sites]
    assert "layer/attention/output/dense/kernel" not in paths
    with pytest.raises(ValueError, match=r"the placement must be one of \('parallel_mlp', .*\), got 'before'"):
        Bottleneck.spec("before")


@pytest.mark.parametrize("side", METHODS)
def test_dropout_drops_the_input_of_the_network_alone(side):
    eye, x = jnp.eye(4), jax.random.normal(jax.random.key(1), (50, 4))
    method = Bottleneck(4, side, "identity", dropout=0.25)
    adapted = jlora.adapterize({"kernel": 2 * eye}, {"kernel": method})
    adapted = adapted.replace(params={"kernel": {"d": eye, "u": eye}}, context={"dropout": jax.random.key(2)})
    y = jlora.lift(lambda p, x: x @ p["kernel"])(adapted, x)
    whole = {"parallel": x, "output": 2 * x, "input": 2 * x}[side]
    kept = (y - 2 * x) / whole
    assert jnp.all(jnp.isclose(kept, 0, atol=1e-5) | jnp.isclose(kept, 4 / 3, atol=1e-5))
    assert 0.1 < jnp.mean(jnp.isclose(kept, 0, atol=1e-5)) < 0.4


def test_activations_are_those_that_their_names_say():
    z = np.linspace(-3, 3, 13)
    wanted = {
        "tanh": np.tanh(z),
        "relu": np.maximum(z, 0),
        "gelu": z * (1 + np.vectorize(math.erf)(z / 2**0.5)) / 2,
        "gelu_tanh": z * (1 + np.tanh((2 / np.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2,
        "silu": z / (1 + np.exp(-z)),
        "sigmoid": 1 / (1 + np.exp(-z)),
        "identity": z,
    }
    jax.tree.map(partial(close, rtol=1e-5, atol=1e-6), {name: f(z) for name, f in ACTIVATIONS.items()}, wanted)


def test_starts_are_drawn_as_the_authors_draw_them():
    w = {"kernel": jnp.zeros((400, 200))}
    start = jlora.adapterize(w, {"kernel": Bottleneck(300)}).params["kernel"]
    assert not jnp.any(start["u"]) and jnp.max(jnp.abs(start["d"])) == pytest.approx(1 / 20, rel=1e-3)
    normal = jlora.adapterize(w, {"kernel": Bottleneck(300, init="normal")}).params["kernel"]
    assert [float(jnp.std(normal[name])) for name in "du"] == pytest.approx([0.02, 0.02], rel=0.02)


def test_the_job_adapts_the_feed_forward_block_of_the_models_that_it_reads():
    paths = ["mlp/gate_proj", "mlp/up_proj", "mlp/down_proj", "self_attn/o_proj", "attention/output/dense"]
    paths += ["intermediate/dense", "output/dense"]
    found = [path for path in paths if re.fullmatch(Bottleneck.recipe.targets, f"encoder/layer/{path}/kernel")]
    assert found == ["mlp/up_proj", "mlp/down_proj", "intermediate/dense", "output/dense"]


def test_merging_is_refused_in_one_sentence_also_leaf_by_leaf():
    adapted = jlora.adapterize({"up": {"kernel": jnp.eye(4)}}, {"up/kernel": Bottleneck(2)})
    words = r"^up/kernel can't be merged: Bottleneck\(rank=2\) acts in a way that no weight in its place does; keep"
    for merge in (jlora.merge, lazily_merged):
        with pytest.raises(ValueError, match=words):
            merge(adapted)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"side": "behind"}, "side must be one of .* got 'behind'"),
        ({"activation": "swish"}, "activation must be one of .* got 'swish'"),
        ({"init": "bert"}, "init must be one of .* got 'bert'"),
        ({"scale": 0}, "scale must be finite and not 0, got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_hyperparameters_that_can_not_be_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        Bottleneck(**wrong)
