"""Poly: skills mixed for each task as PEFT does it, one task's weight, and the draw of a mixture."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from descent import descend

import jlora
from jlora.core.products.routed import routing

pytestmark = pytest.mark.once

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "poly.npz")
METHODS = {"whole": jlora.Poly(rank=2, tasks=3, skills=2), "splits": jlora.Poly(2, tasks=3, skills=3, splits=2)}
close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


def golden(case, part):
    return {name.removeprefix(f"{case}/{part}/"): GOLDEN[name] for name in GOLDEN if name.startswith(f"{case}/{part}/")}


def fields_of(case, part):
    """The fields of both layers from PEFT's tensors."""
    found = {}
    for name, value in golden(case, part).items():
        layer, field = name.split("/")
        (tensor,) = [each for each in jlora.Poly.peft_kind.of(METHODS[case]) if each.field == field]
        found.setdefault(layer, {})[field] = jnp.asarray(tensor.layout[1](value))
    return found


def layers(case):
    bias = golden(case, "bias")

    def fn(params, x):
        return jnp.tanh(x @ params["up"] + bias["up"]) @ params["down"] + bias["down"]

    return fn


def adapted_of(case):
    adapted = jlora.adapterize(golden(case, "base"), {".*": METHODS[case]})
    assert jax.tree.map(np.shape, adapted.params) == jax.tree.map(np.shape, fields_of(case, "start"))
    return adapted.replace(params=fields_of(case, "before"))


@pytest.mark.parametrize("case", METHODS)
def test_rows_of_several_tasks_are_those_of_peft_over_ten_steps(case):
    adapted, x = adapted_of(case).on(task=GOLDEN[f"{case}/tasks"]), GOLDEN[f"{case}/x"]
    lifted = jlora.lift(layers(case), strict=True)
    y, _, gradients, after = descend(
        lambda params: lifted(adapted.replace(params=params), x), adapted.params, optax.adam(0.02), steps=10
    )
    found = y[0], jax.tree.map(lambda leaf: leaf[0], gradients), after
    wanted = GOLDEN[f"{case}/y"], fields_of(case, "gradient"), fields_of(case, "after")
    jax.tree.map(close, found, wanted)


def test_each_row_is_what_its_task_gives_alone_and_as_a_plain_model():
    adapted, x = adapted_of("splits"), GOLDEN["splits/x"]
    lifted = jax.jit(jlora.lift(layers("splits"), strict=True))
    together = lifted(adapted.on(task=jnp.arange(3)), x[:3])
    for task in range(3):
        alone = adapted.on(task=task)
        close(together[task], lifted(alone, x[task]))
        close(together[task], layers("splits")(jlora.merge(alone), x[task]))
        close(together[task], lifted(jlora.compact(alone), x[task]))


def test_a_mixture_is_drawn_for_each_row_as_a_relaxed_bernoulli():
    logits = jnp.broadcast_to(jnp.array([1.0, -2.0, 0.5]), (4000, 3))
    drawn, sure = routing(logits, jax.random.key(0)), routing(logits)
    close(drawn.sum(-1), 1)
    close(sure, jax.nn.sigmoid(logits) / jax.nn.sigmoid(logits).sum(-1, keepdims=True))
    # A draw of two skills, one of which is surely whole, is `amount / (amount + 1)`; an amount is above a half as often as
    # sigmoid(logit) says.
    pair = routing(jnp.stack([logits[:, 0], jnp.full(4000, 40.0)], -1), jax.random.key(1))[:, 0]
    assert abs(np.mean(pair > 1 / 3) - jax.nn.sigmoid(1.0)) < 0.03
    assert np.std(drawn, 0).min() > 0.1
    adapted = adapted_of("whole")
    lifted = jax.jit(jlora.lift(layers("whole"), strict=True))
    x = jnp.broadcast_to(GOLDEN["whole/x"][:1], (6, 3, 8))
    rows = lifted(adapted.on(task=jnp.zeros(6, jnp.int32), dropout=jax.random.key(2)), x)
    assert np.unique(np.asarray(rows)[:, 0, 0]).size == 6, "rows draw for themselves"


@pytest.mark.parametrize("method", [METHODS["splits"], jlora.AdaMix(rank=2)], ids=str)
def test_experts_of_a_grouped_product_draw_each_for_itself(method):
    w, x = (jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate([(3, 8, 6), (9, 8)]))
    fn = lambda params, x: jax.lax.ragged_dot(x, params["w"], jnp.array([3, 3, 3]))
    # All experts have one adapter, and all rows one input: what differs is what is drawn.
    params, x = {"w": jnp.broadcast_to(w[:1], w.shape)}, jnp.broadcast_to(x[:1], x.shape)
    adapted = jlora.adapterize(params, {"w": method}, jax.random.key(2), jlora.sites(fn, params, x))
    noise = lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape[1:]) + jnp.zeros_like(leaf)
    adapted = adapted.replace(params=jax.tree.map(noise, adapted.params))
    adapted = adapted.on(task=1) if method.context else adapted
    lifted = jax.jit(jlora.lift(fn, strict=True))
    close(lifted(adapted, x), fn(jlora.merge(adapted), x))
    drawn = [np.asarray(lifted(adapted.on(dropout=jax.random.key(n)), x))[::3, 0] for n in range(4)]
    assert any(np.unique(each).size > 1 for each in drawn), "one draw serves all experts"


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda a: jlora.lift(layers("whole"))(a, GOLDEN["whole/x"]), "up: the call must say which task: on"),
        (lambda a: jlora.merge(a.on(task=jnp.array([0, 1]))), "down: rows of several tasks have no weight in common"),
        (lambda a: a.on(task=3), "there are tasks 0 to 2, got 3"),
        (lambda a: a.on(task=jnp.zeros((2, 2), jnp.int32)), r"one for all or \[rows\]; got int32 of shape \(2, 2\)"),
        (lambda a: a.on(task=0.5), "task= takes whole numbers"),
        (lambda a: jlora.Poly(skills=0), "Poly's skills must be a positive whole number, got 0"),
        (
            lambda a: jlora.adapterize(golden("whole", "base"), {"up": jlora.Poly(2, splits=3)}),
            "splits 3 must divide both sides of the 8 x 12 matrix; use 2",
        ),
        (
            lambda a: jlora.lift(layers("whole"))(a.on(task=jnp.zeros(4, jnp.int32)), GOLDEN["whole/x"]),
            r"up: tasks for 4 rows, but what it is used on has the leading axes \(5, 3\)",
        ),
    ],
)
def test_what_has_no_answer_is_refused(use, words):
    with pytest.raises(ValueError, match=words):
        use(adapted_of("whole"))
