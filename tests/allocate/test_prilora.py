"""Ranks that differ by layer, and PRILoRA's pruning against a loop in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.problems import jit, normal, weight
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora.core.protocol.layers import layer_numbers
from jlora.methods.prilora.method import linear_ranks
from jlora.methods.prilora.rule import least

RATE, MOMENTUM, DECAY, STEPS = 0.1, 0.5, 0.01, 9
OPTIONS = {"first": 2, "last": 5, "alpha": 6, "every": 4, "pruned": 2, "group": 3, "beta": 0.8}
# An inner axis of 10: three groups of three and one that is not full.
BASE = {"stack": weight(0, 3, 10, 10), "top": weight(1, 10, 10)}
RANKS = {"stack": [2, 3, 4], "top": 5}
X = normal(3, 4, 10)


def model(params, x):
    x = jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, params["stack"])[0]
    return x @ params["top"]


SITES = jlora.sites(model, BASE, X)


def start(**changes):
    return jlora.adapterize(BASE, {".*": jlora.PRILoRA(**{**OPTIONS, **changes})}, sites=SITES)


def test_ranks_are_linear_and_add_up_exactly():
    assert linear_ranks(4, 12, 12).tolist() == [4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12]
    assert linear_ranks(4, 12, 1).tolist() == [8] and linear_ranks(3, 3, 4).tolist() == [3] * 4
    for first, last, layers in [
        (1, 2, 3),
        (1, 4, 7),
        (2, 3, 6),
        (5, 2, 4),
        (1, 2, 4),
        (4, 12, 6),
        (1, 3, 5),
        (2, 5, 3),
    ]:
        ranks = linear_ranks(first, last, layers)
        assert (ranks[0], ranks[-1]) == (first, last) and np.all(np.diff(ranks) * (last - first) >= 0)
        assert np.all(np.abs(ranks - np.linspace(first, last, layers)) <= 0.5)
        assert 2 * ranks.sum() - (first + last) * layers in (0, layers % 2), (
            "halves add up to more or less than the mean"
        )


@pytest.mark.once
def test_layers_are_counted_by_stacked_axes_and_by_numbers_of_paths():
    shapes = {"layer_2": (4, 4), "layer_10": (4, 4), "pooler": (4, 4), "embed": (4, 4), "layer_1": (4, 4)}
    params = {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}
    params["layers"] = {"Dense_0": {"kernel": jnp.ones((12, 2, 4, 4))}}
    spec = {"layers.*": jlora.Axes("batch batch in out", jlora.LoRA(2)), ".*": jlora.LoRA(2)}
    sites = jlora.adapterize(params, spec).plan.sites
    numbers, count = layer_numbers(sites)
    found = {site.keys[0]: number for site, number in zip(sites, numbers)}
    assert count == 14 and found["embed"] == 0 and found["pooler"] == 13
    assert [found[f"layer_{n}"] for n in (1, 2, 10)] == [2, 3, 11]
    assert found["layers"].tolist() == [[n + 1] * 2 for n in range(12)]
    assert layer_numbers([site for site in sites if site.keys[0] in ("pooler", "embed")])[0] == [0, 1]


def test_an_axis_of_experts_inside_numbered_layers_counts_no_layers():
    params = {f"layers_{n}": {"q": jnp.ones((4, 4)), "experts": jnp.ones((3, 4, 4))} for n in range(2)}
    spec = {".*/experts": jlora.Axes("batch in out", jlora.LoRA(2)), ".*/q": jlora.LoRA(2)}
    sites = jlora.adapterize(params, spec).plan.sites
    numbers, count = layer_numbers(sites)
    assert count == 2
    assert {site.path: np.ravel(number).tolist() for site, number in zip(sites, numbers)} == {
        "layers_0/experts": [0, 0, 0], "layers_0/q": [0], "layers_1/experts": [1, 1, 1], "layers_1/q": [1],
    }  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("mode", ["zero", "freeze"])
def test_pruning_is_the_same_on_a_mesh_with_explicit_axes(mode):
    mesh = jax.make_mesh((2,), ("model",), (AxisType.Explicit,))
    params = {"w": normal(3, 12, 8)}
    adapted = jlora.adapterize(params, {"w": jlora.PRILoRA(3, 3, every=2, pruned=2, group=3, mode=mode)})
    tx = jlora.optimizer(adapted, optax.adam, 0.1)

    def run(p, norms):
        state = tx.init(p)
        for _ in range(3):
            updates, state = tx.update(jax.tree.map(jnp.ones_like, p), state, p, inputs={"w": norms})
            p = optax.apply_updates(p, updates)
        return p

    alone = jit(run)(adapted.params, jnp.arange(12.0))
    with jax.set_mesh(mesh):
        place = lambda leaf, *cut: jax.device_put(leaf, NamedSharding(mesh, P(*cut)))
        a, b = (adapted.params["w"][name] for name in "ab")
        there = jit(run)({"w": {"a": place(a, "model"), "b": place(b)}}, place(jnp.arange(12.0), "model"))
    assert (np.asarray(alone["w"]["a"]) == 0).any() == (mode == "freeze")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), *jax.device_get((there, alone)))


@pytest.mark.once
def test_every_layer_has_its_rank_and_scale_and_padding_never_moves():
    adapted = start(pruned=0)
    for name, ranks in RANKS.items():
        in_use = np.any(np.asarray(adapted.params[name]["a"]) != 0, axis=-2).sum(-1)
        assert in_use.tolist() == ranks
        assert adapted.params[name]["a"].shape[-1] == np.max(ranks)
    assert jlora.ranks(adapted) == {"stack[0]": 2, "stack[1]": 3, "stack[2]": 4, "top": 5}
    tx = jlora.optimizer(adapted, optax.adamw, learning_rate=0.05, weight_decay=0.1)

    @jit
    def train(p):
        def step(carry, _):
            gradients = jax.grad(lambda p: jnp.sum(jlora.lift(model)(adapted.replace(params=p), X) ** 2))(carry[0])
            updates, state = tx.update(gradients, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (p, tx.init(p)), length=5)[0]

    params, state = train(adapted.params)
    merged = jlora.merge(adapted.replace(params=params))
    a, b = (np.asarray(params["stack"][name]) for name in "ab")
    for layer, rank in enumerate(RANKS["stack"]):
        assert not a[layer, :, rank:].any() and not b[layer, rank:].any() and b[layer, :rank].all()
        wanted = BASE["stack"][layer] + 6 / rank * a[layer, :, :rank] @ b[layer, :rank]
        np.testing.assert_allclose(merged["stack"][layer], wanted, rtol=1e-4, atol=1e-5)
    assert all(not np.any(m["stack"]["a"][0, :, 2:]) for m in _moments(state))
    small = jlora.compact(adapted.replace(params=params))
    assert all(type(site.method) is jlora.LoRA for site in small.plan.sites) and not small.frozen
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), jlora.merge(small), merged)


def _moments(state):
    found = []
    jax.tree.map(
        lambda x: found.append(x) if isinstance(x, dict) and "stack" in x else x,
        state,
        is_leaf=lambda x: isinstance(x, dict) and "stack" in x,
    )
    assert found
    return [tree for tree in found if isinstance(tree["stack"], dict) and hasattr(tree["stack"].get("a"), "shape")]


@pytest.fixture(scope="module", params=["zero", "freeze"])
def run(request):
    """The method's run with given gradients and norms: params and states after every step."""
    adapted = start(mode=request.param)
    rng = np.random.default_rng(5)
    draw = lambda shape: rng.standard_normal((STEPS, *shape)).astype(np.float32)
    gradients = jax.tree.map(lambda x: draw(x.shape), adapted.params)
    norms = {name: np.abs(draw(leaf.shape[:-1])) for name, leaf in BASE.items()}
    tx = jlora.with_rules(adapted, optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE, momentum=MOMENTUM)))

    def step(carry, given):
        p, state = carry
        updates, state = tx.update(given[0], state, p, inputs=given[1])
        p = optax.apply_updates(p, updates)
        return (p, state), (p, state)

    scan = jit(lambda carry, given: jax.lax.scan(step, carry, given))
    first = (adapted.params, tx.init(adapted.params))
    _, course = scan(first, (gradients, norms))
    return request.param, adapted, gradients, norms, jax.device_get(course), (scan, first)


