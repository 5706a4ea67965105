"""SoRA against a loop in numpy: AdamW, then the soft threshold of the step's stage; exact targets; AdamW's bits without."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.problems import jit
from kernels import USUAL

import jlora
from jlora import paths
from jlora.methods.sora import rule
from jlora.optimize.allocate.budget import Phases

RATE, DECAY, RANK, TARGET, STEPS, START, FINAL, L1 = 0.05, 0.3, 4, 2, 16, 3, 4, 3.0
THRESHOLDS = (0.0, 0.03, 0.06)
STAGES = {"threshold": 0.06, "first_threshold": 0.0, "stages": 3}
METHOD = jlora.SoRA(RANK, 6, **STAGES, l1=L1, target=TARGET, steps=STEPS, start_steps=START, final_steps=FINAL)
BASE = {"down": jnp.zeros((5, 9)), "layers": jnp.zeros((2, 6, 8)), "up": jnp.zeros((7, 4))}


def adapted(method):
    return jlora.adapterize(BASE, {"layers": jlora.Axes("batch in out", method), ".*": method})


def run(method, params, gradients):
    """The params and the states after every step of given gradients, stacked."""
    start = adapted(method)
    tx = jlora.optimizer(start, optax.adamw, RATE, weight_decay=DECAY)

    def step(carry, gradient):
        p, state = carry
        updates, state = tx.update(gradient, state, p)
        p = optax.apply_updates(p, updates)
        return (p, state), (p, state)

    return start, jax.device_get(jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), gradients)[1])(params))


def noise(params, steps=STEPS, size=1.0):
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda x: (size * rng.standard_normal((steps, *x.shape))).astype(np.float32), params)


@pytest.fixture(scope="module")
def course():
    """Starting params, gradients, params and states of every step; gates are small, so that some close and open again."""
    params = jax.tree.map(lambda x: x, adapted(METHOD).params)
    for fields in params.values():
        fields["g"] *= 0.15
    gradients = noise(params)
    return params, gradients, *run(METHOD, params, gradients)


def adamw(value, gradients, decay):
    """The values after each of optax's AdamW steps, from the values before it, in float64; `send` gives the next start."""
    m = v = np.zeros_like(value)
    for t, gradient in enumerate(gradients, 1):
        g = gradient(value) if callable(gradient) else gradient
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        value = yield value - RATE * (step + decay * value)


