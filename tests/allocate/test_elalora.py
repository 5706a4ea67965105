"""ElaLoRA against a loop in numpy with lists of ranks, by the paper's rules; what a round may change and what not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.problems import jit

import jlora
from jlora import paths
from jlora.methods.elalora import rule
from jlora.optimize.allocate import budget, orthogonality
from jlora.optimize.allocate.budget import Phases

RATE, MOMENTUM, RANK, ROOM, STEPS, START, FINAL, INTERVAL, MOVED, EACH = 0.1, 0.5, 2, 4, 33, 3, 5, 4, 3, 2
METHOD = jlora.ElaLoRA(RANK, ROOM, 6, STEPS, START, FINAL, INTERVAL, MOVED, EACH, orthogonality=0.0)
BASE = {"down": jnp.zeros((5, 9)), "layers": jnp.zeros((2, 6, 8)), "up": jnp.zeros((7, 4))}
SPEC = {"layers": jlora.Axes("batch in out", METHOD), ".*": METHOD}
MODULES = ["down", "layers[0]", "layers[1]", "up"]


def module(tree, name):
    """A module's part of a tree, along any leading axes of time; `layers` is a stack."""
    path, _, index = name.partition("[")
    part = paths.lookup(tree, tuple(path.split("/")))
    return jax.tree.map(lambda x: x[:, int(index[0])], part) if index else part


@pytest.fixture(scope="module")
def run():
    """Starting params, gradients, and the params and states of every step; e is random at first, so that ranks differ."""
    adapted = jlora.adapterize(BASE, SPEC)
    params = jax.tree.map(jnp.array, adapted.params)
    rng = np.random.default_rng(3)
    for name in BASE:
        e = rng.standard_normal(params[name]["e"].shape).astype(np.float32)
        params[name]["e"] = jnp.where(jnp.arange(ROOM) < RANK, e, 0)
        params[name]["a"] *= 20
    # Gradients of very different sizes, so that some modules want ranks badly.
    size = {"down": 1.0, "layers": 3.0, "up": 0.3}
    gradients = {
        name: {f: (size[name] * rng.standard_normal((STEPS, *x.shape))).astype(np.float32) for f, x in fields.items()}
        for name, fields in params.items()
    }
    tx = jlora.with_rules(adapted, optax.sgd(RATE, momentum=MOMENTUM))

    def step(carry, gradient):
        p, state = carry
        updates, state = tx.update(gradient, state, p)
        p = optax.apply_updates(p, updates)
        return (p, state), (p, state)

    found = jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), gradients)[1])(params)
    return adapted, jax.device_get(params), gradients, *jax.device_get(found)


