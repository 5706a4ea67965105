"""`restart`: what is learned stays, what is drawn is new, moments begin anew, and nothing else moves."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora.optimize import restart as module

# Nearly all the time is compilation.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
KEY = jax.random.key(7)
X, Y = np.random.default_rng(0).standard_normal((2, 16, 8)).astype(np.float32)


def base(dtype=jnp.float32):
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) / 3, dtype)
    return {"stack": draw(2, 8, 8), "out": draw(8, 8), "head": draw(8, 8), "norm": jnp.ones(8, dtype)}


def fn(params, x):
    for n in range(2):
        x = jnp.tanh(x @ params["stack"][n])
    return (x * params["norm"]) @ params["out"] @ params["head"]


def spec(method):
    return {"stack": jlora.Axes("batch in out", method), "out": method, "head": jlora.Full()}


def loss_of(adapted, params):
    return jnp.mean((jlora.lift(fn)(adapted.replace(params=params), X) - Y) ** 2)


def make_step(tx, traces):
    @jit
    def step(adapted, opt_state):
        traces.append(1)
        grads = jax.grad(lambda p: loss_of(adapted, p))(adapted.params)
        updates, opt_state = tx.update(grads, opt_state, adapted.params)
        return adapted.replace(params=optax.apply_updates(adapted.params, updates)), opt_state

    return step


def start(params, method, key=KEY):
    """`adapterize`, compiled, around the base's own arrays."""
    return jit(lambda p: jlora.adapterize(p, spec(method), key))(params).replace(base=params)


def copied(tree):
    """On the host, with no reference to the arrays themselves, which would keep them from being donated."""
    return jax.device_get(jax.tree.map(jnp.copy, tree))


def trained(method, steps=2):
    params = base()
    adapted = start(params, method)
    tx = jlora.optimizer(adapted, optax.adamw, lambda count: 0.05 / (1 + count), weight_decay=0.1)
    traces = []
    step = make_step(tx, traces)
    state = jit(tx.init)(adapted.params)
    for _ in range(steps):
        adapted, state = step(adapted, state)
    return params, adapted, tx, state, step, traces


def counts(state):
    """The step counts of Adam and of the schedules in an optimizer's state, by group."""
    found = {}
    for group, masked in state.inner_states.items():
        adam, _, schedule = masked.inner_state
        found[group] = (int(adam.count), int(schedule.count))
    return found


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert all(map(np.array_equal, jax.tree.leaves(jax.device_get(one)), jax.tree.leaves(jax.device_get(other))))


@pytest.mark.once
@pytest.mark.parametrize(
    "method", [jlora.LoRA(2, alpha=4), pytest.param(jlora.DoRA(jlora.LoRA(2)), marks=pytest.mark.long)], ids=str
)
def test_a_link_is_folded_into_the_base_and_the_next_begins_as_adapterize_would(method):
    _, adapted, tx, state, step, traces = trained(method)
    held, before = adapted.base, copied((adapted.base, adapted.params, state))
    merged = copied(jlora.merge(adapted))
    wanted = start(merged, method, jax.random.key(3))
    for n in (3, 4):
        after, state = jlora.restart(adapted, state, tx, jax.random.key(n))
        if n == 3:
            first, first_state = copied((after, state))
        adapted, state = step(after, state)
    assert len(traces) == 1, "a restart made the step compile again"
    w, (a, b) = before[0]["out"].astype(np.float64), (before[1]["out"][name] for name in "ab")
    if isinstance(method, jlora.LoRA):
        np.testing.assert_allclose(first.base["out"], w + 2.0 * (a.astype(np.float64) @ b), atol=1e-6)
    np.testing.assert_allclose(first.base["stack"], merged["stack"], atol=1e-6)
    for name in ("stack", "out"):
        assert held[name].is_deleted(), f"the folded {name} was copied"
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), first.params[name], wanted.params[name])
    assert not held["norm"].is_deleted() and not held["head"].is_deleted()
    same(first.params["head"], before[1]["head"])
    np.testing.assert_array_equal(first.base["head"], before[0]["head"])
    for group, (adam, schedule) in counts(first_state).items():
        assert (adam, schedule) == ((2, 2) if "kept" in group else (0, 2)), group
    moments = {g: masked.inner_state[0] for g, masked in first_state.inner_states.items()}
    old = before[2].inner_states
    for group, adam in moments.items():
        for tree, kept in ((adam.mu, old[group].inner_state[0].mu), (adam.nu, old[group].inner_state[0].nu)):
            if "kept" in group:
                same(tree, kept)
            else:
                assert all(not leaf.any() for leaf in jax.tree.leaves(tree))


