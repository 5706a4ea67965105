"""AdaLoRA against PEFT 0.21: budgets, masks, averages and parameters over whole schedules; the penalty; exact budgets."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.problems import jit

import jlora
from jlora.optimize.allocate import budget, orthogonality, triplets
from jlora.optimize.allocate.budget import Phases

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "adalora.npz"))
SHAPES = {"down": (5, 9), "query": (6, 8), "up": (7, 4)}
# As in tests/golden/make_adalora.py: rank, target, steps, start_steps, final_steps, interval.
SCHEDULES = {"every": (4, 2, 12, 0, 0, 1), "phases": (4, 1, 29, 5, 7, 4)}


def close(got, wanted, tolerance=1e-5):
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)


def golden(prefix):
    """The entries below a prefix, as a tree {module: {field: array}}."""
    tree = {}
    for name, value in GOLDEN.items():
        if name.startswith(prefix + "/"):
            module, _, field = name.removeprefix(prefix + "/").partition("/")
            tree.setdefault(module, {})[field] = jnp.asarray(value)
    return tree


def adapted(method):
    base = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    return jlora.adapterize(base, {".*": method})


def run(method, params, gradients, tx=None):
    """The params, the masks and the state after every step of given gradients, stacked."""
    start = adapted(method)
    tx = jlora.with_rules(start, optax.sgd(0.1) if tx is None else tx)

    def step(carry, gradient):
        p, state = carry
        updates, state = tx.update(gradient, state, p)
        p = optax.apply_updates(p, updates)
        return (p, state), (p, state)

    return start, jax.device_get(jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), gradients)[1])(params))


@pytest.fixture(scope="module", params=SCHEDULES)
def case(request):
    """A schedule's label, its setting, the outcome here."""
    label, setting = request.param, SCHEDULES[request.param]
    rank, target, steps, start, final, interval = setting
    method = jlora.AdaLoRA(rank, target, 6, steps, start, final, interval, orthogonality=0.0)
    return label, setting, *run(method, golden(f"{label}/before"), golden(f"{label}/gradients"))


@pytest.mark.once
def test_every_step_of_a_schedule_leaves_the_parameters_that_peft_leaves(case):
    label, _, _, (params, _) = case
    wanted = golden(f"{label}/after")
    for module, fields in wanted.items():
        for field, value in fields.items():
            close(params[module][field], value)
        assert np.array_equal(params[module]["e"] == 0, fields["e"] == 0), "other ranks are masked than in PEFT"
    assert any(np.any(fields["e"] == 0) for fields in wanted.values())


@pytest.mark.once
def test_budgets_are_those_of_peft_and_are_met_exactly(case):
    label, (_, target, steps, start, final, interval), _, (params, state) = case
    for step in range(start + 1, steps + 1):
        if step % interval == 0 or step >= steps - final:
            held = sum(int(np.sum(params[name]["e"][step - 1] != 0)) for name in SHAPES)
            assert (
                held
                == GOLDEN[f"{label}/budgets"][step - 1]
                == sum(int(state.active[n][step - 1].sum()) for n in SHAPES)
            )
    assert held == target * len(SHAPES)


@pytest.mark.once
def test_averages_are_those_of_peft(case):
    label, (_, _, steps, _, final, _), _, (_, state) = case
    for name, tree in (("sensitivity", state.memory.sensitivity), ("uncertainty", state.memory.uncertainty)):
        for module, fields in golden(f"{label}/{name}").items():
            for field, value in fields.items():
                close(tree[module][field][steps - final - 2], value)  # the step before the last allocation


@pytest.mark.once
def test_masks_are_constant_after_the_last_allocation(case):
    _, (_, _, steps, _, final, _), _, (params, _) = case
    for name in SHAPES:
        masks = np.asarray(params[name]["e"][steps - final - 1 :] != 0)
        assert np.array_equal(masks, np.broadcast_to(masks[0], masks.shape))