class Loop:
    """The reference: every module a list of ranks, each with its values and averages in float64."""

    def __init__(self, params):
        self.modules = {}
        for name in MODULES:
            fields = module(jax.tree.map(lambda x: x[None], params), name)
            self.modules[name] = {f: np.array(x[0], np.float64) for f, x in fields.items()}
        self.active = {name: list(range(RANK)) for name in MODULES}
        zeros = lambda name: {f: np.zeros_like(x) for f, x in self.modules[name].items()}
        self.sensitivity, self.uncertainty, self.momentum = ({name: zeros(name) for name in MODULES} for _ in range(3))

    def clear(self, name, rank):
        """A rank goes, or a new one begins: nothing of an earlier one is left."""
        for tree in (self.modules, self.sensitivity, self.uncertainty, self.momentum):
            fields = tree[name]
            fields["a"][:, rank], fields["e"][rank], fields["b"][rank] = 0, 0, 0

    def step(self, t, gradients, outcome):
        """One update; the directions of new ranks are taken from the outcome, after they were looked at."""
        for name, fields in self.modules.items():
            for f, gradient in gradients[name].items():
                self.momentum[name][f] = MOMENTUM * self.momentum[name][f] + gradient
                fields[f] -= RATE * self.momentum[name][f]
        if t < STEPS - FINAL:
            self.smooth(gradients)
        for name, held in self.active.items():
            for rank in set(range(ROOM)) - set(held):
                self.clear(name, rank)
        part = min(max((t - START) / (STEPS - FINAL - START), 0), 1)
        count = round(MOVED * (1 - part**3))
        if t > START and (t - START) % INTERVAL == 0 and t < STEPS - FINAL and count:
            self.round(count, outcome)

    def smooth(self, gradients):
        for name, fields in self.modules.items():
            for f, value in fields.items():
                now = np.abs(value * gradients[name][f])
                mean = self.sensitivity[name][f] = 0.85 * self.sensitivity[name][f] + 0.15 * now
                self.uncertainty[name][f] = 0.85 * self.uncertainty[name][f] + 0.15 * np.abs(now - mean)

    def scores(self, name):
        a, e, b = (self.sensitivity[name][f] * self.uncertainty[name][f] for f in "aeb")
        return e + a.mean(0) + b.mean(1)

    def round(self, count, outcome):
        pool = []
        for name in MODULES:
            scores, held = self.scores(name), self.active[name]
            weakest = sorted(held, key=lambda rank: scores[rank])[: min(EACH, len(held) - 1)]
            pool += [(scores[rank], name, rank) for rank in weakest]
        room = {name: ROOM - len(self.active[name]) for name in MODULES}
        free = {name: [r for r in range(ROOM) if r not in self.active[name]] for name in MODULES}
        grow = []
        for _, name, _ in sorted(pool, reverse=True):
            if len(grow) < count and grow.count(name) < room[name]:
                grow.append(name)
        for _, name, rank in sorted(pool)[: len(grow)]:
            self.active[name].remove(rank)
            self.clear(name, rank)
        for name in grow:
            self.grow(name, free[name].pop(0), outcome[name])

    def grow(self, name, rank, outcome):
        fields, held = self.modules[name], self.active[name]
        for f, vectors in (("a", fields["a"].T), ("b", fields["b"])):
            new = outcome[f][:, rank] if f == "a" else outcome[f][rank]
            assert abs(np.linalg.norm(new) - 1) < 1e-6
            for old in held:
                assert abs(vectors[old] @ new) < 1e-6 * max(1, np.linalg.norm(vectors[old])), "not at a right angle"
            vectors[rank] = new
        wanted = min([1e-13, *(abs(fields["e"][old]) for old in held)])
        assert outcome["e"][rank] == np.float32(wanted)
        fields["e"][rank] = wanted
        held.append(rank)


@pytest.mark.once
def test_values_masks_averages_and_moments_are_those_of_a_loop_over_lists_of_ranks(run):
    _, params, gradients, after, states = run
    loop, moved, full = Loop(params), 0, 0
    for t in range(1, STEPS + 1):
        trees = (
            gradients,
            after,
            states.active,
            states.memory.sensitivity,
            states.memory.uncertainty,
            states.inner[0].trace,
        )
        now = jax.tree.map(lambda x: x[t - 1 : t], trees)
        gradient, outcome, active, *kept = (
            {n: jax.tree.map(lambda x: x[0], module(x, n)) for n in MODULES} for x in now
        )
        before = {name: set(held) for name, held in loop.active.items()}
        loop.step(t, gradient, outcome)
        for name in MODULES:
            assert sorted(loop.active[name]) == np.flatnonzero(active[name]).tolist(), f"step {t}, {name}"
            moved += len(set(loop.active[name]) - before[name])
            full += len(loop.active[name]) == ROOM
            wanted = (loop.modules, loop.sensitivity, loop.uncertainty, loop.momentum)
            for mine, theirs in zip((outcome, *kept), wanted):
                for f, value in theirs[name].items():
                    np.testing.assert_allclose(mine[name][f], value, rtol=1e-4, atol=1e-5)
    assert moved >= 8 and full > 0, "the test moves too few ranks to show anything, or no module fills up"


