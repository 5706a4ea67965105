"""ALoRA: the choice of a round against a loop over lists, scores against weights written out, and what a round changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.problems import jit, normal, perturbed, weight

import jlora
from jlora.methods.alora import rule
from jlora.methods.alora.rule import chosen

pytestmark = pytest.mark.once

PHASES = {"steps": 12, "start_steps": 4, "final_steps": 2, "interval": 3}
BASE = {"p": weight(0, 8, 8), "q": weight(1, 8, 6), "stack": weight(2, 2, 8, 8), "rest": weight(3, 6, 4)}
METHOD = jlora.ALoRA(rank=2, max_rank=6, pruned=3, **PHASES)
WIDER = jlora.ALoRA(rank=3, max_rank=6, alpha=6, pruned=3, **PHASES)
SPEC = {"p": METHOD, "q": jlora.DoRA(WIDER), "stack": jlora.Axes("batch in out", METHOD), "rest": jlora.LoRA(2)}
X, Y = normal(4, 16, 8), normal(5, 16, 4)


def model(params, x):
    x = jnp.tanh(x @ params["p"])
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])[0]
    return jnp.tanh(x @ params["q"]) @ params["rest"]


def loss(adapted, batch):
    return jnp.mean((jlora.lift(model)(adapted, batch[0]) - batch[1]) ** 2)


def in_turns(scores, active, slots, count):
    """The paper's rule on lists: modules that lost nothing get a rank each in turn, the best mean first."""
    ranks = [(scores[m, r], m, r) for m, r in zip(*np.nonzero(active))]
    gone = sorted(ranks, key=lambda each: each[0])[:count]
    untouched = lambda: set(range(len(active))) - {m for _, m, _ in gone}
    while sum((slots[m] & ~active[m]).sum() for m in untouched()) < len(gone):
        gone = gone[:-1]  # no room for so many, or none without a loss
    left = {
        m: [r for r in np.flatnonzero(active[m]) if (m, r) not in [g[1:] for g in gone]] for m in range(len(active))
    }
    whole = [m for m in left if m not in [each[1] for each in gone]]
    mean = {m: np.mean(scores[m, left[m]]) if left[m] else -np.inf for m in whole}
    free = {m: [r for r in np.flatnonzero(slots[m]) if not active[m, r]] for m in whole}
    grown = []
    while whole and len(grown) < len(gone):
        for m in sorted(whole, key=lambda m: -mean[m]):
            if free[m] and len(grown) < len(gone):
                grown.append((m, free[m].pop(0)))
    return left, grown


def test_the_choice_is_that_of_a_loop_over_lists_with_ties_and_full_modules():
    rng = np.random.default_rng(0)
    choose = jax.jit(chosen)
    for trial in range(150):
        modules = 5
        slots = np.arange(4) < rng.integers(2, 5, modules)[:, None]
        active = slots & (rng.uniform(size=(modules, 4)) < (0.9 if trial % 3 else 0.5))
        scores = np.where(active, rng.integers(0, 3 if trial % 2 else 50, (modules, 4)), 0).astype(np.float32)
        count = int(rng.integers(1, 6))
        kept, grown = map(np.asarray, choose(scores, active, slots, count))
        left, new = in_turns(scores, active, slots, count)
        assert {m: np.flatnonzero(kept[m]).tolist() for m in range(modules)} == {m: list(r) for m, r in left.items()}
        assert sorted(zip(*np.nonzero(grown))) == sorted(new)
    assert choose._cache_size() == 1


@pytest.mark.once
def test_eight_ranks_over_three_modules_are_three_three_and_two():
    active = np.arange(12) < np.array([[4], [4], [4], [8]])
    scores = np.where(active, np.float32([[5], [7], [6], [1]]), 0)
    kept, grown = jit(chosen)(scores, active, np.ones((4, 12), bool), 8)
    assert grown.sum(1).tolist() == [2, 3, 3, 0] and kept.sum(1).tolist() == [4, 4, 4, 0]


