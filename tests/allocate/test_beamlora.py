"""BeamLoRA against a loop in numpy: one top-p over all modules, copies of snapshots of the best ranks, moments with them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.problems import jit, normal

import jlora
from jlora import paths
from jlora.methods.beamlora import rule

pytestmark = pytest.mark.once

RATE, MOMENTUM, RANK, STEPS, FINAL, INTERVAL, TOP_P, TEMPERATURE = 0.1, 0.5, 5, 24, 4, 4, 0.55, 0.8
METHOD = jlora.BeamLoRA(RANK, 10, TEMPERATURE, TOP_P, STEPS, FINAL, INTERVAL)
NARROW = jlora.BeamLoRA(4, 7, TEMPERATURE, TOP_P, STEPS, FINAL, INTERVAL)
BASE = {"down": jnp.zeros((5, 9)), "layers": jnp.zeros((2, 6, 8)), "up": jnp.zeros((7, 4))}
SPEC = {"layers": jlora.Axes("batch in out", METHOD), "up": NARROW, ".*": METHOD}
MODULES = ["down", "layers[0]", "layers[1]", "up"]


def module(tree, name):
    """A module's part of a tree, along any leading axes of time; `layers` is a stack."""
    path, _, index = name.partition("[")
    part = paths.lookup(tree, (path,))
    return jax.tree.map(lambda x: x[:, int(index[0])], part) if index else part


@pytest.fixture(scope="module")
def run():
    """Starting params, gradients, and the params and states of every step."""
    adapted = jlora.adapterize(BASE, SPEC)
    rng = np.random.default_rng(3)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    params = jax.tree.map(lambda x: draw(*x.shape), adapted.params)
    gradients = jax.tree.map(lambda x: draw(STEPS, *x.shape), params)
    tx = jlora.with_rules(adapted, optax.sgd(RATE, momentum=MOMENTUM))

    def step(carry, gradient):
        p, state = carry
        updates, state = tx.update(gradient, state, p)
        p = optax.apply_updates(p, updates)
        return (p, state), (p, state)

    found = jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), gradients)[1])(params)
    return adapted, params, gradients, *jax.device_get(found)


def softmax(score):
    e = np.exp((score - score.max()) / TEMPERATURE)
    return len(score) * e / e.sum()