@pytest.mark.once
def test_the_total_never_changes_and_no_module_loses_its_last_rank(run):
    adapted, _, _, _, states = run
    ranks = states.history.ranks[-1]
    assert states.history.steps[-1].tolist() == list(range(STEPS + 1))
    assert np.all(ranks.sum(-1) == RANK * len(MODULES)) and np.all(ranks >= 1) and np.all(ranks <= ROOM)
    assert np.all(np.abs(np.diff(ranks, axis=0)) <= EACH)
    last = jax.tree.map(lambda x: x[-1], states)
    assert jlora.ranks(adapted, last) == dict(zip(MODULES, ranks[-1].tolist()))


@pytest.mark.once
def test_ranks_out_of_use_are_zero_in_all_factors_averages_and_moments(run):
    _, _, _, after, states = run
    for tree in (after, states.memory.sensitivity, states.memory.uncertainty, states.inner[0].trace):
        for name in BASE:
            gone = ~np.asarray(states.active[name])
            assert np.all(np.moveaxis(tree[name]["a"], -1, -2)[gone] == 0)
            assert np.all(tree[name]["e"][gone] == 0) and np.all(tree[name]["b"][gone] == 0)


@pytest.mark.once
def test_masks_are_constant_in_the_first_and_the_final_steps(run):
    for name in BASE:
        masks = run[4].active[name]
        assert np.all(masks[: START + INTERVAL - 1] == masks[0])
        assert np.all(masks[STEPS - FINAL - 1 :] == masks[-1])


def test_fewer_ranks_move_as_the_run_goes_on():
    phases = Phases(STEPS, START, FINAL, INTERVAL)
    schedule = budget.cubic_moves(phases, 4)
    falls = budget.falls(schedule, START, phases.last)
    counts = [int(budget.after(4, falls, jnp.asarray(t))) for t in range(1, STEPS + 1)]
    assert counts == [schedule(t) for t in range(1, STEPS + 1)]
    assert counts[START - 1] == 4 and counts[phases.last - 1 :] == [0] * (FINAL + 1)


def test_a_round_with_equal_scores_moves_exactly_what_it_should():
    active = jnp.arange(4) < jnp.array([[2], [3], [1]])
    slots = jnp.ones((3, 4), bool).at[0, 3].set(False)
    kept, grows = rule.exchange(jnp.ones((3, 4)), active, slots, 2, 2)
    assert grows.tolist() == [1, 1, 0], "of equal scores the first; the last module's only rank is in no pool"
    assert kept.tolist() == [[False, True, False, False], [False, True, True, False], [True, False, False, False]]


def test_where_there_is_no_room_nothing_moves():
    active = jnp.ones((3, 2), bool)
    kept, grows = rule.exchange(jnp.arange(6.0).reshape(3, 2), active, active, 4, 1)
    assert kept.all() and not grows.any()


def test_a_full_module_passes_its_turn_to_the_next():
    active = jnp.array([[True, True], [True, True], [True, False]]).repeat(2, axis=1)
    scores = jnp.array([[9.0] * 4, [1.0] * 4, [5.0] * 4])
    kept, grows = rule.exchange(scores, active, jnp.ones((3, 4), bool), 3, 2)
    assert grows.tolist() == [0, 0, 1], "one place: the third module's only pooled rank stands for one"
    assert (active & ~kept).sum(-1).tolist() == [0, 1, 0]


def test_new_columns_are_orthogonal_also_to_nearly_dependent_ones():
    rng = np.random.default_rng(0)
    m = rng.standard_normal((2, 9, 6)).astype(np.float32)
    m[0, :, 1] = 50 * m[0, :, 0] + 1e-3 * m[0, :, 1]
    m[1, :, 2] = 0
    old, new = (
        jnp.array([[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]], bool),
        jnp.array([[0, 0, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0]], bool),
    )
    got = np.asarray(
        orthogonality.with_new_columns(jnp.asarray(m), old, new, jnp.asarray(rng.standard_normal(m.shape), jnp.float32))
    )
    for one, before, keep, fresh in zip(got, m, np.asarray(old), np.asarray(new)):
        assert np.array_equal(one[:, ~fresh], before[:, ~fresh])
        np.testing.assert_allclose(one[:, fresh].T @ one[:, fresh], np.eye(fresh.sum()), atol=1e-6)
        lengths = np.maximum(np.linalg.norm(one[:, keep], axis=0), 1)
        assert np.all(np.abs(one[:, fresh].T @ (one[:, keep] / lengths)) < 1e-6)


