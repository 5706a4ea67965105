"""Optimizers that look at all trained arrays together: they see one tree where rates are equal, and say where they can't."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from flax.core import freeze

import jlora
from jlora.optimize.together import coupled

pytestmark = pytest.mark.once

KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "up": {"w": jax.random.normal(KEYS[0], (6, 6)), "b": jnp.zeros(6)},
    "head": jax.random.normal(KEYS[1], (6, 3)),
}
X, Y = jax.random.normal(KEYS[2], (8, 6)), jax.random.normal(KEYS[3], (8, 3))
SPEC = {"up/w": jlora.LoRA(2), "head|up/b": jlora.Full()}
ADALORA = jlora.AdaLoRA(rank=2, target=1, steps=4, start_steps=1, final_steps=1, interval=1)


def clipped(learning_rate):
    return optax.chain(optax.clip_by_global_norm(1e-2), optax.sgd(learning_rate))


WHOLE = {
    "prodigy": (optax.contrib.prodigy, 1.0),
    "dadapt": (optax.contrib.dadapt_adamw, 1.0),
    "schedule_free": (optax.contrib.schedule_free_adamw, 1e-2),
    "lbfgs": (optax.lbfgs, None),
    "clipped": (clipped, 0.1),
}
EACH = {"muon": (optax.contrib.muon, 1e-2), "adamw": (optax.adamw, 1e-2), "adafactor": (optax.adafactor, 1e-2)}


@pytest.fixture(scope="module")
def adapted():
    return jlora.adapterize(PARAMS, SPEC)


def fn(params, x):
    return jnp.tanh(x @ params["up"]["w"] + params["up"]["b"]) @ params["head"]


def trained(tx, adapted, steps=3):
    """The arrays, the state and the losses of some whole training steps; traceable."""
    tx = optax.with_extra_args_support(tx)

    def loss(p):
        return jnp.mean((jlora.lift(fn)(adapted.replace(params=p), X) - Y) ** 2)

    def step(carry, _):
        p, state = carry
        value, grads = jax.value_and_grad(loss)(p)
        updates, state = tx.update(grads, state, p, value=value, grad=grads, value_fn=loss)
        return (optax.apply_updates(p, updates), state), value

    start = (adapted.params, tx.init(adapted.params))
    end, losses = jax.lax.scan(step, start, None, steps)
    return *end, losses


def test_optimizers_of_the_whole_tree_are_optax_s_own_to_the_bit(adapted):
    lora = jlora.adapterize(PARAMS, {"up/w": jlora.LoRA(2)})
    cases = {name: (adapted, *case) for name, case in WHOLE.items() if name != "lbfgs"}
    cases |= {name: (lora, *EACH[name]) for name in ("muon", "adamw")}

    @jax.jit
    def both():
        return {
            name: [trained(tx, a) for tx in (jlora.optimizer(a, factory, rate), factory(rate))]
            for name, (a, factory, rate) in cases.items()
        }

    for name, (ours, plain) in both().items():
        assert jax.tree.structure(ours) == jax.tree.structure(plain), name
        jax.tree.map(np.testing.assert_array_equal, ours, plain)
        assert ours[2][-1] < ours[2][0], name


def test_l_bfgs_is_the_program_of_optax_s_own(adapted):
    def program(tx):
        return re.sub(" at 0x[0-9a-f]+", "", str(jax.make_jaxpr(lambda: trained(tx, adapted))()))

    ours = program(jlora.optimizer(adapted, optax.lbfgs, None))
    assert ours == program(optax.lbfgs()) != program(optax.lbfgs(memory_size=3))
    with pytest.raises(
        ValueError, match="restart with optax.identity\\(\\) and its state, and make a new state by tx.init"
    ):
        jlora.restart(adapted, optax.lbfgs().init(adapted.params), optax.lbfgs(), KEYS[0])


def test_what_couples_arrays_is_seen_in_the_optimizers_program(adapted):
    found = {name: coupled(factory(rate), adapted.params) for name, (factory, rate) in (WHOLE | EACH).items()}
    assert found == dict.fromkeys(WHOLE, True) | dict.fromkeys(EACH, False)
    alike = {name: jnp.ones((2, 2)) for name in "abc"}
    assert coupled(clipped(0.1), alike) and not coupled(optax.adam(0.1), alike), "arrays of one shape"
    assert coupled(optax.polyak_sgd(), adapted.params), "it asks for the loss"
    assert not coupled(optax.inject_hyperparams(optax.adamw)(learning_rate=0.1), adapted.params)


def test_arrays_that_no_restart_renews_have_a_step_count_of_their_own_unless_that_would_cut_the_tree(adapted):
    groups = jlora.optimizer(adapted, optax.adamw, 1e-2, weight_decay=0.0).init(adapted.params).inner_states
    assert sorted(groups) == ["a", "a, kept"]
    state = jlora.optimizer(adapted, optax.contrib.prodigy, 1.0).init(adapted.params)
    assert isinstance(state, optax.contrib.ProdigyState)
    mean = optax.contrib.schedule_free_eval_params
    state = jlora.optimizer(adapted, optax.contrib.schedule_free_adamw, 1e-2).init(adapted.params)
    assert jax.tree.structure(mean(state, adapted.params)) == jax.tree.structure(adapted.params)


@pytest.mark.parametrize(
    "factory, rate, options, message",
    [
        (optax.contrib.prodigy, 1.0, {"ratio": 4}, "Prodigy estimates its rate from all trained arrays together, but these "
         "groups of them learn at other rates, or decay otherwise: a; b; leave ratio"),
        (optax.contrib.dadapt_adamw, 1.0, {"weight_decay": 0.1}, "D-Adaptation .*otherwise: a; vector; leave"),
        (optax.lbfgs, 1.0, {"ratio": 2}, "L-BFGS chooses its step from all"),
        (optax.lbfgs, None, {"ratio": 2}, "2 times the learning rate is asked for, by ratio.*but learning_rate is None"),
        (optax.contrib.schedule_free_adamw, 1.0, {"ratio": 2}, "schedule_free_eval_params reads one state for all trained"),
    ],
    ids=["prodigy", "dadapt", "lbfgs", "no rate", "schedule-free"],
)  # fmt: skip
def test_what_can_only_be_one_is_refused_as_several(factory, rate, options, message, adapted):
    with pytest.raises(ValueError, match=message):
        jlora.optimizer(adapted, factory, rate, **options)


def test_a_state_made_at_a_rate_of_zero_fits_the_rate(adapted):
    structure = lambda rate, ratio: jax.tree.structure(
        jlora.optimizer(adapted, optax.adam, rate, ratio=ratio).init(adapted.params)
    )
    assert structure(0.0, 4) == structure(1e-3, 4) != structure(1e-3, None) == structure(0.0, None)


def test_equal_rates_are_one_group_however_they_are_given(adapted):
    lora = jlora.adapterize(PARAMS, {"up/w": jlora.LoRA(2)})
    schedule = optax.constant_schedule(0.1)
    for options in ({"ratio": 1}, {"embedding_learning_rate": 0.1}, {"ratio": 1.0, "weight_decay": 0.0}):
        state = jlora.optimizer(lora, optax.adamw, schedule, **options).init(lora.params)
        assert jax.tree.structure(state) == jax.tree.structure(optax.adamw(schedule).init(lora.params))
    groups = jlora.optimizer(lora, optax.adamw, schedule, ratio=2).init(lora.params).inner_states
    assert sorted(groups) == ["a", "b"]


@pytest.mark.parametrize(
    "factory, match",
    [
        (optax.lbfgs, "L-BFGS inside it would take the rule's changes"),
        (
            lambda learning_rate: optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(3)),
            "a line search inside it",
        ),
    ],
)
def test_a_line_search_inside_of_rank_allocation_is_refused(factory, match):
    allocating = jlora.adapterize(PARAMS, {"up/w": ADALORA})
    with pytest.raises(ValueError, match=f"up/w: AdaLoRA.*goes around the optimizer's steps, and {match}"):
        jlora.optimizer(allocating, factory, None)


@pytest.mark.parametrize("spec", [SPEC, {"up/w": ADALORA}], ids=["plain", "rule"])
def test_a_whole_adapted_is_refused_with_what_to_write(spec):
    adapted = jlora.adapterize(PARAMS, spec)
    tx, message = (
        jlora.optimizer(adapted, optax.adam, 1e-3),
        "got a whole jlora.Adapted.*call tx.init\\(adapted.params\\)",
    )
    state = tx.init(adapted.params)
    for call in (
        lambda: tx.init(adapted),
        lambda: tx.init({"params": adapted}),
        lambda: tx.update(adapted, state, adapted),
    ):
        with pytest.raises(TypeError, match=message):
            call()


@pytest.mark.parametrize(
    "box",
    [freeze, nnx.State, lambda tree: nnx.State(jax.tree.map(nnx.Param, tree))],
    ids=["FrozenDict", "State", "State of Params"],
)
@pytest.mark.parametrize("method", [jlora.LoRA(2), ADALORA], ids=["plain", "rule"])
def test_params_in_any_mapping_get_the_same_updates_in_that_mapping(method, box):
    adapted = jlora.adapterize(box(PARAMS), {"up/w": method})
    grads = jax.tree.map(jnp.ones_like, adapted.params)
    for tx in (jlora.optimizer(adapted, optax.adam, 0.1, ratio=2), jlora.with_rules(adapted, optax.adam(0.1))):
        found, _ = tx.update(box(grads), tx.init(box(adapted.params)), box(adapted.params))
        wanted, _ = tx.update(grads, tx.init(adapted.params), adapted.params)
        assert jax.tree.structure(found) == jax.tree.structure(box(wanted))
        jax.tree.map(np.testing.assert_array_equal, found, box(wanted))
