"""Rank allocation in a user's loop: mixed with other methods, stopped and resumed, accumulated, in 16 bits, on a mesh."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from contract.problems import jit, normal, weight
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora.optimize.allocate.history import RankHistory
from jlora.optimize.allocate.transform import _states

PHASES = {"steps": 12, "start_steps": 2, "final_steps": 3}
ADA = jlora.AdaLoRA(rank=3, target=2, interval=2, **PHASES)
ELA = jlora.ElaLoRA(rank=2, max_rank=4, interval=2, moved=2, **PHASES)
SORA = jlora.SoRA(rank=4, threshold=0.15, l1=0.5, target=2, **PHASES)
BEAM = jlora.BeamLoRA(rank=4, temperature=0.3, top_p=0.6, steps=12, final_steps=3, interval=2)
MASKED = jlora.RMLoRA(rank=3, updated=2)
WIDER = jlora.AdaLoRA(rank=4, target=2, alpha=3, interval=2, **PHASES)
# p and q have one budget, though q's rank and alpha are others, and DoRA is around it.
SPEC = {"p": ADA, "q": jlora.DoRA(WIDER), "stack": jlora.Axes("batch in out", ELA), "bias": jlora.Full()}
SPEC |= {"gated": SORA, "beams": jlora.Axes("batch in out", BEAM), "masked": MASKED}
BASE = {"p": weight(0, 8, 8), "q": weight(1, 8, 8), "stack": weight(2, 3, 8, 8), "bias": jnp.zeros(8)}
BASE |= {"gated": weight(5, 8, 8), "beams": weight(6, 2, 8, 8), "masked": weight(7, 8, 8)}
X, Y = normal(3, 16, 8), normal(4, 16, 8)


GROUPS = [("p", "q", "stack", "bias"), pytest.param(("gated", "beams", "masked"), marks=pytest.mark.long)]


def model(params, x):
    if "p" in params:
        x = jnp.tanh(x @ params["p"]) @ params["q"] + params["bias"]
    else:
        x = jnp.tanh(x @ params["gated"] @ params["masked"])
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params.get("stack", params.get("beams")))[0]


def start(names=GROUPS[0], dtype=jnp.float32):
    base = {name: BASE[name].astype(dtype) for name in names}
    adapted = jlora.adapterize(base, {name: SPEC[name] for name in names})
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), jlora.optimizer(adapted, optax.adamw, 0.05, ratio=2, weight_decay=0.1)
    )
    return adapted, tx


def make_step(adapted, tx, x=X, y=Y):
    def loss(p):
        return jnp.mean((jlora.lift(model)(adapted.replace(params=p), x) - y).astype(jnp.float32) ** 2)

    @jit
    def step(p, state):
        updates, state = tx.update(jax.grad(loss)(p), state, p)
        return optax.apply_updates(p, updates), state

    return step


@pytest.fixture(scope="module", params=GROUPS, ids=str)
def trained(request):
    """What is adapted, its step, the params and states before every step and after the last."""
    adapted, tx = start(request.param)
    step = make_step(adapted, tx)
    course = [(adapted.params, tx.init(adapted.params))]
    for _ in range(12):
        course.append(step(*course[-1]))
    return adapted, step, course


@pytest.mark.once
def test_one_compilation_serves_the_whole_schedule(trained):
    assert trained[1]._cache_size() == 1


def in_use(params, name):
    return int(np.sum(np.asarray(params[name]["e"]) != 0))


@pytest.mark.once
def test_sites_with_equal_rules_share_a_budget_and_methods_mix(trained):
    adapted, _, course = trained
    params, state = course[-1]
    ranks, history = jlora.ranks(adapted, state), jlora.rank_history(adapted, state)
    assert list(history.names) == list(ranks) and history.ranks[-1].tolist() == list(ranks.values())
    if "p" not in params:
        assert ranks == {"beams[0]": 4, "beams[1]": 4, "gated": 2} and history.ranks[0].tolist() == [4, 4, 4]
        return
    assert in_use(params, "p") + in_use(params, "q") == 2 * 2
    assert list(ranks) == ["p", "q", "stack[0]", "stack[1]", "stack[2]"]
    assert ranks["p"] == in_use(params, "p") and ranks["q"] == in_use(params, "q")
    assert sum(ranks[f"stack[{n}]"] for n in range(3)) == 2 * 3
    assert history.ranks[0].tolist() == [3, 4, 2, 2, 2]
    assert np.any(history.ranks[:, 2:] != 2), "no rank moved"
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(params["bias"]))


@pytest.mark.once
def test_a_run_resumed_in_the_middle_of_a_schedule_ends_with_the_same_bits(trained, tmp_path):
    adapted, step, course = trained
    fresh, tx = start(tuple(adapted.base))
    like = jax.eval_shape(lambda: (fresh.params, tx.init(fresh.params)))
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", course[5])
    with ocp.StandardCheckpointer() as loader:
        params, state = loader.restore(tmp_path / "state", like)
    for _ in range(7):
        params, state = step(params, state)
    jax.tree.map(np.testing.assert_array_equal, (params, state), course[-1])
    assert step._cache_size() <= 2, "restored arrays may be placed otherwise, once"
    before, after = (jlora.ranks(adapted, course[n][1]) for n in (5, 12))
    assert before != after, "nothing is left to decide after the stop"


@pytest.mark.once
def test_gradients_accumulated_outside_count_as_one_step():
    adapted = jlora.adapterize({"p": BASE["p"]}, {"p": ADA})
    inner = jlora.optimizer(adapted, optax.adamw, 0.05)
    tx = optax.MultiSteps(inner, every_k_schedule=2)

    @jit
    def both(p, gradient):
        wanted, state = inner.update(gradient, inner.init(p), p)
        many = tx.init(p)
        for part in (0.5, 1.5):
            updates, many = tx.update(jax.tree.map(lambda g: part * g, gradient), many, p)
        return wanted, state, updates, many

    p = adapted.params
    wanted, state, updates, many = both(p, jax.tree.map(lambda x: normal(5, *x.shape), p))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), updates, wanted)
    assert jlora.ranks(adapted, many) == jlora.ranks(adapted, state)
    assert jlora.rank_history(adapted, many).steps.tolist() == [0, 1]


@pytest.mark.once
@pytest.mark.long
@pytest.mark.parametrize("names", [getattr(each, "values", [each])[0] for each in GROUPS], ids=str)
def test_a_base_in_16_bits_keeps_its_budget(names):
    adapted, tx = start(names, jnp.bfloat16)
    step, p = make_step(adapted, tx, X.astype(jnp.bfloat16), Y.astype(jnp.bfloat16)), adapted.params
    state = tx.init(p)
    kinds = jax.tree.map(lambda x: x.dtype, (p, state))
    for _ in range(12):
        p, state = step(p, state)
    assert jax.tree.map(lambda x: x.dtype, (p, state)) == kinds
    ranks = jlora.ranks(adapted, state)
    if "p" in names:
        assert in_use(p, "p") + in_use(p, "q") == 4 == sum(ranks[name] for name in "pq")
    else:
        assert ranks["gated"] == 2


def updates_only(names, place):
    """Five steps with given gradients of some leaves, whose arrays `place` puts somewhere."""
    base = {name: BASE[name] for name in names}
    adapted = jlora.adapterize(base, {name: SPEC[name] for name in base})
    tx = jlora.with_rules(adapted, optax.adam(0.05))
    gradient = jax.tree.map(lambda x: normal(6, *x.shape), adapted.params)
    p, gradient = (jax.tree_util.tree_map_with_path(place, tree) for tree in (adapted.params, gradient))

    @jit
    def step(p, state, gradient):
        updates, state = tx.update(gradient, state, p)
        return optax.apply_updates(p, updates), state

    state = tx.init(p)
    for _ in range(5):
        p, state = step(p, state, gradient)
    return adapted, p, state


LEAVES = [("p", "stack"), pytest.param(("gated", "beams", "masked"), marks=pytest.mark.long)]


@pytest.fixture(scope="module", params=LEAVES, ids=str)
def alone(request):
    """On one device."""
    return request.param, *updates_only(request.param, lambda _, leaf: leaf)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_on_a_mesh_it_is_the_same_and_the_state_lies_as_the_params(alone, kind):
    names, adapted, params, state = alone
    mesh = jax.make_mesh((2, 4), ("data", "model"), (kind,) * 2)
    cuts = {"a": ("model", None), "b": (None, "data"), "e": (), "g": (), "score": ()}

    def place(keys, leaf):
        cut = cuts[keys[-1].key]
        return jax.device_put(leaf, NamedSharding(mesh, P(*(None,) * (leaf.ndim - len(cut)), *cut)))

    with jax.set_mesh(mesh):
        _, on_mesh, state_there = updates_only(names, place)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, *jax.device_get(((on_mesh, state_there), (params, state))))
    memories = [state.memory for state in _states(state_there)]
    trees = [tree for memory in memories for tree in jax.tree.leaves(memory, is_leaf=lambda x: isinstance(x, dict))]
    for tree, name in ((tree, name) for tree in trees for name in names):
        for field in "ab":
            if hasattr(array := tree[name][field], "sharding"):
                assert array.sharding.is_equivalent_to(on_mesh[name][field].sharding, array.ndim)
    assert len(trees) >= 3, "averages, or a snapshot of values and moments"
    start = jlora.rank_history(adapted, state_there).ranks[0].tolist()
    assert list(jlora.ranks(adapted, state_there).values()) != start, "no rank moved"


@pytest.mark.once
def test_what_no_rule_is_about_gets_what_the_optimizer_gives():
    adapted, _ = start()
    gradient = jax.tree.map(lambda x: normal(7, *x.shape), adapted.params)
    plain, tx = optax.sgd(0.1), jlora.with_rules(adapted, optax.sgd(0.1))
    wanted, _ = plain.update(gradient, plain.init(adapted.params), adapted.params)
    got, _ = jit(lambda p, g: tx.update(g, tx.init(p), p))(adapted.params, gradient)
    np.testing.assert_array_equal(got["q"]["m"], wanted["q"]["m"])
    jax.tree.map(np.testing.assert_array_equal, got["bias"], wanted["bias"])


@pytest.mark.once
def test_a_state_without_allocation_is_refused():
    adapted = jlora.adapterize({"w": jnp.ones((4, 4))}, {"w": jlora.LoRA(2)})
    tx = jlora.optimizer(adapted, optax.adam, 1e-3)
    for read in (jlora.ranks, jlora.rank_history):
        with pytest.raises(ValueError, match="holds no rank allocation: make it by jlora.optimizer"):
            read(adapted, tx.init(adapted.params))


@pytest.mark.once
def test_histories_of_different_lengths_are_refused():
    base = {"u": jnp.ones((4, 4)), "w": jnp.ones((4, 4))}
    adapted = jlora.adapterize(base, {"u": jlora.AdaLoRA(2, 1, steps=9), "w": jlora.AdaLoRA(2, 1, steps=300)})
    state = jlora.optimizer(adapted, optax.adam, 1e-3).init(adapted.params)
    assert jlora.ranks(adapted, state) == {"u": 2, "w": 2}
    grown = jax.tree.map(lambda x: x, state)
    with pytest.raises(ValueError, match="allocate ranks over different numbers of steps"):
        jlora.rank_history(adapted, _at_step(grown, 5))


def _at_step(state, step):
    """The state with both counters at a step."""
    from jlora.optimize.allocate.transform import AllocationState

    if not isinstance(state, AllocationState):
        return state
    return state._replace(step=jnp.asarray(step), inner=_at_step(state.inner, step))


@pytest.mark.once
def test_a_history_has_at_most_128_rows_from_the_first_step_to_the_last():
    adapted = jlora.adapterize({"w": jnp.ones((4, 4))}, {"w": jlora.AdaLoRA(2, 1, steps=100_000)})
    rows = jlora.optimizer(adapted, optax.adam, 1e-3).init(adapted.params).history.steps
    assert len(rows) == 128 and rows[0] == 0 and rows[-1] == 100_000
    assert np.ptp(np.diff(rows)) <= 1


HISTORY = RankHistory(np.array([0, 5, 9]), ("u", "w[1]"), np.array([[2, 2], [1, 3], [0, 4]]))


@pytest.mark.once
def test_a_history_is_plotted_as_modules_by_time(tmp_path):
    HISTORY.plot(tmp_path / "ranks.png")
    HISTORY.plot(str(tmp_path / "ranks.svg"))
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "ranks.svg").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranks.png", "ranks.svg"]


@pytest.mark.once
def test_without_matplotlib_the_plot_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="needs matplotlib: pip install matplotlib"):
        HISTORY.plot(tmp_path / "ranks.png")


@pytest.fixture(scope="module")
def guarded():
    """Twelve steps, two of them with a gradient that is not finite: what is adapted, then all states, the start first."""
    adapted = jlora.adapterize({"p": BASE["p"], "stack": BASE["stack"]}, {name: SPEC[name] for name in ("p", "stack")})
    tx = jlora.with_rules(adapted, optax.apply_if_finite(optax.adam(0.05), 3))
    step = jit(lambda g, state, p: tx.update(g, state, p))
    p, states = adapted.params, [tx.init(adapted.params)]
    for number in range(12):
        gradient = jax.tree.map(lambda x: normal(number, *x.shape), p)
        if number in (5, 6):  # the first where both allocate
            gradient["p"]["e"] = gradient["p"]["e"].at[1].set(jnp.nan if number == 6 else jnp.inf)
        updates, state = step(gradient, states[-1], p)
        p = optax.apply_updates(p, updates)
        states.append(state)
    return adapted, p, states


@pytest.mark.once
def test_a_step_with_a_gradient_that_is_not_finite_changes_no_score(guarded):
    _, _, states = guarded
    for number in (5, 6):
        for before, after in zip(_states(states[number]), _states(states[number + 1]), strict=True):
            assert int(after.step) == int(before.step) + 1, "the schedule goes on"
            if number == 6:  # else some averages go with their ranks
                jax.tree.map(np.testing.assert_array_equal, after.memory, before.memory)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves([s.memory for s in _states(states[-1])]))


@pytest.mark.once
def test_skipped_steps_are_counted_and_the_ranks_that_learn_stay(guarded):
    adapted, params, states = guarded
    assert [jlora.skipped_steps(states[number]) for number in (5, 6, 7, 12)] == [0, 1, 2, 2]
    ranks = jlora.ranks(adapted, states[-1])
    assert ranks["p"] == 2 == in_use(params, "p") and sum(ranks[f"stack[{n}]"] for n in range(3)) == 6
    with pytest.raises(ValueError, match="holds no rank allocation"):
        jlora.skipped_steps(optax.adam(1e-3).init(params))


@pytest.mark.once
@pytest.mark.parametrize("name", ["p", "gated", pytest.param("stack", marks=pytest.mark.long)])
def test_updates_that_are_changed_after_the_rule_are_noticed(name):
    adapted = jlora.adapterize({name: BASE[name]}, {name: SPEC[name]})
    tx = optax.chain(jlora.with_rules(adapted, optax.sgd(0.1)), optax.scale(0.5))
    step = jit(lambda g, state, p: tx.update(g, state, p))
    p, state = adapted.params, tx.init(adapted.params)
    for number in range(12):
        updates, state = step(jax.tree.map(lambda x: normal(number, *x.shape), p), state, p)
        p = optax.apply_updates(p, updates)
        if number == 0:
            jlora.ranks(adapted, state)
    for read in (jlora.ranks, jlora.rank_history):
        with pytest.raises(
            ValueError, match=rf"^{name}.*set ranks to zero that were not zero at its next update .*scale"
        ):
            read(adapted, state)


@pytest.mark.once
@pytest.mark.parametrize("name", ["p", "masked"])
@pytest.mark.parametrize(
    ("inside", "message"),
    [
        (optax.MultiSteps(optax.adam(0.1), 2), r"put it around, as in optax.MultiSteps\(jlora.optimizer"),
        (
            optax.chain(optax.adam(0.1), optax.apply_every(2)),
            "have it count and score parts of a step; accumulate outside",
        ),
        (optax.contrib.schedule_free_adamw(0.1), "keeps a second copy of the trained arrays"),
    ],
)
def test_what_a_rule_would_count_wrongly_is_refused(name, inside, message):
    adapted = jlora.adapterize({name: BASE[name]}, {name: SPEC[name]})
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        jlora.with_rules(adapted, inside)
    with pytest.raises(ValueError, match="put it around"):
        jlora.optimizer(adapted, lambda rate: optax.MultiSteps(optax.sgd(rate), 2).gradient_transformation(), 0.1)


@pytest.mark.once
def test_an_optimizer_that_leaves_arrays_their_raw_gradients_is_refused():
    adapted = jlora.adapterize({"p": BASE["p"], "bias": BASE["bias"]}, {"p": ADA, "bias": jlora.Full()})
    tx = jlora.with_rules(adapted, optax.masked(optax.adam(0.1), {"p": True, "bias": False}))
    with pytest.raises(
        ValueError, match="^bias/w: the optimizer gives back its raw gradient as the update, without a rate"
    ):
        tx.update(adapted.params, tx.init(adapted.params), adapted.params)