@pytest.mark.once
def test_growing_changes_the_weight_by_next_to_nothing(run):
    after, states = run[3:]
    grew = [t for t in range(1, STEPS) if np.any(states.active["layers"][t] & ~states.active["layers"][t - 1])]
    assert grew
    for t in grew:
        p, old = after["layers"], states.active["layers"][t - 1]
        e = np.where(old, 0, p["e"][t])
        change = np.einsum("nir,nr,nro->nio", p["a"][t].astype(np.float64), e, p["b"][t])
        assert 0 < np.abs(change).max() <= 1.01e-13


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_rank": 3}, r"max_rank \(3\) is below the rank that it starts with \(4\)"),
        ({"moved": 0}, "moved must be a positive whole number, got 0"),
        ({"anneal": 1}, "anneal must be True or False, got 1"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"steps": 2}, r"start_steps \(1\) and final_steps \(1\) leave none of the 2 steps"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"ElaLoRA's .*{message}"):
        jlora.ElaLoRA(**{"rank": 4, **changes})


def test_room_for_growth_is_twice_the_rank_or_all_there_is():
    adapted = jlora.adapterize(BASE, {"up": jlora.ElaLoRA(3), "down": jlora.ElaLoRA(2)})
    assert adapted.params["up"]["e"].shape == (4,) and adapted.params["down"]["e"].shape == (4,)
    assert np.any(adapted.params["up"]["a"] != 0, axis=0).tolist() == [True, True, True, False]
    with pytest.raises(ValueError, match="up.*max_rank 5 is above the smaller side of the 7 x 4 matrix; use 4 or less"):
        jlora.adapterize(BASE, {"up": jlora.ElaLoRA(3, max_rank=5)})


@pytest.mark.once
def test_the_first_step_of_a_new_rank_is_rounding_that_a_larger_eps_of_adam_damps():
    """In exact numbers a new rank's `a` and `b` have no gradient at first: what there is is the penalty's rounding."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    x, y, base = draw(32, 16), draw(32, 16), {"u": draw(16, 16) / 4, "v": draw(16, 16) / 4}
    fn = jlora.lift(lambda params, x: jnp.tanh(x @ params["u"]) @ params["v"])
    method = jlora.ElaLoRA(4, 8, 16, 40, 5, 5, 5, 3, anneal=False)
    adapted = jlora.adapterize(base, {".*": method})
    nudge = jax.tree.map(lambda leaf: np.sign(draw(*leaf.shape)), adapted.params)

    def step(carry, _, eps):
        params, state = carry
        loss = lambda p: jnp.mean((fn(adapted.replace(params=p), x) - y) ** 2)
        tx = jlora.optimizer(adapted, optax.adam, 1e-3, eps=eps)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        carry = optax.apply_updates(params, updates), state
        return carry, carry[0]

    def run(eps, size):
        params = jax.tree.map(lambda p, n: p * (1 + size * n), adapted.params, nudge)
        state = jlora.optimizer(adapted, optax.adam, 1e-3).init(params)
        return jax.lax.scan(lambda carry, each: step(carry, each, eps), (params, state), length=11)[1]

    runs = jit(jax.vmap(run))(jnp.float32([1e-8, 1e-8, 1e-6, 1e-6]), jnp.float32([0, 1.2e-7, 0, 1.2e-7]))
    a = np.asarray(runs["u"]["a"]), np.asarray(runs["v"]["a"])
    assert any(np.any((m[0, 8] == 0).all(0) & (m[0, 9] != 0).any(0)) for m in a), "no rank is new in step 10"
    apart = lambda first, second, t: max(np.abs(m[first, t] - m[second, t]).max() for m in a)
    assert max(apart(0, 1, 8), apart(2, 3, 8), apart(2, 3, 10)) < 2e-6
    assert apart(0, 1, 10) > 5 * apart(2, 3, 10) and apart(0, 1, 10) > 5e-6
    assert apart(0, 1, 10) < 3.2e-3, "three learning rates"