def test_a_chain_keeps_the_base_and_its_links_are_one_program():
    method = jlora.Chain(jlora.LoRA(2, alpha=4), links=4)
    params, adapted, tx, state, step, traces = trained(method)
    module._compiled.cache_clear()
    merge, gradients = jit(jlora.merge), jit(lambda a: jax.grad(lambda p: loss_of(a, p))(a.params))
    deltas = np.zeros((8, 8))
    for link in range(3):
        a, b = (np.asarray(adapted.params["out"][name], np.float64) for name in "ab")
        deltas = deltas + 2.0 * (a @ b)
        before = merge(adapted)
        after, state = jlora.restart(adapted, state, tx, jax.random.fold_in(KEY, link))
        assert after.base is adapted.base and not adapted.base["out"].is_deleted()
        merged = merge(after)
        for name, leaf in merged.items():
            np.testing.assert_allclose(leaf, before[name], atol=1e-6)
        np.testing.assert_allclose(np.asarray(merged["out"], np.float64) - np.asarray(params["out"]), deltas, atol=1e-6)
        small = jlora.compact(adapted)  # the links so far
        methods = {site.path: site.method for site in small.plan.sites}
        assert methods["out"] == methods["stack"] == jlora.LoRA(2 * link + 2, 2.0 * link + 2) and not small.frozen
        np.testing.assert_allclose(jlora.merge(small)["stack"], before["stack"], atol=1e-6)
        assert not np.any(after.params["out"]["b"]) and np.any(after.params["out"]["a"] != a)
        gradient = gradients(after)
        assert not np.any(gradient["stack"]["a"]) and np.all(np.any(gradient["stack"]["b"], axis=(1, 2)))
        adapted, state = step(after, state)
    assert module._compiled.cache_info().misses == 1 and len(traces) == 1
    assert np.linalg.matrix_rank(deltas, tol=1e-9) == 6
    with pytest.raises(ValueError, match=r"out: link 4 of Chain\(.*\) is the last; give it more links"):
        jlora.restart(adapted, state, tx, KEY)
    with pytest.raises(TypeError, match=r"out: call this outside of jit, where it sees how many links"):
        jax.jit(lambda a, s: jlora.restart(a, s, tx, KEY))(adapted, state)


@pytest.mark.once
@pytest.mark.parametrize("plan", ["factored", "merged"])
def test_no_step_computes_the_gradient_of_finished_links(plan):
    def products(method):
        adapted = jlora.adapterize(base(), {"out": method})
        lifted = jlora.lift(fn, plan=plan)
        gradient = jax.grad(lambda p: jnp.sum(lifted(adapted.replace(params=p), X)))
        found = re.findall(r"f32\[(\d+),(\d+)\] = dot_general", str(jax.make_jaxpr(gradient)(adapted.params)))
        return {frozenset(map(int, shape)) for shape in found}

    chain = products(jlora.Chain(jlora.LoRA(2), links=6))
    assert {2, 8} in chain and {12, 8} not in chain


@pytest.mark.once
def test_a_link_of_smaller_rank_trains_and_keeps_that_rank_alone():
    ranks = (3, 1, 2)
    params, adapted, tx, state, step, traces = trained(jlora.Chain(jlora.LoRA(3, alpha=6), links=3, ranks=ranks))
    merge, gradients = jit(jlora.merge), jit(lambda a: jax.grad(lambda p: loss_of(a, p))(a.params))
    assert adapted.frozen["out"]["past_a"].shape == (8, 4) and adapted.frozen["stack"]["past_b"].shape == (2, 4, 8)
    change = np.zeros((8, 8))
    for link, rank in enumerate(ranks):
        a, b = (np.asarray(adapted.params["out"][name], np.float64) for name in "ab")
        change += 2.0 * (a[:, :rank] @ b[:rank])
        found = merge(adapted)
        np.testing.assert_allclose(np.asarray(found["out"], np.float64) - np.asarray(params["out"]), change, atol=1e-6)
        gradient = gradients(adapted)["stack"]
        assert np.all(np.any(gradient["b"], axis=2) == (np.arange(3) < rank))
        assert np.all(np.any(gradient["a"], axis=1) == (np.arange(3) < rank))
        small = jlora.compact(adapted)
        methods = {site.path: site.method for site in small.plan.sites}
        assert methods["out"].rank == methods["stack"].rank == sum(ranks[: link + 1])
        np.testing.assert_allclose(jlora.merge(small)["stack"], found["stack"], atol=1e-6)
        if link < 2:
            adapted, state = jlora.restart(adapted, state, tx, jax.random.fold_in(KEY, link))
            adapted, state = step(adapted, state)
    assert len(traces) == 1 and np.linalg.matrix_rank(change, tol=1e-9) == 6


