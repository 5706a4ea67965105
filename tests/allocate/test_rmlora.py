"""RM-LoRA against a loop in numpy: the penalty's gradient, masks of exactly k ranks, momentum that moves the others too."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.problems import jit

import jlora

RATE, MOMENTUM, RANK, UPDATED, STEPS, WEIGHT = 0.1, 0.5, 4, 3, 6, 0.7
BASE = {"down": jnp.zeros((5, 9)), "layers": jnp.zeros((2, 6, 8)), "head": jnp.zeros(3)}


def method(**changes):
    return jlora.RMLoRA(RANK, 8.0, **{"updated": UPDATED, "orthogonality": WEIGHT, **changes})


def adapted(each):
    spec = {"layers": jlora.Axes("batch in out", each), "down": each, "head": jlora.Full()}
    return jlora.adapterize(BASE, spec)


@pytest.fixture(scope="module")
def start():
    """Params with `b` not zero, and gradients of every step."""
    params, rng = adapted(method()).params, np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    params = jax.tree.map(lambda x: draw(*x.shape), params)
    return params, jax.tree.map(lambda x: draw(STEPS, *x.shape), params)


def run(each, start, tx):
    """The params after every step, stacked."""
    params, gradients = start
    tx = jlora.with_rules(adapted(each), tx)

    def step(carry, gradient):
        p, state = carry
        updates, state = tx.update(gradient, state, p)
        p = optax.apply_updates(p, updates)
        return (p, state), p

    return jax.device_get(jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), gradients)[1])(params))


def pull(m):
    """The gradient of `‖mᵀm - 1‖`."""
    excess = m.T @ m - np.eye(m.shape[1])
    return 2 * m @ excess / np.linalg.norm(excess)


def by_hand(params, gradients, masks, freeze):
    """A module's `a` and `b` after every step, from its masks."""
    values = {f: np.array(params[f], np.float64) for f in "ab"}
    trace, found = {f: np.zeros_like(x) for f, x in values.items()}, []
    for t in range(STEPS):
        on_a, on_b = masks[t]
        term = {"a": pull(values["a"]), "b": pull(values["b"].T).T}
        for f, mask in (("a", on_a[None, :]), ("b", on_b[:, None])):
            # Three modules of two factors: the mean is over six.
            gradient = (gradients[f][t] + WEIGHT / 6 * term[f]) * mask
            trace[f] = MOMENTUM * trace[f] + gradient
            values[f] = values[f] - RATE * trace[f] * (mask if freeze else 1)
        found.append({f: x.copy() for f, x in values.items()})
    return found


@pytest.mark.once
@pytest.mark.parametrize(("independent", "freeze"), [(False, False), (True, True)])
def test_every_step_is_that_of_a_loop_over_the_ranks(start, independent, freeze):
    each = method(independent=independent, freeze=freeze)
    after = run(each, start, optax.sgd(RATE, momentum=MOMENTUM))
    masks = [each.optimizer_rule.masks(t, [(RANK,), (2, RANK)]) for t in range(1, STEPS + 1)]
    modules = {"down": lambda tree: tree, "layers 0": lambda x: x[0], "layers 1": lambda x: x[1]}
    for name, pick in modules.items():
        leaf, place = name.split()[0], 0 if name == "down" else 1
        fields = {f: pick(start[0][leaf][f]) for f in "ab"}
        given = {f: np.stack([pick(x) for x in start[1][leaf][f]]) for f in "ab"}
        mine = [tuple(np.asarray(pick(m)) for m in masks[t][place]) for t in range(STEPS)]
        for t, wanted in enumerate(by_hand(fields, given, mine, freeze)):
            for f, value in wanted.items():
                np.testing.assert_allclose(pick(after[leaf][f][t]), value, rtol=1e-4, atol=1e-5)
    plain = -RATE * np.sum([start[1]["head"]["w"][t] * (2 - MOMENTUM ** (STEPS - 1 - t)) for t in range(STEPS)], axis=0)
    np.testing.assert_allclose(after["head"]["w"][-1], start[0]["head"]["w"] + plain, rtol=1e-4, atol=1e-5)


@pytest.mark.once
def test_masks_have_exactly_k_ranks_after_the_first_step_each_rank_as_often():
    for independent in (False, True):
        rule = method(independent=independent).optimizer_rule
        drawn = jax.jit(jax.vmap(lambda t: rule.masks(t, [(RANK,), (2, RANK)])))(jnp.arange(1, 601))
        for of_a, of_b in drawn:
            a, b = np.asarray(of_a).reshape(600, -1, RANK), np.asarray(of_b).reshape(600, -1, RANK)
            assert np.all(a[0]) and np.all(b[0]), "the first step is whole"
            assert np.all(a[1:].sum(-1) == UPDATED) and np.all(b[1:].sum(-1) == UPDATED)
            assert np.array_equal(a, b) != independent
            assert np.all(np.abs(a[1:].mean(0) - UPDATED / RANK) < 0.08)
        assert not np.array_equal(drawn[1][0][:, 0], drawn[1][0][:, 1]), "the matrices of a stack share masks"


@pytest.mark.once
def test_ranks_that_are_not_updated_stay_to_the_bit_where_they_are_frozen(start):
    for freeze in (False, True):
        each = method(freeze=freeze, orthogonality=0.0)
        after = run(each, start, optax.adamw(RATE, weight_decay=0.1))["down"]["b"]
        masks = [np.asarray(each.optimizer_rule.masks(t, [(RANK,)])[0][1]) for t in range(1, STEPS + 1)]
        same = [np.all(after[t][~masks[t]] == after[t - 1][~masks[t]]) for t in range(1, STEPS)]
        assert all(same) if freeze else not any(same)


@pytest.mark.once
def test_with_all_ranks_and_no_penalty_every_bit_is_that_of_lora(start):
    whole = method(updated=RANK, orthogonality=0.0)
    lora = jlora.LoRA(RANK, 8.0)
    for mine, theirs in (
        (adapted(whole).params, adapted(lora).params),
        (run(whole, start, optax.adamw(RATE)), run(lora, start, optax.adamw(RATE))),
    ):
        jax.tree.map(np.testing.assert_array_equal, mine, theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"updated": 5}, r"updated \(5\) is above its rank \(4\)"),
        ({"updated": 0}, "updated must be a positive whole number, got 0"),
        ({"orthogonality": -0.1}, "orthogonality must be 0 or more, and finite, got -0.1"),
        ({"freeze": 1}, "freeze must be True or False, got 1"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"RMLoRA's .*{message}"):
        method(**changes)


def test_an_update_with_a_penalty_and_without_params_is_refused(start):
    tx = jlora.with_rules(adapted(method()), optax.sgd(RATE))
    with pytest.raises(ValueError, match="RMLoRA needs the params"):
        tx.update(start[0], tx.init(start[0]))
