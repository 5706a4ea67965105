"""Many runs at once: each is what it is alone, over whole training steps; what differs, what is held, what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.core.products import contraction

SPEC = r".*kernel"
WIDTH, ROWS, STEPS = 12, 16, 5


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


BASE = {name: {"kernel": normal(n, WIDTH, WIDTH) / 3, "bias": normal(9 + n, WIDTH) / 9} for n, name in enumerate("pq")}


def model(params, x):
    for name in "pq":
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return x


def adapters(methods, keys=True):
    """An `Adapted` for each method, of its own seed, and with a dropout key of its own."""
    made = [jlora.adapterize(BASE, {SPEC: method}, key=jax.random.key(n)) for n, method in enumerate(methods)]
    return [each.replace(context={"dropout": jax.random.key(50 + n)}) if keys else each for n, each in enumerate(made)]


def optimizer(adapted, rate, decay):
    """Clipping by the norm of all gradients, and a rate that falls."""
    tx = jlora.optimizer(
        adapted, optax.adamw, lambda count: rate * (1 - count / STEPS), ratio=2.0, weight_decay=decay, eps=1e-6
    )
    return optax.chain(optax.clip_by_global_norm(0.3), tx)


def first(adapted, rate, decay):
    return optimizer(adapted, rate, decay).init(adapted.params)


def step(adapted, state, batch, rate, decay, stopped=False, tx_of=optimizer):
    x, y = batch
    lifted = jlora.lift(model)
    loss = lambda params: jnp.mean((lifted(adapted.replace(params=params), x) - y) ** 2)
    value, gradients = jax.value_and_grad(loss)(adapted.params)
    updates, new = tx_of(adapted, rate, decay).update(gradients, state, adapted.params)
    moved = adapted.replace(params=optax.apply_updates(adapted.params, updates))
    return *jlora.hold(stopped, (moved, new), (adapted, state)), value


RATES, DECAYS = jnp.array([3e-2, 1e-2]), jnp.array([0.0, 0.1])
DATA = (normal(30, STEPS, 2, ROWS, WIDTH), jnp.tanh(normal(31, STEPS, 2, ROWS, WIDTH)))


def together(runs, axes=(0, 0, 0, 0, 0, 0), stopped=((False, False),) * STEPS):
    """All steps of a stack; the stacks after each, and how often the step was traced."""
    stacked, after, traces = jlora.stack(runs), [], []
    state = jax.jit(jlora.each_run(first))(stacked, RATES, DECAYS)
    for_all = jlora.each_run(step, in_axes=axes)
    # What jit knows of its own programs may be pushed out by those of other tests.
    go = jax.jit(lambda *given: (traces.append(1), for_all(*given))[1])
    for n in range(STEPS):
        stacked, state, _ = go(stacked, state, tuple(d[n] for d in DATA), RATES, DECAYS, jnp.array(stopped[n]))
        after.append((stacked, state))
    return after, len(traces)


def alone(adapted, number):
    state, go = jax.jit(first)(adapted, RATES[number], DECAYS[number]), jax.jit(step)
    for n in range(STEPS):
        batch = tuple(d[n, number] for d in DATA)
        adapted, state, _ = go(adapted, state, batch, RATES[number], DECAYS[number])
    return adapted


def close(one, other, tolerance=2e-6):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance * float(jnp.max(jnp.abs(theirs)) + 1e-9))


MIXED = [
    jlora.LoRA(rank=2, alpha=4, dropout=0.25),
    jlora.LoRA(rank=3, alpha=9, scaling="rslora", init="gaussian", dropout=0.25),
]


@pytest.mark.parametrize(
    "methods",
    [MIXED, [jlora.DoRA(jlora.LoRA(rank=3, alpha=3, init="pissa")), jlora.DoRA(jlora.LoRA(rank=2, init="olora"))]],
    ids=["lora", "dora"],
)
def test_runs_of_other_ranks_scales_starts_rates_decays_and_data_are_each_what_they_are_alone(methods):
    runs = adapters(methods, keys=methods is MIXED)
    after, traces = together(runs)
    assert traces == 1
    for number, (adapted, found) in enumerate(zip(runs, jlora.unstack(after[-1][0]), strict=True)):
        assert found.plan == adapted.plan
        wanted = alone(adapted, number)
        close(found.params, wanted.params)
        close(found.frozen, wanted.frozen)
        assert np.any(np.asarray(found.params["p"]["kernel"]["a"]) != adapted.params["p"]["kernel"]["a"])


@pytest.mark.long
def test_ranks_given_out_by_masks_inside_of_the_step_are_given_out_for_each_run():
    method = jlora.AdaLoRA(rank=4, target=2, steps=STEPS, start_steps=1, final_steps=2, interval=1)
    runs, tx_of = adapters([method] * 2, keys=False), lambda adapted, *_: jlora.optimizer(adapted, optax.adam, 3e-2)
    stacked = jlora.stack(runs)
    state = jax.jit(jlora.each_run(lambda adapted: tx_of(adapted).init(adapted.params)))(stacked)
    go, one = jax.jit(jlora.each_run(partial(step, tx_of=tx_of))), jax.jit(partial(step, tx_of=tx_of))
    singles = [(each, tx_of(each).init(each.params)) for each in runs]
    for n in range(STEPS):
        stacked, state, _ = go(stacked, state, tuple(d[n] for d in DATA), RATES, DECAYS)
        singles = [
            one(*single, tuple(d[n, number] for d in DATA), RATES[number], DECAYS[number])[:2]
            for number, single in enumerate(singles)
        ]
    for number, (adapted, single) in enumerate(singles):
        mine = jax.tree.map(lambda leaf, number=number: leaf[number], state)
        assert jlora.ranks(adapted, mine) == jlora.ranks(adapted, single)
        close(stacked.run(number).params, adapted.params, 1e-4)
    assert sum(jlora.ranks(*singles[0]).values()) == 4


def test_a_held_run_and_its_optimizer_stay_as_they_are_to_the_bit_while_others_go_on():
    held = ((False, False), (False, True), (False, True), (False, True), (False, False))
    after, traces = together(adapters(MIXED), stopped=held)
    free, _ = together(adapters(MIXED))
    part = lambda n, number: jax.tree.map(lambda x: np.asarray(x[number]), (after[n][0].params, after[n][1]))
    same = lambda one, other: all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))
    assert traces == 1
    assert same(part(0, 1), part(3, 1)) and not same(part(3, 1), part(4, 1))
    assert all(not same(part(n, 0), part(n + 1, 0)) for n in range(4))
    for one, other in zip(jax.tree.leaves(after[-1][0].params), jax.tree.leaves(free[-1][0].params)):
        assert np.array_equal(one[0], other[0])


def test_a_batch_that_all_runs_have_is_given_once(tmp_path):
    runs = adapters([jlora.LoRA(rank=2)] * 3, keys=False)
    stacked, x = jlora.stack(runs), normal(1, ROWS, WIDTH)
    found = jax.jit(jlora.each_run(jlora.lift(model), in_axes=(0, None)))(stacked, x)
    np.testing.assert_allclose(found, jnp.stack([jlora.lift(model)(each, x) for each in runs]), rtol=1e-5, atol=1e-6)
    jlora.save(tmp_path / "one", stacked.run(1))
    close(jlora.load(tmp_path / "one", BASE).params, runs[1].params, 0)


def test_constants_that_all_runs_have_are_held_once_and_others_for_each():
    shira = jlora.stack(adapters([jlora.SHiRA(mask="random", density=0.25)] * 2, keys=False))
    fourier = jlora.stack(adapters([jlora.FourierFT(frequencies=5)] * 2, keys=False))
    assert not shira.alike and len(fourier.alike) == 2
    for stacked, size in ((shira, 2), (fourier, 1)):
        for name in "pq":
            frozen = stacked.run(1).frozen[name]["kernel"]
            whole = stacked.frozen[name]["kernel"]
            for field, leaf in frozen.items():
                assert whole[field].size == size * leaf.size
    found = jax.jit(jlora.each_run(lambda adapted: adapted))(fourier)
    assert found.alike == fourier.alike
    close((found.params, found.base), (fourier.params, BASE), 0)


def test_a_base_that_is_not_changed_by_run_may_be_returned_from_a_jitted_step():
    stacked = jlora.stack(adapters([jlora.LoRA(rank=2)] * 2, keys=False))
    found = jlora.each_run(jax.jit(lambda adapted: adapted.replace(base=jax.tree.map(lambda x: 2 * x, adapted.base))))(
        stacked
    )
    close(found.base, jax.tree.map(lambda x: 2 * x, BASE), 0)
    with pytest.raises(ValueError, match="changes the base by run"):
        jlora.each_run(lambda adapted, n: adapted.replace(base=jax.tree.map(lambda x: n * x, adapted.base)))(
            stacked, jnp.arange(2.0)
        )


def test_products_of_runs_form_no_weight_for_each_where_one_alone_does():
    assert contraction.choose("auto", 8, [(12, 12)], jnp.float32).forward == ("formed",)
    assert contraction.choose("auto", 8, [(12, 12)], jnp.float32, runs=2) == contraction.LowRankPlan(("apart",), False)
    assert contraction.choose("auto", 100, [(12, 12)], jnp.float32, runs=2) == contraction.LowRankPlan(
        ("formed",), True
    )
    assert contraction.choose("merged", 8, [(12, 12)], jnp.float32, runs=2).forward == ("formed",)

    def formed(of):
        """How many arrays `[runs, in, out]` the program for two runs has."""
        runs = adapters([jlora.LoRA(rank=2)] * 2, keys=False)
        loss = lambda adapted, params, x: jnp.sum(jlora.lift(model)(adapted.replace(params=params), x) ** 2)
        gradient = lambda adapted, x: jax.grad(lambda params: loss(adapted, params, x))(adapted.params)
        return str(jax.make_jaxpr(of(gradient, runs))(normal(1, 2, 8, WIDTH))).count(f"f32[2,{WIDTH},{WIDTH}]")

    by_stack = lambda gradient, runs: partial(jlora.each_run(gradient), jlora.stack(runs))

    def by_hand(gradient, runs):
        params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(each.params for each in runs))
        return lambda x: jax.vmap(lambda p, x: gradient(runs[0].replace(params=p), x))(params, x)

    assert formed(by_stack) == 0 < formed(by_hand)


def other_base():
    return {**BASE, "q": {**BASE["q"], "kernel": BASE["q"]["kernel"].at[3, 4].add(1e-7)}}


@pytest.mark.once
@pytest.mark.parametrize(
    ("second", "words"),
    [
        (lambda: jlora.adapterize(other_base(), {SPEC: jlora.LoRA(2)}), "q.*kernel.*bases of runs 0 and 1 differ"),
        (lambda: jlora.adapterize(BASE, {"p/kernel": jlora.LoRA(2)}), "q/kernel: of runs 0 and 1 only one adapts"),
        (
            lambda: jlora.adapterize(BASE, {SPEC: jlora.LoRA(2, dropout=0.5)}),
            "p/kernel: run 0 has .* can't be one program",
        ),
        (lambda: jlora.adapterize(BASE, {SPEC: jlora.LoRA(2, init="pissa")}), "can't be one program"),
        (lambda: jlora.adapterize(BASE, {SPEC: jlora.LoRA(2, init="embedding")}), "can't be one program"),
        (lambda: jlora.adapterize(BASE, {SPEC: jlora.HiRA(2)}), "can't be one program"),
        (lambda: adapters([jlora.LoRA(2)])[0], "contexts of the adapters"),
        (lambda: BASE, "takes a list of jlora.Adapted, got dict"),
    ],
)
def test_what_is_no_run_of_the_same_program_is_refused(second, words):
    one = jlora.adapterize(BASE, {SPEC: jlora.LoRA(2)})
    with pytest.raises((ValueError, TypeError), match=words):
        jlora.stack([one, second()])


@pytest.mark.once
def test_methods_whose_rules_count_ranks_are_not_padded():
    one, other = (jlora.adapterize(BASE, {SPEC: jlora.AdaLoRA(rank=r, target=2, steps=9)}) for r in (3, 4))
    with pytest.raises(ValueError, match="can't be one program"):
        jlora.stack([one, other])


@pytest.mark.once
def test_a_stack_is_not_taken_for_one_adapted_and_each_run_needs_one(tmp_path):
    stacked, x = jlora.stack(adapters([jlora.LoRA(2)] * 2, keys=False)), normal(1, ROWS, WIDTH)
    for wrong in (
        lambda: jlora.save(tmp_path / "both", stacked),
        lambda: jlora.merge(stacked),
        lambda: jlora.lift(model)(stacked, x),
        lambda: jlora.lift(lambda variables, x: jax.tree.leaves(variables)[0])({"params": stacked}, x),
        lambda: jlora.combine([stacked], [1.0]),
        lambda: jlora.without_encoder(stacked),
        lambda: jlora.Bank.of(BASE, {"both": stacked}),
        lambda: jlora.optimizer(stacked, optax.adam, 1e-3),
        lambda: jlora.summary(stacked),
    ):
        with pytest.raises(TypeError, match="holds the adapters of 2 runs, and one run's are wanted here"):
            wrong()
    with pytest.raises(TypeError, match="needs a jlora.Stacked"):
        jlora.each_run(model)(BASE, x)
    with pytest.raises(ValueError, match="in_axes for 1 arguments, and 2"):
        jlora.each_run(model, in_axes=(0,))(stacked, x)
    with pytest.raises(ValueError, match="stacks of 2 and 1 runs"):
        jlora.each_run(lambda one, other: 0)(stacked, jlora.stack(jlora.unstack(stacked)[:1]))
    with pytest.raises(ValueError, match="needs one adapter"):
        jlora.stack([])
    with pytest.raises(IndexError, match="2 runs, numbered from 0; got 2"):
        stacked.run(2)
