"""The training step on a small function: parts of a batch add up, the base gets no gradient, dropout follows the key."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.training.hosts.placement import make_mesh, on_mesh
from jlora.training.model.loop import State, make_evaluation, make_step, to_devices
from jlora.training.model.losses import sums
from jlora.training.model.scores import summarize
from jlora.training.run.schedule import learning_rate, make_optimizer
from jlora.training.settings.fields import Settings

pytestmark = pytest.mark.once

ROWS, LENGTH, VOCABULARY, WIDTH = 8, 6, 12, 10


def forward(params, batch):
    return jnp.tanh(params["embedding"][batch["tokens"]]) @ params["head"]["kernel"]


def batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, (ROWS, LENGTH), np.int32)
    # Very different numbers of predictions a row, so that a mean of means would show.
    weights = (np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (ROWS, 1))).astype(np.float32)
    return {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "weights": weights}


ADAM = optax.adam(0.1)
STEP = make_step(forward, ADAM)


def adapted(dropout=0.0):
    draw = lambda *shape: np.random.default_rng(shape).standard_normal(shape).astype(np.float32)
    params = {
        "embedding": jnp.asarray(draw(VOCABULARY, WIDTH)),
        "head": {"kernel": jnp.asarray(draw(WIDTH, VOCABULARY))},
    }
    return jlora.adapterize(params, {"head/kernel": jlora.LoRA(rank=2, alpha=2, dropout=dropout)})


def run(parts, steps=3, dropout=0.0, seed=0):
    whole, mesh = adapted(dropout), make_mesh({})
    params = jax.tree.map(jnp.copy, whole.params)
    state = on_mesh(State(params, ADAM.init(params), jnp.zeros((), jnp.int32), jax.random.key(seed)), mesh)
    losses = []
    for number in range(steps):
        state, result = STEP(state, whole, to_devices(batch(number), mesh, parts))
        losses.append(float(result.loss))
    return state, losses


def test_accumulated_parts_give_the_step_of_the_whole_batch():
    (whole, losses), (parts, same) = run(1), run(4)
    np.testing.assert_allclose(losses, same, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(whole.params), jax.tree.leaves(parts.params)):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_the_loss_is_the_mean_over_predictions():
    base, data = adapted().base, batch()
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    losses = jax.jit(lambda base: cross_entropy(forward(base, data), data["targets"]))(base)
    wanted = float(np.sum(np.asarray(losses) * data["weights"]) / np.sum(data["weights"]))
    assert run(2, steps=1)[1][0] == pytest.approx(wanted, rel=1e-6)
    found = make_evaluation(forward)(adapted(), [to_devices(data, make_mesh({}))])
    summary = summarize(found, classify=False)
    assert summary["loss"] == pytest.approx(wanted, rel=1e-6)
    assert summary["perplexity"] == pytest.approx(np.exp(wanted), rel=1e-5)


def test_dropout_follows_the_seed_and_is_off_in_evaluation():
    assert run(1, dropout=0.5)[1] == run(1, dropout=0.5)[1]
    assert run(1, dropout=0.5)[1] != run(1, dropout=0.5, seed=1)[1]
    device = to_devices(batch(), make_mesh({}))
    plain, dropping = (make_evaluation(forward)(adapted(rate), [device]).loss for rate in (0.0, 0.5))
    assert plain == dropping


@pytest.mark.parametrize("parts", [1, 2])
def test_every_step_and_every_part_of_it_drops_by_a_key_of_its_own(parts):
    whole, mesh, key = adapted(dropout=0.5), make_mesh({}), jax.random.key(7)
    half = {name: array[:4] for name, array in batch().items()}
    twice = {name: np.concatenate([array] * parts) for name, array in half.items()}
    # Factors of which none is 0, and which stay as they are: what differs from step to step is the key alone.
    params = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), whole.params)
    tx = optax.sgd(0.0)
    state = on_mesh(State(params, tx.init(params), jnp.int32(0), jax.random.clone(key)), mesh)
    step = make_step(forward, tx)
    loss = jax.jit(lambda adapted: sums(jlora.lift(forward), adapted, half).loss)
    wanted, found = [], []
    for number in range(3):
        keys = [jax.random.fold_in(key, number)]
        keys = keys if parts == 1 else [jax.random.fold_in(keys[0], part) for part in range(parts)]
        each = [float(loss(whole.replace(params=state.params, context={"dropout": one}))) for one in keys]
        wanted.append(sum(each) / float(twice["weights"].sum()))
        assert len(set(each)) == parts
        state, result = step(state, whole, to_devices(twice, mesh, parts))
        found.append(float(result.loss))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert len(set(wanted)) == 3


def test_the_accuracy_is_that_of_the_rows_that_count():
    logits = jnp.array([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    rows = {"labels": jnp.array([0, 0, 0]), "weights": jnp.array([1.0, 1.0, 0.0])}
    found = summarize(sums(lambda params, batch: logits, {}, rows), classify=True)
    assert found["accuracy"] == 0.5
    assert found["loss"] == pytest.approx(np.log1p(np.exp(-2.0)) + 1.0)


def test_the_gradient_is_clipped_by_its_norm_and_its_decay_is_the_settings():
    whole, rate, clip = adapted(), 0.1, 1.0
    settings = Settings(learning_rate=rate, warmup=0, steps=9, schedule="constant", weight_decay=0.3, clip=clip)
    tx, params = make_optimizer(whole, settings), jax.tree.map(jnp.ones_like, whole.params)
    plain, norm = optax.adamw(rate, weight_decay=0.3), float(optax.tree.norm(params))
    state, alone = tx.init(params), plain.init(params)
    for size in (1e-3, 4.0):  # below the norm, and above
        gradient = jax.tree.map(lambda leaf, size=size: size * leaf, params)
        clipped = min(1.0, clip / (size * norm))
        got, state = tx.update(gradient, state, params)
        wanted, alone = plain.update(jax.tree.map(lambda leaf, by=clipped: by * leaf, gradient), alone, params)
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4), got, wanted)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]), ("linear", [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25])],
)
def test_schedules_rise_and_fall_as_their_names_say(name, wanted):
    schedule = learning_rate(Settings(schedule=name, learning_rate=1.0, warmup=4, steps=8))
    np.testing.assert_allclose([schedule(step) for step in range(8)], wanted, atol=1e-6)


def test_the_cosine_falls_to_half_in_the_middle():
    schedule = learning_rate(Settings(schedule="cosine", learning_rate=1.0, warmup=0, steps=8))
    np.testing.assert_allclose([schedule(step) for step in (0, 4, 8)], [1.0, 0.5, 0.0], atol=1e-6)