class Loop:
    """The reference: every module with its values, momentum and snapshot in float64."""

    def __init__(self, params):
        first = jax.tree.map(lambda x: x[None], params)
        self.values = {n: {f: np.array(x[0], np.float64) for f, x in module(first, n).items()} for n in MODULES}
        self.momentum = {n: {f: np.zeros_like(x) for f, x in fields.items()} for n, fields in self.values.items()}
        self.take()

    def take(self):
        copied = lambda tree: {n: {f: x.copy() for f, x in fields.items()} for n, fields in tree.items()}
        self.snapshot = copied(self.values), copied(self.momentum)

    def step(self, t, gradients, outcome):
        """One update; which copy goes where is taken from the outcome, after it was looked at. Returns ranks dropped."""
        for name, fields in self.values.items():
            for f, gradient in gradients[name].items():
                self.momentum[name][f] = MOMENTUM * self.momentum[name][f] + gradient
                fields[f] -= RATE * self.momentum[name][f]
        if t % INTERVAL == INTERVAL // 2:
            self.take()
        if t % INTERVAL or STEPS - t < INTERVAL:
            return 0
        part = 1 - (1 - TOP_P) * (1 + math.cos(math.pi * t / (STEPS - FINAL))) / 2 if t < STEPS - FINAL else 1
        weights = {n: softmax(self.values[n]["score"]) for n in MODULES}
        order = sorted(((-w, n, r) for n in MODULES for r, w in enumerate(weights[n])), key=lambda x: x[0])
        total, dropped = 0.0, {n: [] for n in MODULES}
        for weight, name, rank in order:
            total -= weight
            if part < 1 and total > part * len(order):
                dropped[name].append(rank)
        return sum(self.expand(n, weights[n], ranks, outcome[n]) for n, ranks in dropped.items())

    def expand(self, name, weights, dropped, outcome):
        best = np.argsort(-weights, kind="stable")
        dropped = sorted(r for r in best[len(best) - len(best) // 2 :] if r in dropped)
        values, momentum = (tree[name] for tree in self.snapshot)
        sources = set(best[: len(dropped)].tolist())
        for rank in dropped:
            (source,) = [s for s in sources if np.allclose(outcome["a"][:, rank], values["a"][:, s], atol=1e-4)]
            sources.remove(source)
            for tree, old in ((self.values[name], values), (self.momentum[name], momentum)):
                tree["a"][:, rank], tree["b"][rank] = old["a"][:, source], old["b"][source]
            score = self.values[name]["score"]
            score[[rank, source]] = (score[rank] + score[source]) / 2
        assert not sources, "a copied rank is not one of the best, or was copied twice"
        self.momentum[name]["score"][:] = 0
        return len(dropped)


@pytest.mark.once
def test_values_and_moments_of_every_step_are_those_of_a_loop_over_the_ranks(run):
    _, params, gradients, after, states = run
    loop, dropped = Loop(params), []
    for t in range(1, STEPS + 1):
        trees = (gradients, after, states.inner[0].trace, states.memory.values)
        now = jax.tree.map(lambda x, t=t: x[t - 1 : t], trees)
        given, outcome, trace, snapshot = (
            {n: jax.tree.map(lambda x: x[0], module(x, n)) for n in MODULES} for x in now
        )
        dropped.append(loop.step(t, given, outcome))
        for mine, theirs in ((outcome, loop.values), (trace, loop.momentum), (snapshot, loop.snapshot[0])):
            for name in MODULES:
                for f, value in mine[name].items():
                    if hasattr(value, "shape"):
                        np.testing.assert_allclose(
                            value, theirs[name][f], rtol=1e-4, atol=1e-5, err_msg=f"{t} {name} {f}"
                        )
    steps = [t for t, number in enumerate(dropped, 1) if number]
    assert steps == [4, 8, 12, 16], "pruning at whole intervals but where all weight is kept"
    assert sum(dropped) >= 8 and len(set(dropped)) > 2


@pytest.mark.once
def test_the_number_of_ranks_never_changes(run):
    adapted, _, _, _, states = run
    assert np.all(states.history.ranks[-1] == [5, 5, 5, 4])
    last = jax.tree.map(lambda x: x[-1], states)
    assert jlora.ranks(adapted, last) == dict(zip(MODULES, [5, 5, 5, 4]))


def test_the_kept_part_rises_from_top_p_to_all_of_it():
    kept = jlora.BeamLoRA(8, top_p=0.95, steps=120, final_steps=20, interval=50).optimizer_rule.kept_weight()
    np.testing.assert_allclose(kept[:2], [0.95, 0.975])
    assert kept[2] == math.inf and len(kept) == 3


def test_top_p_is_that_of_a_sorted_list_and_ties_go_to_the_first():
    rng = np.random.default_rng(0)
    for kept in (0.5, 0.8, 0.95):
        weights = [np.round(rng.random((2, 5)), 1), np.round(rng.random(4), 1)]  # with many ties
        flat = np.concatenate([w.ravel() for w in weights])
        order = sorted(range(len(flat)), key=lambda n: (-flat[n], n))
        beyond = np.cumsum(flat[order]) > kept * flat.sum()
        wanted = np.zeros(len(flat), bool)
        wanted[[n for n, out in zip(order, beyond) if out]] = True
        got = rule.outside_top_p([jnp.asarray(w, jnp.float32) for w in weights], kept * flat.sum())
        assert np.concatenate([np.asarray(m).ravel() for m in got]).tolist() == wanted.tolist()
        assert wanted.any()


@pytest.mark.once
def test_where_all_weight_is_kept_nothing_is_dropped_however_sums_round():
    weights = rule.gates(normal(0, 64, 64), 0.05)
    total = np.cumsum(np.sort(np.asarray(weights).ravel())[::-1], dtype=np.float32)[-1]
    assert total != 64 * 64, "this sum is exact: it shows nothing"
    assert not rule.outside_top_p([weights], math.inf)[0].any()


def test_gates_sum_to_the_rank_also_where_they_are_nearly_one_hot():
    for score in (jnp.zeros(8), 3 * normal(1, 8), normal(2, 3, 8).astype(jnp.bfloat16)):
        gates = rule.gates(score, 0.05)
        assert gates.dtype == jnp.float32
        np.testing.assert_allclose(jnp.sum(gates, axis=-1), 8, rtol=1e-5)


@pytest.mark.once
def test_at_most_half_of_a_matrix_gives_way_to_as_many_of_its_best_in_a_shuffled_order():
    weights = jnp.asarray([[5.0, 1, 4, 2, 3], [1, 1, 1, 1, 1], [1, 2, 3, 4, 5]])
    drop = jnp.asarray([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], bool)
    origins = set()
    for seed in range(12):
        pair = rule.pairing(weights, drop, jax.random.uniform(jax.random.key(seed), weights.shape))
        assert pair.dropped.tolist() == [
            [False, True, False, True, False], [False, False, False, True, True], [True, False, False, False, False],
        ]  # fmt: skip
        origin = np.asarray(pair.origin)
        assert sorted(origin[0, [1, 3]]) == [0, 2] and sorted(origin[1, [3, 4]]) == [0, 1] and origin[2, 0] == 4
        kept = ~np.asarray(pair.dropped)
        assert np.array_equal(origin[kept], np.broadcast_to(np.arange(5), (3, 5))[kept])
        origins.add(tuple(origin[0]))
    assert len(origins) == 2
    scores = rule.shared_scores(
        jnp.asarray([8.0, 4, 2, 0, 1]), rule.Pairing(pair.dropped[0], jnp.asarray([0, 2, 2, 0, 4]))
    )
    assert scores.tolist() == [4, 3, 3, 4, 1]


def test_it_starts_as_lora():
    method, w = jlora.BeamLoRA(4, 8), jnp.zeros((6, 8))
    start = jlora.adapterize({"w": w}, {"w": method})
    params = {**start.params["w"], "b": normal(0, 4, 8)}
    lora = jlora.adapterize({"w": w}, {"w": jlora.LoRA(4, 8)}).replace(params={"w": {f: params[f] for f in "ab"}})
    got, wanted = jlora.merge(start.replace(params={"w": params}))["w"], jlora.merge(lora)["w"]
    np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert np.any(wanted != 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interval": 1}, "interval must be at least 2, for a snapshot at its middle, got 1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"rank": 0}, "rank must be a positive whole number, got 0"),
        ({"steps": 4, "final_steps": 4}, r"start_steps \(0\) and final_steps \(4\) leave none of the 4 steps"),
        ({"steps": 50, "interval": 30}, r"interval \(30\) leaves none of the 50 steps for a choice"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"BeamLoRA's .*{message}"):
        jlora.BeamLoRA(**{"rank": 4, **changes})