@pytest.mark.once
def test_a_restart_prunes_as_the_chain_says_unless_asked_otherwise():
    chain = jlora.Chain(jlora.LoRA(4), links=3, prune=0.5, by="magnitude")
    _, adapted, tx, state, _, _ = trained(chain, steps=2)

    def left(**options):
        found = jlora.restart(adapted, state, tx, KEY, donate=False, **options)[1]
        adam = next(each.inner_state[0] for group, each in found.inner_states.items() if "kept" not in group)
        return float(np.mean(np.asarray(adam.nu["out"]["b"]) != 0)), int(adam.count)

    assert left() == (0.5, 2) and left(prune=1.0) == (0.0, 0) and left(prune=0.75) == (0.25, 2)
    (plain,) = jlora.adapterize({"out": jnp.eye(8)}, {"out": jlora.LoRA(2)}).plan.sites
    with pytest.raises(
        ValueError, match=r"prune moments in different ways, \[\(0.5, 'magnitude'\), \(1.0, 'random'\)\]"
    ):
        jlora.restart(adapted, state, tx, KEY, sites=[adapted.plan.sites[-1], plain])


@pytest.mark.once
def test_each_chain_of_several_has_a_step_count_of_its_own():
    params = {name: jnp.eye(8) for name in "qv"}
    spec = {"q": jlora.Chain(jlora.LoRA(2), links=2, steps=4), "v": jlora.Chain(jlora.LoRA(2), links=4, steps=4)}
    adapted = jlora.adapterize(params, spec, KEY)
    tx = jlora.optimizer(adapted, optax.adam, 1e-2)
    state = tx.init(adapted.params)
    for number in (1, 2):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, adapted.params), state, adapted.params)
        adapted = adapted.replace(params=optax.apply_updates(adapted.params, updates))
        adapted, state = jlora.run_events(adapted, state, tx, KEY, number)
        after = {group: int(masked.inner_state[0].count) for group, masked in state.inner_states.items()}
        wanted = {1: {"link 0": 1, "link 1": 0}, 2: {"link 0": 0, "link 1": 0}}[number]
        assert after == {f"a, {link}": count for link, count in wanted.items()}


@pytest.mark.once
def test_what_is_shared_or_of_numpy_survives_a_restart():
    w = jax.random.normal(KEY, (8, 8))
    adapted = jlora.adapterize({"w": w, "tied": w}, {"w": jlora.LoRA(2)}, KEY)
    tx = optax.sgd(0.1)
    adapted, _ = jlora.restart(adapted, tx.init(adapted.params), tx, KEY)
    np.testing.assert_array_equal(adapted.base["tied"], w)  # not deleted
    chain = jax.device_get(jlora.adapterize({"w": w}, {"w": jlora.Chain(jlora.LoRA(2), links=2)}, KEY))
    after, _ = jlora.restart(chain, tx.init(chain.params), tx, KEY)
    assert jlora.compact(chain).params["w"]["a"].shape == (8, 2) and int(after.frozen["w"]["link"]) == 1


@pytest.mark.once
def test_a_restart_in_the_middle_of_a_step_is_refused():
    adapted = start(base(), jlora.LoRA(2))
    for tx, message in (
        (optax.MultiSteps(optax.adam(0.1), 2), r"in the middle of accumulating gradients \(part 1 of a step"),
        (optax.contrib.schedule_free_adamw(0.1), "keeps a copy of the trained arrays"),
    ):
        _, state = tx.update(adapted.params, tx.init(adapted.params), adapted.params)
        with pytest.raises(ValueError, match=message):
            jlora.restart(adapted, state, tx, KEY, prune=0.5)