@pytest.mark.once
def test_values_averages_and_moments_are_those_of_a_loop(run):
    mode, adapted, gradients, norms, (course, states), _ = run
    for name in BASE:
        a = np.array(adapted.params[name]["a"], np.float64)
        b = np.array(adapted.params[name]["b"], np.float64)
        batch = a.shape[:-2]
        trace_a, trace_b, average = np.zeros_like(a), np.zeros_like(b), np.zeros(a.shape[:-1])
        frozen = np.zeros(a.shape, bool)
        for t in range(1, STEPS + 1):
            average = 0.8 * average + 0.2 * norms[name][t - 1]
            trace_a = MOMENTUM * trace_a + gradients[name]["a"][t - 1] + DECAY * a
            trace_b = MOMENTUM * trace_b + gradients[name]["b"][t - 1] + DECAY * b
            a, b = a - RATE * trace_a, b - RATE * trace_b
            a[frozen], trace_a[frozen] = 0, 0
            if t % 4 == 0:
                for index in np.ndindex(*batch):
                    for column in range(a.shape[-1]):
                        for first in range(0, 10, 3):
                            rows = list(range(first, min(first + 3, 10)))
                            importance = [
                                -1
                                if frozen[(*index, r, column)]
                                else abs(a[(*index, r, column)]) * average[(*index, r)]
                                for r in rows
                            ]
                            for place in sorted(range(len(rows)), key=lambda n: importance[n])[:2]:
                                spot = (*index, rows[place], column)
                                a[spot], trace_a[spot], frozen[spot] = 0, 0, mode == "freeze"
            np.testing.assert_allclose(course[name]["a"][t - 1], a, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(course[name]["b"][t - 1], b, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(states.norms[name][t - 1], average, rtol=1e-5)
            np.testing.assert_allclose(states.inner[1][0].trace[name]["a"][t - 1], trace_a, rtol=1e-4, atol=1e-5)


@pytest.mark.once
def test_each_group_keeps_exactly_what_it_should_and_mode_decides_what_comes_after(run):
    mode, _, _, _, (course, _), _ = run
    for name in BASE:
        zeros = np.asarray(course[name]["a"]) == 0
        pruned = zeros[3]
        assert np.all(pruned[..., :9, :].reshape(*pruned.shape[:-2], 3, 3, -1).sum(-2) == 2)
        assert np.all(pruned[..., 9, :]), "of a group of one, which 2 + 1 infinite ones fill up, the one goes"
        assert np.all(zeros[4][pruned]) == (mode == "freeze")
        assert np.all(zeros[7].sum() == pruned.sum())


@pytest.mark.once
def test_a_run_stopped_in_the_middle_ends_with_the_same_bits(run):
    _, _, gradients, norms, (course, states), (scan, first) = run
    cut = lambda part: jax.tree.map(lambda x: x[part], (gradients, norms))
    carry = jax.device_put(jax.device_get(scan(first, cut(slice(0, 5)))[0]))
    last = scan(carry, cut(slice(5, None)))[0]
    wanted = jax.tree.map(lambda x: x[-1], (course, states))
    assert all(map(np.array_equal, jax.tree.leaves(last), jax.tree.leaves(wanted)))


def test_pruning_is_idempotent_exact_with_ties_and_by_magnitude_for_equal_norms():
    a = normal(7, 2, 8, 3)
    pruned = jnp.where(least(jnp.abs(a), 2, 4), 0, a)
    assert np.array_equal(least(jnp.abs(pruned), 2, 4), pruned == 0)
    assert least(jnp.ones((4, 1)), 2, 4)[:, 0].tolist() == [True, True, False, False]
    for matrix, mask in zip(np.asarray(a), np.asarray(least(jnp.abs(a), 2, 4))):
        smallest = np.sort(np.abs(matrix).reshape(2, 4, 3), axis=1)[:, 1]
        assert np.array_equal(mask, np.abs(matrix) <= smallest.repeat(4, axis=0))


def test_in_a_loop_the_norms_come_from_observe_and_nothing_is_compiled_twice():
    adapted = start(every=2)
    tx = optax.chain(optax.clip_by_global_norm(1.0), jlora.optimizer(adapted, optax.adamw, learning_rate=0.01))
    observed = jlora.observe(model, jlora.input_norms)

    @jit
    def step(adapted, state):
        def loss(p):
            outputs, seen = observed(adapted.replace(params=p), X)
            return jnp.mean(outputs**2), seen

        gradients, seen = jax.grad(loss, has_aux=True)(adapted.params)
        updates, state = tx.update(gradients, state, adapted.params, inputs=seen)
        return adapted.replace(params=optax.apply_updates(adapted.params, updates)), state

    state = tx.init(adapted.params)
    for _ in range(3):
        adapted, state = step(adapted, state)
    assert step._cache_size() == 1
    first = np.linalg.norm(X, axis=0)  # the first layer sees the model's input in every step
    np.testing.assert_allclose(state[1].norms["stack"][0], first * (1 - 0.8**3), rtol=1e-5)


@pytest.mark.once
def test_errors_say_what_is_missing():
    adapted = start()
    tx = jlora.optimizer(adapted, optax.adam, learning_rate=0.01)
    state = tx.init(adapted.params)
    with pytest.raises(ValueError, match=r"needs the params and the norms of its inputs: .* jlora.observe"):
        tx.update(adapted.params, state, adapted.params)
    with pytest.raises(ValueError, match=r"inputs has \(3, 9\) for stack, wanted norms of shape \(3, 10\)"):
        tx.update(adapted.params, state, adapted.params, inputs={"stack": jnp.ones((3, 9)), "top": jnp.ones(10)})
    looked_up = jlora.adapterize({"w": jnp.ones((9, 9))}, {"w": jlora.Axes("in out", jlora.PRILoRA(2, 4), "gather")})
    with pytest.raises(ValueError, match="w: PRILoRA prunes by the inputs of a product, and a lookup has none"):
        jlora.optimizer(looked_up, optax.adam, learning_rate=0.01)
    with pytest.raises(ValueError, match=r"top, shape \(10, 10\): its layer's rank 12 is above the smaller side"):
        start(last=12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first": 0}, "first must be a positive whole number, got 0"),
        ({"pruned": 3}, r"pruned \(3\) must be below its group \(3\)"),
        ({"beta": 1.0}, "beta must be at least 0 and below 1, got 1.0"),
        ({"mode": "drop"}, 'mode must be "zero" or "freeze"'),
        ({"alpha": 0}, "alpha must be positive"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"PRILoRA's {message}"):
        jlora.PRILoRA(**{**OPTIONS, **changes})


@pytest.mark.once
def test_gelora_takes_ranks_for_its_layers():
    method = jlora.GeLoRA((1, 3, 2, 4), alpha=5)
    adapted = jlora.adapterize(BASE, {".*": method}, sites=SITES)
    assert adapted.frozen["stack"]["gate"].sum(-1).tolist() == [1, 3, 2] and adapted.params["top"]["b"].shape == (
        4,
        10,
    )
    assert method.scale == 2.0
    with pytest.raises(ValueError, match="GeLoRA has ranks for 2 layers, but stack and the like are in 3"):
        jlora.adapterize({"stack": BASE["stack"]}, {"stack": jlora.Axes("batch in out", jlora.GeLoRA((1, 2)))})
    with pytest.raises(ValueError, match=r"w, shape \(4, 4\): GeLoRA's ranks come from data: .*intrinsic_dimensions"):
        jlora.adapterize({"w": jnp.ones((4, 4))}, {"w": jlora.GeLoRA()})
    for ranks in (0, (), (1, 0), 2.0):
        with pytest.raises(
            ValueError, match="GeLoRA's ranks must be a positive whole number, or a tuple of one a layer"
        ):
            jlora.GeLoRA(ranks)
    assert jlora.method_from_dict(jlora.method_to_dict(method)) == method


def test_inputs_or_gradients_that_are_not_finite_change_no_average():
    adapted = jlora.adapterize({"layer_0": jnp.ones((4, 4)), "layer_1": jnp.ones((4, 4))}, {".*": jlora.PRILoRA(1, 2)})
    tx = jlora.with_rules(adapted, optax.apply_if_finite(optax.sgd(0.1), 9))
    step = jax.jit(lambda g, state, seen: tx.update(g, state, adapted.params, inputs=seen)[1])
    seen, gradient = {"layer_0": jnp.ones(4), "layer_1": jnp.full(4, 2.0)}, adapted.params
    first = step(gradient, tx.init(adapted.params), seen)
    wild = {**gradient, "layer_1": {**gradient["layer_1"], "b": gradient["layer_1"]["b"].at[0, 0].set(jnp.inf)}}
    for given in ((gradient, {**seen, "layer_0": seen["layer_0"].at[1].set(jnp.nan)}), (wild, seen)):
        state = step(given[0], first, given[1])
        jax.tree.map(np.testing.assert_array_equal, state.norms, first.norms)
        assert jlora.skipped_steps(state) == 1 and int(state.step) == 2
    assert float(step(gradient, first, seen).norms["layer_1"][0]) > float(first.norms["layer_1"][0]) > 0