@pytest.mark.once
def test_where_every_module_would_lose_a_rank_fewer_are_pruned():
    choose = jit(chosen)
    active = np.arange(3) < np.array([[2], [2]])
    kept, grown = choose(np.float32([[0, 9, 0], [1, 8, 0]]), active, np.ones((2, 3), bool), 2)
    assert kept.tolist() == [[False, True, False], [True, True, False]]
    assert grown.tolist() == [[False] * 3, [False, False, True]]
    single = np.ones((3, 1), bool) & np.array([True, False])
    for _ in range(4):
        kept, grown = choose(np.where(single, np.float32([[1], [2], [3]]), 0), single, np.ones((3, 2), bool), 3)
        single = np.asarray(kept) | np.asarray(grown)
    assert single.sum() == 3


def test_a_round_leaves_the_base_to_its_owner():
    params = {"w": jnp.eye(4), "head": jnp.ones((4, 4))}
    adapted = jlora.adapterize(params, {"w": jlora.ALoRA(2, steps=9, interval=3), "head": jlora.Full()})
    tx = optax.sgd(0.1)
    fn = lambda adapted, x: jnp.mean(jlora.lift(lambda p, x: x @ p["w"] @ p["head"])(adapted, x) ** 2)
    # As a restored checkpoint may be; of copies, since a view on the host would keep the base's array from being donated.
    held = jax.device_get(jax.tree.map(jnp.copy, adapted))
    jlora.reallocate(adapted, tx.init(adapted.params), tx, fn, jnp.ones((2, 4)), jax.random.key(0))
    np.testing.assert_array_equal(params["head"], 1.0)
    moved, _ = jlora.reallocate(held, tx.init(held.params), tx, fn, jnp.ones((2, 4)), jax.random.key(0))
    assert moved.frozen["w"]["gate"].sum() == 2


def test_a_rank_whose_score_is_no_number_is_the_worst():
    active = jnp.ones((2, 2), bool)
    alone = lambda table: jnp.where(jnp.array_equal(table, jnp.eye(4, dtype=bool)[2].reshape(2, 2)), jnp.nan, -1.0)
    found = rule._scores(alone, active, 4)
    assert np.isfinite(found).all() and int(jnp.argmin(found)) == 2 and int(jnp.sum(found < 0)) == 1


@pytest.mark.once
def test_where_no_score_is_a_number_nothing_moves():
    active = jnp.ones((2, 4), bool).at[:, 2:].set(False)
    params = {"u": jnp.ones((4, 4)), "w": jnp.ones((4, 4))}
    adapted = jlora.adapterize(params, {".*": jlora.ALoRA(2, max_rank=4, steps=9, interval=3)})
    tx = optax.sgd(0.1)
    lost = lambda adapted, x: jnp.nan * jnp.sum(jlora.lift(lambda p, x: x @ p["u"] @ p["w"])(adapted, x))
    moved, _ = jlora.reallocate(adapted, tx.init(adapted.params), tx, lost, jnp.ones((2, 4)), jax.random.key(0))
    for n, name in enumerate("uw"):
        np.testing.assert_array_equal(moved.frozen[name]["gate"] != 0, active[n])


@pytest.fixture(scope="module")
def rounds():
    """What is adapted before a first and after each of two rounds, with a step between them, and the states."""
    adapted = jit(lambda key: perturbed(jlora.adapterize(BASE, SPEC, key)))(jax.random.key(0))
    params = {
        name: fields if name == "rest" else {**fields, **_masked(fields, adapted.frozen[name]["gate"])}
        for name, fields in adapted.params.items()
    }
    params["p"]["b"] = params["p"]["b"].at[1].set(0)
    adapted = adapted.replace(params=params)
    tx = optax.chain(optax.clip_by_global_norm(1.0), jlora.optimizer(adapted, optax.adamw, 0.01, weight_decay=0.1))

    @jit
    def step(adapted, state):
        gradients = jax.grad(lambda p: loss(adapted.replace(params=p), (X, Y)))(adapted.params)
        updates, state = tx.update(gradients, state, adapted.params)
        return adapted.replace(params=optax.apply_updates(adapted.params, updates)), state

    course = [(adapted, tx.init(adapted.params))]
    before = rule._round._cache_size()
    for number in range(2):
        course.append(step(*course[-1]))
        given = jax.tree.map(jnp.copy, course[-1])
        course.append(jlora.reallocate(*given, tx, loss, (X, Y), jax.random.key(number)))
    course.append(step(*course[-1]))
    assert step._cache_size() == 1 and rule._round._cache_size() == before + 1
    return tx, course


