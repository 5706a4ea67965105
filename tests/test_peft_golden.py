"""The same numbers as PEFT 0.21 in float32: outputs, gradients, optimizer steps, starting distributions."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora

pytestmark = pytest.mark.once

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "peft.npz"))
LORA = jlora.LoRA(rank=2, alpha=3)
RSLORA = jlora.LoRA(rank=2, alpha=3, scaling="rslora")
METHODS = {"lora": LORA, "rslora": RSLORA, "dora": jlora.DoRA(LORA), "dora_rslora": jlora.DoRA(RSLORA)}
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def golden(prefix):
    """The entries below a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in GOLDEN.items() if name.startswith(prefix)}


def loss_of(y):
    return jnp.sum(jnp.sin(y))


def train(adapted, loss, tx, steps):
    """The trained params after some steps."""

    def step(carry, _):
        p, state = carry
        updates, state = tx.update(jax.grad(loss)(p), state, p)
        return (optax.apply_updates(p, updates), state), None

    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps)[0][0])(adapted.params)


def linear_case(name):
    case = golden(f"{name}/")
    adapted = jlora.adapterize({"w": case["w"]}, {"w": METHODS[name]})
    fields = {field: jnp.asarray(case[field]) for field in adapted.params["w"]}
    adapted = adapted.replace(params={"w": fields})
    lifted = jlora.lift(lambda params: case["x"] @ params["w"] + case["bias"])
    return case, adapted, lambda p: lifted(adapted.replace(params=p))


@pytest.mark.parametrize("name", METHODS)
def test_outputs_are_those_of_peft(name):
    case, adapted, forward = linear_case(name)
    close(forward(adapted.params), case["y"])


@pytest.mark.parametrize("name", METHODS)
def test_trained_factors_merge_to_the_weight_that_peft_merges_to(name):
    case, adapted, _ = linear_case(name)
    after = {field: jnp.asarray(case[f"after/{field}"]) for field in adapted.params["w"]}
    close(jlora.merge(adapted.replace(params={"w": after}))["w"], case["merged"])


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_peft(name):
    case, adapted, forward = linear_case(name)
    gradient = jax.grad(lambda p: loss_of(forward(p)))(adapted.params)["w"]
    assert set(gradient) == set(golden(f"{name}/gradient/"))
    for field, value in gradient.items():
        close(value, case[f"gradient/{field}"])


@pytest.mark.parametrize("name", METHODS)
def test_five_steps_of_adamw_end_where_peft_ends(name):
    case, adapted, forward = linear_case(name)
    after = train(adapted, lambda p: loss_of(forward(p)), optax.adamw(0.01, weight_decay=0.1), 5)["w"]
    for field, value in after.items():
        assert not np.allclose(case[field], case[f"after/{field}"], atol=1e-3)
        close(value, case[f"after/{field}"])


def test_an_embeddings_lookup_and_gradients_are_those_of_peft():
    case = golden("embedding/")

    def lookup(params):
        return jnp.take(params["w"], case["tokens"], axis=0)

    params = {"w": case["w"]}
    adapted = jlora.adapterize(params, {"w": LORA}, sites=jlora.sites(lookup, params))
    adapted = adapted.replace(params={"w": {"a": jnp.asarray(case["a"]), "b": jnp.asarray(case["b"])}})
    lifted = jlora.lift(lookup, strict=True)
    close(lifted(adapted), case["y"])
    gradient = jax.grad(lambda p: loss_of(lifted(adapted.replace(params=p))))(adapted.params)["w"]
    close(gradient["a"], case["gradient/a"])
    close(gradient["b"], case["gradient/b"])


def classifier(params, tokens):
    x = jnp.tanh(jnp.take(params["embedding"], tokens, axis=0) @ params["up"]["w"] + params["up"]["bias"])
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return (x * params["norm"]["scale"] + params["norm"]["bias"]) @ params["head"]


def test_loraplus_moves_every_group_as_peft_does():
    case = golden("loraplus/")
    before, after = ({name.removeprefix(when): value for name, value in case.items() if name.startswith(when)}
                     for when in ("before/", "after/"))  # fmt: skip
    params = {
        "embedding": case["embedding/w"],
        "up": {"w": case["up/w"], "bias": before["up/bias"]},
        "norm": {"scale": before["norm/scale"], "bias": before["norm/bias"]},
        "head": before["head"],
    }
    spec = {"embedding|up/w": LORA, ".*": jlora.Full()}
    adapted = jlora.adapterize(params, spec, sites=jlora.sites(classifier, params, case["tokens"]))

    def factors(name):
        return {field: jnp.asarray(before[f"{name}/{field}"]) for field in "ab"}

    start = {**adapted.params, "embedding": factors("embedding"), "up": {**adapted.params["up"], "w": factors("up")}}
    adapted = adapted.replace(params=start)
    tx = jlora.optimizer(
        adapted, optax.adamw, learning_rate=0.01, ratio=4.0, embedding_learning_rate=0.003, weight_decay=0.1
    )
    lifted = jlora.lift(classifier)
    got = train(adapted, lambda p: loss_of(lifted(adapted.replace(params=p), case["tokens"])), tx, 4)
    places = {
        "embedding/a": got["embedding"]["a"],
        "embedding/b": got["embedding"]["b"],
        "up/a": got["up"]["w"]["a"],
        "up/b": got["up"]["w"]["b"],
        "up/bias": got["up"]["bias"]["w"],
        "norm/scale": got["norm"]["scale"]["w"],
        "norm/bias": got["norm"]["bias"]["w"],
        "head": got["head"]["w"],
    }
    assert set(places) == set(after)
    for name, value in places.items():
        assert not np.allclose(before[name], after[name], atol=1e-3)
        np.testing.assert_allclose(value, after[name], rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "embedding"])
def test_starts_are_drawn_from_the_distributions_of_peft(init):
    extreme, deviation = GOLDEN[f"start/{init}"]
    fields = jlora.adapterize({"w": jnp.zeros((256, 128))}, {"w": jlora.LoRA(rank=16, init=init)}).params["w"]
    drawn, zero = (fields["b"], fields["a"]) if init == "embedding" else (fields["a"], fields["b"])
    assert not np.any(zero)
    assert abs(float(drawn.mean())) < 4 * deviation / np.sqrt(drawn.size)
    np.testing.assert_allclose(drawn.std(), deviation, rtol=0.05)
    if init == "kaiming":
        np.testing.assert_allclose(np.abs(drawn).max(), extreme, rtol=0.01)
        np.testing.assert_allclose(extreme, 1 / np.sqrt(256), rtol=0.01)