@pytest.mark.once
def test_fifty_small_links_on_a_16_bit_base_add_up_and_would_be_lost_in_it():
    links, size = 50, 1e-4
    params = {"w": base()["out"].astype(jnp.bfloat16)}
    adapted = jlora.adapterize(params, {"w": jlora.Chain(jlora.LoRA(1, alpha=1), links=links)}, KEY)
    tx = optax.sgd(0.1)
    state = tx.init(adapted.params)
    rng = np.random.default_rng(5)
    wanted, rounded = np.zeros((8, 8)), params["w"]
    for link in range(links):
        a, b = np.ones((8, 1)), size * rng.uniform(0.5, 1, (1, 8))
        wanted += a @ b.astype(np.float32)
        rounded = (rounded + jnp.asarray(a @ b, jnp.bfloat16)).astype(jnp.bfloat16)
        adapted = adapted.replace(params={"w": {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}})
        if link < links - 1:
            adapted, state = jlora.restart(adapted, state, tx, jax.random.fold_in(KEY, link))
    identity = jnp.eye(8, dtype=jnp.float32)
    found = jlora.lift(lambda p, x: x @ p["w"].astype(jnp.float32))(adapted, identity)
    delta = np.asarray(found, np.float64) - np.asarray(params["w"], np.float64)
    np.testing.assert_allclose(delta, wanted, rtol=1e-3, atol=1e-7)
    assert np.array_equal(adapted.base["w"], params["w"])
    lost = np.abs(np.asarray(rounded, np.float64) - np.asarray(params["w"], np.float64) - wanted)
    assert np.median(lost) > 0.5 * np.median(wanted), "the base would have kept them too: nothing was tried"


@pytest.mark.once
@pytest.mark.parametrize(
    ("method", "kinds"),
    [
        pytest.param(jlora.LoRA(2), AxisType.Auto, marks=pytest.mark.long),
        (jlora.Chain(jlora.XGBLoRA(2, layers=1), links=2), AxisType.Explicit),
    ],
    ids=str,
)
def test_a_restart_leaves_every_array_where_it_lay(method, kinds):
    mesh = jax.make_mesh((2, 4), ("data", "model"), (kinds,) * 2)
    cuts = {"stack": P(None, "data", "model"), "out": P("model", None), "head": P(), "norm": P()}
    with jax.set_mesh(mesh):
        params = {name: jax.device_put(leaf, NamedSharding(mesh, cuts[name])) for name, leaf in base().items()}
        adapted = jlora.adapterize(params, spec(method), KEY)
        tx = jlora.optimizer(adapted, optax.adam, 0.1)
        state = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P())), tx.init(adapted.params))
        merged = jax.device_get(jlora.merge(adapted))
        places = jax.tree.map(lambda x: x.sharding, (adapted, state))
        adapted, state = jlora.restart(adapted, state, tx, jax.random.key(3))
        assert jax.tree.map(lambda x: x.sharding, (adapted, state)) == places
        for name, leaf in jax.device_get(jlora.merge(adapted)).items():
            np.testing.assert_allclose(leaf, merged[name], atol=1e-6)


@pytest.mark.once
def test_what_cannot_begin_anew_is_refused():
    def refused(method, dtype=jnp.float32):
        params = {"w": jnp.ones((8, 8), dtype)}
        adapted = jlora.adapterize(params, {"w": method})
        tx = optax.sgd(0.1)
        return lambda **options: jlora.restart(adapted, tx.init(adapted.params), tx, KEY, **options)

    with pytest.raises(
        ValueError, match=r"w: the base is bfloat16, to which a small link .* jlora.Chain\(LoRA\(rank=2\)"
    ):
        refused(jlora.LoRA(2), jnp.bfloat16)()
    with pytest.raises(ValueError, match=r"nothing adapted here can begin anew"):
        refused(jlora.Full())()
    with pytest.raises(ValueError, match=r"w: LoRA\(.*init=random\) does not start at the base's output"):
        refused(jlora.LoRA(2, init="random"))()
    with pytest.raises(ValueError, match=r"w: AdaLoRA\(.*\) follows a rule or schedule of its own over the whole run"):
        refused(jlora.AdaLoRA(4, 2, steps=10))()
    with pytest.raises(ValueError, match=r"prune is the share of the moments .* from 0 to 1; got 2"):
        refused(jlora.LoRA(2))(prune=2)
    with pytest.raises(ValueError, match=r'by "magnitude", got \'size\''):
        refused(jlora.LoRA(2))(by="size")