def _masked(fields, gate):
    return {"a": fields["a"] * gate[..., None, :], "b": fields["b"] * gate[..., :, None]}


NAMES = ["p", "q", "stack[0]", "stack[1]"]


def table(adapted):
    """The gates of the modules in the plan's order, `[4, 6]`."""
    gates = [adapted.frozen[name]["gate"] for name in ("p", "q", "stack")]
    return np.concatenate([np.asarray(gate).reshape(-1, 6) for gate in gates])


def loss_of(adapted, on):
    """The loss with the weights written out in numpy, with the ranks of a table switched on."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), adapted.params)
    delta = lambda name, scale, row, at=...: scale * (p[name]["a"][at] * on[row]) @ p[name]["b"][at]
    q = BASE["q"] + delta("q", 2.0, 1)
    weights = {
        "p": BASE["p"] + delta("p", 4.0, 0),
        "q": q * p["q"]["m"] / np.linalg.norm(q, axis=0),
        "stack": np.stack([BASE["stack"][n] + delta("stack", 4.0, 2 + n, n) for n in range(2)]),
        "rest": BASE["rest"] + 4.0 * p["rest"]["a"] @ p["rest"]["b"],
    }
    x = np.tanh(X @ weights["p"])
    for n in range(2):
        x = np.tanh(x @ weights["stack"][n])
    return float(np.mean((np.tanh(x @ weights["q"]) @ weights["rest"] - Y) ** 2))


@pytest.mark.once
def test_scores_are_losses_with_weights_written_out_and_decide_the_round(rounds):
    _, course = rounds
    for before, after in ((course[1][0], course[2][0]), (course[3][0], course[4][0])):
        active = table(before) != 0
        scores = np.zeros((4, 6))
        for m, r in zip(*np.nonzero(active)):
            one = np.zeros((4, 6))
            one[m, r] = 1
            scores[m, r] = loss_of(before, active - one) - loss_of(before, one)
        got = scored(before, active)
        np.testing.assert_allclose(got, scores, rtol=1e-3, atol=1e-5)
        left, grown = in_turns(scores, active, np.ones((4, 6), bool), 3)
        wanted = np.zeros((4, 6))
        for m in range(4):
            wanted[m, left[m]] = 1
        for spot in grown:
            wanted[spot] = 1
        assert np.array_equal(table(after), wanted)
    assert table(course[2][0]).sum() == 2 + 3 + 2 * 2


@jit
def scored(adapted, active):
    """The scores of a round, before it chooses."""
    gates = [adapted.frozen[name]["gate"] for name in ("p", "q", "stack")]
    return rule._scores(rule._switched(adapted, loss, (X, Y), sites(adapted), gates), active, 9)


def sites(adapted):
    return tuple(site for site in adapted.plan.sites if site.path != "rest")


@pytest.mark.once
def test_a_rank_without_output_is_missed_by_nobody(rounds):
    adapted = rounds[1][0][0]
    on = table(adapted)
    without = on.copy()
    without[0, 1] = 0  # p's second rank has a row of zeros in b
    assert loss_of(adapted, on) == loss_of(adapted, without)


@pytest.mark.once
def test_pruned_ranks_are_zero_new_ones_change_nothing_and_neither_has_moments(rounds):
    _, course = rounds
    (before, _), (after, state) = course[1:3]
    old, new = table(before) != 0, table(after) != 0
    assert (old & ~new).sum() == 3 and (new & ~old).sum() == 3
    survived = loss_of(before, old & new)
    assert loss_of(after, new) == pytest.approx(survived, rel=1e-5)
    moments = [tree for tree in _trees(state) if "stack" in tree]
    assert len(moments) >= 2
    for row, (name, at) in enumerate([("p", ...), ("q", ...), ("stack", 0), ("stack", 1)]):
        a, b = (np.asarray(after.params[name][field])[at] for field in "ab")
        assert not a[:, ~new[row]].any() and not b[~new[row]].any()
        fresh = new[row] & ~old[row]
        assert a[:, fresh].all() and not b[fresh].any()
        np.testing.assert_array_equal(
            a[:, new[row] & old[row]], np.asarray(before.params[name]["a"])[at][:, new[row] & old[row]]
        )
        for tree in moments:
            for field, axis in (("a", -1), ("b", -2)):
                if hasattr(tree[name][field], "shape"):
                    moment = np.moveaxis(np.asarray(tree[name][field])[at], axis, 0)
                    assert not moment[~(new[row] & old[row])].any() and moment[new[row] & old[row]].any()


def _trees(state):
    """Adam's moments, wherever they are."""
    found = []

    def one(node):
        if isinstance(node, optax.ScaleByAdamState):
            found.extend([node.mu, node.nu])
        return node

    jax.tree.map(one, state[1].inner, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))
    return found