def by_hand(params, gradients):
    """The gates of every step: lists of [modules, rank], and those that are kept in the end."""
    flat = lambda tree: np.concatenate([np.asarray(tree[n]["g"], np.float64).reshape(-1, RANK) for n in BASE])
    gates, count = flat(params), 4 * RANK
    pull = [
        lambda g, t=t: flat({n: {"g": x["g"][t]} for n, x in gradients.items()}) + L1 * np.sign(g) / count
        for t in range(STEPS)
    ]
    stepper, found, kept = adamw(gates, pull, 0.0), [], np.ones_like(gates, bool)
    moved = next(stepper)
    for t in range(1, STEPS + 1):
        last = STEPS - FINAL
        stage = 0 if t <= START else min((t - 1 - START) * 3 // (last - START), 2)
        threshold = THRESHOLDS[stage] if t <= last else 0.0
        gates = np.sign(moved) * np.maximum(np.abs(moved) - threshold, 0)
        if t == last:
            best = np.argsort(-np.abs(gates).ravel(), kind="stable")[: TARGET * 4]
            kept = np.isin(np.arange(count), best).reshape(gates.shape)
        found.append(gates := np.where(kept, gates, 0))
        if t < STEPS:
            moved = stepper.send(gates)
    return np.stack(found), kept


@pytest.mark.once
def test_gates_of_every_step_are_those_of_a_loop_of_adamw_and_the_threshold(course):
    params, gradients, _, (after, states) = course
    wanted, kept = by_hand(params, gradients)
    got = np.concatenate([after[n]["g"].reshape(STEPS, -1, RANK) for n in BASE], axis=1)
    # Adam's moments of gates that were given up start anew, which the loop has no need of: they are zero.
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    assert np.array_equal(got == 0, wanted == 0)
    before_last = got[: STEPS - FINAL]
    came_back = np.any((before_last[:-1] == 0) & (before_last[1:] != 0))
    assert came_back and np.any(before_last[-2] == 0), "no gate closes, or none opens again: the test shows nothing"
    active = np.concatenate([states.active[n].reshape(STEPS, -1, RANK) for n in BASE], axis=1)
    assert np.array_equal(active[: STEPS - FINAL - 1], before_last[:-1] != 0)
    assert np.all(active[STEPS - FINAL - 1 :] == kept) and kept.sum() == TARGET * 4


@pytest.mark.once
def test_the_factors_take_the_steps_of_adamw(course):
    params, gradients, _, (after, _) = course
    for field in "ab":
        given = list(gradients["up"][field].astype(np.float64))
        stepper = adamw(np.asarray(params["up"][field], np.float64), given, DECAY)
        value = next(stepper)
        for t in range(STEPS - FINAL - 1):
            np.testing.assert_allclose(after["up"][field][t], value, rtol=1e-4, atol=1e-5)
            value = stepper.send(value)


@pytest.mark.once
def test_history_and_ranks_count_open_gates_and_in_the_end_the_target(course):
    _, _, start, (_, states) = course
    last = jax.tree.map(lambda x: x[-1], states)
    history = jlora.rank_history(start, last)
    assert history.names == ("down", "layers[0]", "layers[1]", "up")
    for t in range(1, STEPS + 1):
        counts = np.concatenate([states.active[n][t - 1].reshape(-1, RANK).sum(-1) for n in BASE])
        assert history.ranks[t].tolist() == counts.tolist()
    assert sum(jlora.ranks(start, last).values()) == TARGET * 4


@pytest.mark.once
def test_ranks_given_up_for_good_lose_their_moments(course):
    states = course[3][1]
    adam = lambda x: isinstance(x, optax.ScaleByAdamState)
    moments = [
        tree for state in jax.tree.leaves(states.inner, is_leaf=adam) if adam(state) for tree in (state.mu, state.nu)
    ]
    assert len(moments) == 2 * 2, "one Adam for each group: factors and vectors"
    assert sum(np.sum(~states.active[name][-1]) for name in BASE) == (RANK - TARGET) * 4
    for t in (STEPS - FINAL - 1, STEPS - 1):
        for name in BASE:
            gone = ~states.active[name][t]
            for tree in moments:
                fields = paths.lookup(tree, (name,))
                for field, axis in (("a", -1), ("g", -1), ("b", -2)):
                    if hasattr(fields.get(field), "shape"):
                        assert np.all(np.moveaxis(fields[field][t], axis, -1 if field == "g" else -2)[gone] == 0)


@pytest.mark.once
def test_ties_never_break_the_target():
    method = jlora.SoRA(RANK, 6, threshold=0.01, l1=0.0, target=1, steps=4, final_steps=2)
    params = {n: {**fields, "g": jnp.ones_like(fields["g"])} for n, fields in adapted(method).params.items()}
    still = jax.tree.map(lambda x: jnp.zeros((4, *x.shape)), params)
    start, (after, states) = run(method, params, still)
    assert jlora.ranks(start, jax.tree.map(lambda x: x[-1], states)) == {
        "down": 4,
        "layers[0]": 0,
        "layers[1]": 0,
        "up": 0,
    }
    assert np.all(after["up"]["g"][1:] == 0) and np.all(after["down"]["g"][1:] == np.float32(0.98))
    closed = jax.tree.map(jnp.zeros_like, params)
    start, (_, states) = run(method, closed, still)
    assert sum(int(states.active[n][-1].sum()) for n in BASE) == 4, "closed gates are places too"


@pytest.mark.once
def test_without_a_threshold_every_bit_is_that_of_adamw():
    method = jlora.SoRA(RANK, 6, threshold=0.0, l1=0.0, steps=5)
    start, params = adapted(method), adapted(method).params
    gradients = noise(params, 5)
    tx = jlora.optimizer(start, optax.adamw, RATE, weight_decay=DECAY)
    labels = {n: {f: "g" if f == "g" else "ab" for f in x} for n, x in params.items()}
    plain = optax.partition(
        {"ab": optax.adamw(RATE, weight_decay=DECAY), "g": optax.adamw(RATE, weight_decay=0.0)}, labels
    )

    def course(tx, p):
        state = tx.init(p)
        for t in range(5):
            updates, state = jax.jit(tx.update, compiler_options=USUAL)(
                jax.tree.map(lambda x, t=t: x[t], gradients), state, p
            )
            p = jax.tree.map(lambda x, u: np.asarray(x) + np.asarray(u), p, updates)
        return p

    jax.tree.map(np.testing.assert_array_equal, course(tx, params), course(plain, params))


def test_the_threshold_is_the_proximal_step_and_closes_more_gates_the_larger_it_is():
    g = jnp.asarray([-2.0, -0.5, -0.3, 0.0, 0.2, 0.3, 0.7])
    np.testing.assert_allclose(rule.soft_threshold(g, 0.3), [-1.7, -0.2, 0, 0, 0, 0, 0.4], rtol=1e-6)
    assert np.all(np.asarray(rule.soft_threshold(g, 0.3))[2:6] == 0)
    open_gates = [int(jnp.sum(rule.soft_threshold(g, t) != 0)) for t in (0.0, 0.1, 0.25, 0.4, 1.0, 3.0)]
    assert open_gates == [6, 6, 5, 3, 1, 0]
    assert np.array_equal(rule.soft_threshold(g, 0.0), g)


@pytest.mark.parametrize(("start", "last", "stages"), [(0, 12, 3), (3, 10, 4), (2, 9, 1), (0, 3, 7)])
def test_stages_share_the_steps_between_the_phases(start, last, stages):
    starts = rule.stage_starts(Phases(last + 2, start, 2, 1), stages)
    for step in range(1, last + 3):
        wanted = 0 if step <= start else min((step - 1 - start) * stages // (last - start), stages - 1)
        assert np.sum(starts <= step) - 1 == wanted, f"step {step}"


def test_thresholds_rise_by_equal_amounts_or_equal_factors():
    method = lambda spacing, first: jlora.SoRA(threshold=0.08, first_threshold=first, stages=4, spacing=spacing)
    np.testing.assert_allclose(method("linear", 0.02).thresholds, [0.02, 0.04, 0.06, 0.08])
    np.testing.assert_allclose(method("log", 0.01).thresholds, [0.01, 0.02, 0.04, 0.08])
    assert jlora.SoRA(threshold=0.5).thresholds == (0.5,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": 5}, r"target \(5\) is above the rank that it starts with \(4\)"),
        ({"threshold": -1.0}, "threshold must be 0 or more, and finite, got -1.0"),
        (
            {"first_threshold": 1.0, "stages": 2},
            r"first_threshold \(1.0\) is above its threshold \(0.0003\): they rise",
        ),
        ({"first_threshold": 0.0}, "first_threshold is that of the first of several stages: give stages too"),
        (
            {"spacing": "log", "first_threshold": 0.0, "stages": 2},
            "'log' multiplies thresholds: give a first_threshold",
        ),
        ({"stages": 7}, "7 stages rise from a first_threshold: give that too"),
        ({"spacing": "cubic"}, "spacing must be 'linear' or 'log', got 'cubic'"),
        ({"stages": 0}, "stages must be a positive whole number, got 0"),
        ({"steps": 4, "final_steps": 4}, r"start_steps \(0\) and final_steps \(4\) leave none of the 4 steps"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"SoRA's .*{message}"):
        jlora.SoRA(**{"rank": 4, **changes})