@pytest.mark.once
def test_a_chain_refuses_what_it_cannot_hold():
    with pytest.raises(TypeError, match=r"Chain goes around a method whose weight is w \+ a @ b .* got SHiRA"):
        jlora.Chain(jlora.SHiRA())
    with pytest.raises(TypeError, match=r"that of DoRA\(.*\) is another"):
        jlora.adapterize({"w": jnp.ones((8, 8))}, {"w": jlora.Chain(jlora.DoRA(jlora.LoRA(2)))})
    with pytest.raises(TypeError, match=r"can't begin AdaLoRA\(.*\) anew"):
        jlora.Chain(jlora.AdaLoRA(4, 2, steps=10))
    with pytest.raises(TypeError, match=r"can't begin GeLoRA\(.*\) anew: its ranks are given out once"):
        jlora.Chain(jlora.GeLoRA((1, 2)))
    with pytest.raises(TypeError, match=r"can't begin LoRA\(.*\) anew: it starts elsewhere than at the base"):
        jlora.Chain(jlora.LoRA(2, init="random"))
    with pytest.raises(TypeError, match=r"can't begin DeepLoRA\(.*\) anew: it starts from data"):
        jlora.Chain(jlora.DeepLoRA(compressed=True))
    with pytest.raises(TypeError, match=r"DoRA can't go around Chain"):
        jlora.DoRA(jlora.Chain(jlora.LoRA(2)))
    with pytest.raises(ValueError, match=r"links must be a positive integer, got 0"):
        jlora.Chain(jlora.LoRA(2), links=0)
    with pytest.raises(ValueError, match=r"steps must be at least its 4 links, got 3"):
        jlora.Chain(jlora.LoRA(2), links=4, steps=3)
    for ranks in ((2, 1), (2, 0, 1), [2, 1, 1]):
        with pytest.raises(ValueError, match=r"ranks must be 3 positive whole numbers, one a link, got"):
            jlora.Chain(jlora.LoRA(2), links=3, ranks=ranks)
    for inner in (jlora.LoRA(1), jlora.LoRA(2, init="pissa"), jlora.LoRA(2, init="orthogonal")):
        with pytest.raises(ValueError, match=r"ranks \(2, 1\) must be within the rank of .* got LoRA\("):
            jlora.Chain(inner, links=2, ranks=(2, 1))


@pytest.mark.once
def test_a_chain_of_one_link_is_its_inner_method():
    adapted = start(base(), jlora.Chain(jlora.LoRA(2), links=1))
    plain = start(base(), jlora.LoRA(2))
    same(adapted.params, plain.params)
    same(adapted.frozen, plain.frozen)
    assert jlora.Chain(jlora.LoRA(2), links=1, steps=8).event is None


@pytest.mark.once
def test_a_run_stopped_between_links_goes_on_with_the_same_bits(tmp_path):
    method = jlora.Chain(jlora.LoRA(2), links=3, steps=6)
    params, adapted, tx, state, step, _ = trained(method, steps=0)

    def run(adapted, state, first, last):
        for number in range(first, last + 1):
            adapted, state = step(adapted, state)
            adapted, state = jlora.run_events(adapted, state, tx, KEY, number)
        return adapted, state

    assert jlora.link_ends(3, 6) == [2, 4]
    stopped, kept = run(adapted, state, 1, 4)  # right after a restart
    assert int(stopped.frozen["out"]["link"]) == 2
    jlora.save(tmp_path / "adapters", stopped)
    kept = jax.device_get(kept)
    whole = run(stopped, jax.tree.map(jnp.asarray, kept), 5, 6)
    again = run(jlora.load(tmp_path / "adapters", params), jax.tree.map(jnp.asarray, kept), 5, 6)
    same((again[0].params, again[0].frozen, again[1]), (whole[0].params, whole[0].frozen, whole[1]))