@pytest.mark.once
def test_what_is_out_of_use_stays_zero_in_later_steps(rounds):
    adapted = rounds[1][-1][0]
    off = table(adapted) == 0
    assert off.any()
    for row, (name, at) in enumerate([("p", ...), ("q", ...), ("stack", 0), ("stack", 1)]):
        assert not np.asarray(adapted.params[name]["a"])[at][:, off[row]].any()
        assert not np.asarray(adapted.params[name]["b"])[at][off[row]].any()


@pytest.mark.once
def test_ranks_their_history_and_compact_know_of_the_rounds(rounds):
    _, course = rounds
    for step, (adapted, state) in zip((0, 1, 1, 2, 2, 3), course):
        numbers = table(adapted).sum(1).astype(int).tolist()
        assert jlora.ranks(adapted, state) == jlora.ranks(adapted) == dict(zip(NAMES, numbers))
        history = jlora.rank_history(adapted, state)
        assert list(history.names) == NAMES and history.ranks[step].tolist() == numbers
    adapted = course[-1][0]
    small = jlora.compact(adapted)
    assert not small.frozen and small.params["p"]["a"].shape == (8, max(1, int(table(adapted)[0].sum())))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), jlora.merge(small), jlora.merge(adapted)
    )


@pytest.mark.once
def test_rounds_come_by_the_method_s_schedule_on_the_middle_batch(rounds):
    tx, course = rounds
    adapted, state = jax.tree.map(jnp.copy, course[1])
    event = METHOD.event
    assert [step for step in range(13) if event.due(step)] == [4, 7, 10]
    key = jax.random.key(0)
    assert not jlora.ALoRA(2, steps=9, interval=3).event.due(9), "a round after the last step"
    assert jlora.run_events(adapted, state, tx, key, 5) == (adapted, state)
    with pytest.raises(ValueError, match="p: ALoRA scores ranks by a loss on held-out data"):
        jlora.run_events(adapted, state, tx, key, 4)
    said = []
    batches = [None, (X, Y), None]  # the others would fail
    adapted, state = jlora.run_events(adapted, state, tx, key, 4, loss, batches, said.append)
    assert said == ["ALoRA: 3 ranks moved, 9 in use"] and sum(jlora.ranks(adapted, state).values()) == 9


def test_what_makes_no_sense_is_refused():
    for changes, message in [
        ({"rank": 0}, "rank must be a positive whole number, got 0"),
        ({"max_rank": 1}, r"max_rank \(1\) is below the rank that it starts with \(2\)"),
        ({"pruned": 0}, "pruned must be a positive whole number, got 0"),
        ({"steps": 6, "start_steps": 4, "final_steps": 2}, r"leave none of the 6 steps"),
        ({"steps": 80}, r"interval \(100\) is longer than the run's 80 steps"),
    ]:
        with pytest.raises(ValueError, match=f"ALoRA's .*{message}"):
            jlora.ALoRA(**{"rank": 2, **changes})
    adapted = jlora.adapterize({"w": jnp.ones((4, 4))}, {"w": jlora.LoRA(2)})
    with pytest.raises(ValueError, match="reallocate found no leaf with ALoRA"):
        jlora.reallocate(adapted, (), optax.sgd(0.1), loss, (X, Y), jax.random.key(0))
    with pytest.raises(ValueError, match="w: ALoRA follows a schedule over the whole run"):
        jlora.optimizer(jlora.adapterize({"w": jnp.ones((4, 4))}, {"w": jlora.ALoRA(2)}), optax.sgd, 0.1)