@pytest.mark.once
def test_the_history_follows_the_run(case):
    _, (rank, _, steps, _, _, _), start, (_, states) = case
    state = jax.tree.map(lambda x: x[-1], states)
    history = jlora.rank_history(start, (optax.EmptyState(), state))
    assert history.names == tuple(SHAPES) and history.steps.tolist() == list(range(steps + 1))
    assert history.ranks[0].tolist() == [rank] * 3
    for step in range(1, steps + 1):
        assert history.ranks[step].tolist() == [int(states.active[name][step - 1].sum()) for name in SHAPES]
    assert jlora.ranks(start, state) == dict(zip(SHAPES, history.ranks[-1].tolist()))
    half = jax.tree.map(lambda x: x[steps // 2], states)
    assert jlora.rank_history(start, half).steps.tolist() == list(range(steps // 2 + 2))


@pytest.mark.parametrize("number", range(4))
def test_long_budgets_are_those_of_peft_to_the_last_rank(number):
    first, last, steps, start, final = map(int, GOLDEN[f"budgets/{number}/setting"])
    phases = Phases(steps, start, final, 1)
    falls = budget.falls(budget.cubic_budget(phases, first, last), start, phases.last)
    mine = [first - int(np.sum(falls <= step)) for step in range(1, steps + 1)]
    assert mine == GOLDEN[f"budgets/{number}/values"].tolist()
    assert mine[start - 1 if start else 0] >= mine[-1] == last and np.all(np.diff(mine) <= 0)


@pytest.mark.once
def test_ties_never_break_the_budget():
    method = jlora.AdaLoRA(4, 1, 6, 12, 2, 3, 2, orthogonality=0.0)
    params = adapted(method).params
    still = jax.tree.map(lambda x: jnp.zeros((12, *x.shape)), params)
    _, (_, state) = run(method, params, still)
    counts = sum(np.asarray(state.active[name].sum(-1)) for name in SHAPES)
    wanted = budget.cubic_budget(Phases(12, 2, 3, 2), 12, 3)
    assert counts.tolist() == [12, 12, 12] + [wanted(4)] * 2 + [wanted(6)] * 2 + [wanted(8)] + [3] * 4
    assert [int(state.active[name][-1].sum()) for name in SHAPES] == [3, 0, 0], "of equal scores the first are kept"


@pytest.mark.once
def test_averages_that_are_not_finite_do_not_break_the_budget():
    method = jlora.AdaLoRA(4, 1, 6, 6, orthogonality=0.0)
    params = adapted(method).params
    wild = jax.tree.map(lambda x: jnp.full((6, *x.shape), jnp.nan).at[:, ..., 0].set(jnp.inf), params)
    _, (_, state) = run(method, params, wild, optax.set_to_zero())
    assert sum(int(state.active[name][-1].sum()) for name in SHAPES) == 3


@pytest.mark.once
def test_the_penalty_and_its_gradient_are_those_of_peft():
    params = golden("penalty/params")
    method = jlora.AdaLoRA(4, 2, 6, 12, orthogonality=0.3)
    sites = adapted(method).plan.sites
    factors = triplets.read(params, sites)
    full = [jnp.ones(f.e.shape, bool) for f in factors]
    value, by_autodiff = jit(jax.value_and_grad(lambda f: orthogonality.penalty(f, full, 0.3)))(factors)
    close(value, GOLDEN["penalty/with/loss"] - GOLDEN["penalty/without/loss"])
    closed = jit(lambda f: orthogonality.penalty_gradient(f, full, 0.3))(factors)
    given, wanted = (golden(f"penalty/{kind}/gradient") for kind in ("without", "with"))
    tx = jlora.with_rules(adapted(method), optax.sgd(1.0))
    updates = jit(lambda p: tx.update(given, tx.init(p), p)[0])(params)
    for site, mine, auto in zip(sites, closed, by_autodiff):
        for field in "ab":
            close(getattr(mine, field), getattr(auto, field))
            close(updates[site.path][field], -wanted[site.path][field])


@pytest.mark.once
def test_the_penalty_of_orthonormal_factors_is_zero_and_its_gradient_finite():
    q = jnp.eye(6)[:, :3]
    factors, active = [triplets.Triplet(q, jnp.ones(3), q.T)], [jnp.ones(3, bool)]
    gradient = orthogonality.penalty_gradient(factors, active, 1.0)[0]
    assert orthogonality.penalty(factors, active, 1.0) < 1e-5
    assert not np.any(gradient.a) and not np.any(gradient.b)


def test_merged_weights_are_those_of_peft():
    start = adapted(jlora.AdaLoRA(4, 2, 6, 12))
    base = {name: jnp.asarray(GOLDEN[f"penalty/w/{name}"]) for name in SHAPES}
    merged = jlora.merge(start.replace(base=base, params=golden("penalty/params")))
    for name in SHAPES:
        close(merged[name], GOLDEN[f"penalty/merged/{name}"])


@pytest.mark.once
def test_a_training_run_follows_peft_also_after_the_last_allocation():
    base = golden("training/w")
    base = {name: base[name][""] for name in base}
    x, y = GOLDEN["training/x"], GOLDEN["training/y"]
    method = jlora.AdaLoRA(rank=4, target=2, alpha=8, steps=60, start_steps=5, final_steps=30)
    start = jlora.adapterize(base, {".*": method}).replace(params=golden("training/before"))
    tx = jlora.optimizer(start, optax.adamw, 0.01, weight_decay=0.1)
    fn = jlora.lift(lambda p, x: jnp.tanh(x @ p["down"]) @ p["up"])

    def step(carry, batch):
        p, state = carry
        loss = lambda p: jnp.mean((fn(start.replace(params=p), batch[0]) - batch[1]) ** 2)
        updates, state = tx.update(jax.grad(loss)(p), state, p)
        p = optax.apply_updates(p, updates)
        return (p, state), p

    course = jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), (x, y))[1])(start.params)
    for number in (30, 60):
        params = jax.tree.map(lambda leaf: leaf[number - 1], course)
        merged = jlora.merge(start.replace(params=params))
        for module, fields in golden(f"training/after {number}").items():
            assert np.array_equal(params[module]["e"] == 0, fields["e"] == 0)
            for field, value in fields.items():
                close(params[module][field], value, 1e-4)
            change = GOLDEN[f"training/change {number}/{module}"]
            assert np.max(np.abs(merged[module] - base[module] - change)) < 1e-4 * np.max(np.abs(change))


@pytest.mark.once
def test_the_moments_are_the_optimizers_own_also_of_what_is_gone_for_good():
    method = jlora.AdaLoRA(4, 1, 6, 10, final_steps=3, orthogonality=0.0)
    params = adapted(method).params
    rng = np.random.default_rng(0)
    noise = jax.tree.map(lambda x: rng.standard_normal((10, *x.shape)).astype(np.float32), params)
    _, (after, states) = run(method, params, noise, optax.adam(0.1))
    plain = optax.adam(0.1)
    _, wanted = jit(lambda g: jax.lax.scan(lambda s, g: (plain.update(g, s)[1],) * 2, plain.init(params), g))(noise)
    jax.tree.map(close, states.inner[0].mu, jax.device_get(wanted[0].mu))
    for name in SHAPES:
        assert np.all(np.asarray(after[name]["e"])[6:][~np.asarray(states.active[name])[6:]] == 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": 5}, r"target \(5\) is above the rank that it starts with \(4\)"),
        ({"rank": 0}, "rank must be a positive whole number, got 0"),
        ({"beta1": 1}, "beta1 must be at least 0 and below 1, got 1"),
        ({"alpha": float("inf")}, "alpha must be positive and finite, got inf"),
        ({"interval": 0}, "interval must be a whole number of at least 1, got 0"),
        ({"steps": 0}, "steps must be a positive whole number or None, got 0"),
        (
            {"steps": 10, "start_steps": 4, "final_steps": 6},
            r"start_steps \(4\) and final_steps \(6\) leave none of the 10 steps",
        ),
    ],
)
def test_hyperparameters_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"AdaLoRA's .*{message}"):
        jlora.AdaLoRA(**{"rank": 4, "target": 2, **changes})


def test_a_schedule_of_unknown_length_is_refused_by_the_optimizer():
    with pytest.raises(ValueError, match=r"^down: AdaLoRA follows .* give AdaLoRA\(\.\.\., steps=\.\.\.\)"):
        jlora.optimizer(adapted(jlora.AdaLoRA(4, 2)), optax.adam, 1e-3)


def test_a_rank_above_a_side_is_refused():
    with pytest.raises(ValueError, match="up.*rank 5 is above the smaller side of the 7 x 4 matrix; use 4 or less"):
        adapted(jlora.AdaLoRA(5, 2))


def test_an_update_without_params_is_refused():
    start = adapted(jlora.AdaLoRA(4, 2, steps=5))
    tx = jlora.optimizer(start, optax.adam, 1e-3)
    with pytest.raises(ValueError, match="AdaLoRA needs the params"):
        tx.update(start.params, tx.init(start.params))
