"""`average`: the mean of adapters is that of what they add to the weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora

pytestmark = pytest.mark.once

KEYS = jax.random.split(jax.random.key(0), 9)
PARAMS = {"stack": jax.random.normal(KEYS[0], (2, 6, 4)), "w": jax.random.normal(KEYS[1], (6, 6)), "bias": jnp.ones(6)}
LORA = jlora.LoRA(2, init="random")


def client(number, method=LORA, params=PARAMS):
    spec = {"stack": jlora.Axes("batch in out", method), "w": method, "bias": jlora.Full()}
    adapted = jlora.adapterize(params, {name: spec[name] for name in params}, KEYS[number])
    return adapted.replace(params=moved(adapted.params, KEYS[number]))


@jax.jit
def moved(params, key):
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), params)


@jax.jit
def deltas(adapted):
    return jax.tree.map(jnp.subtract, jlora.merge(adapted), adapted.base)


def mean(adapters, weights):
    terms = [
        jax.tree.map(lambda d, w=w: w / sum(weights) * np.asarray(d), deltas(a)) for a, w in zip(adapters, weights)
    ]
    return jax.tree.map(lambda *x: sum(x), *terms)


def close(found, wanted):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, wanted)


def test_the_mean_is_that_of_the_updates_whatever_the_ranks_scales_and_methods():
    adalora = jlora.AdaLoRA(rank=2, target=1, steps=4, start_steps=1, final_steps=1, interval=1)
    methods = [LORA, jlora.LoRA(3, alpha=5, init="random"), adalora, jlora.VeRA(rank=3)]
    flat = {name: PARAMS[name] for name in ("w", "bias")}
    clients, weights = [client(n + 2, method, flat) for n, method in enumerate(methods)], [1, 2, 3.5, 4]
    found = jlora.average(clients, weights)
    close(deltas(found), mean(clients, weights))
    assert [str(site.method) for site in found.plan.sites] == [
        "Full()",
        "LoRA(rank=6, alpha=24.0)",
    ]  # of a 6 x 6 matrix
    close(deltas(jlora.average(clients[:2])), mean(clients[:2], [1, 1]))
    assert found.base is clients[0].base and set(found.params) == set(flat) and found.frozen == {}


def test_a_mean_of_a_rank_is_the_nearest_one():
    clients = [client(2), client(3, jlora.LoRA(3, init="random"))]
    found = jlora.average(clients, rank=2)
    for name, delta in mean(clients, [1, 1]).items():
        if name != "bias":
            u, s, v = np.linalg.svd(delta)
            wanted = (u[..., :2] * s[..., None, :2]) @ v[..., :2, :]
            np.testing.assert_allclose(deltas(found)[name], wanted, atol=1e-6)
    assert found.params["stack"]["a"].shape == (2, 6, 2)


def test_a_leaf_that_one_leaves_alone_is_not_changed_by_it():
    clients = [client(2), jlora.adapterize(PARAMS, {"w": LORA}, KEYS[1])]
    close(deltas(jlora.average(clients, [1, 3])), mean(clients, [1, 3]))


def test_ranks_that_the_mean_does_not_need_start_as_lora_does():
    fresh = [jlora.adapterize(PARAMS, {"w": jlora.LoRA(2)}, key) for key in KEYS[:2]]
    found = jlora.average(fresh, rank=2).params["w"]
    np.testing.assert_allclose(np.linalg.norm(found["a"], axis=0), 1, rtol=1e-6)
    assert not found["b"].any()


def test_on_a_mesh_the_mean_lies_as_adapters_do_and_under_jit_it_is_the_same():
    mesh = jax.make_mesh((2,), ("model",), (AxisType.Auto,), devices=jax.devices()[:2])
    base = {"w": jax.device_put(PARAMS["w"], NamedSharding(mesh, P("model", None)))}
    one, two = (jlora.adapterize(base, {"w": LORA}, key) for key in KEYS[:2])
    for rank in (None, 2):
        assert jlora.average([one, two], rank=rank).params["w"]["a"].sharding.spec == P("model")
    of_params = lambda *each: jlora.average([one.replace(params=params) for params in each]).params
    close(jax.jit(of_params)(one.params, two.params), jlora.average([one, two]).params)


@pytest.mark.parametrize(
    "adapters, options, message",
    [
        (list, {}, "average takes adapters and a weight for each, got 0 and 0"),
        (lambda: [client(2)], {"weights": [1, 2]}, "got 1 and 2"),
        (lambda: [client(2), client(3)], {"weights": [1, -1]}, r"weights must be positive numbers, got \[1, -1\]"),
        (lambda: [client(2)], {"rank": 0}, "rank must be a positive integer, got 0"),
        (lambda: [client(2, jlora.DoRA(LORA))], {}, r"stack: DoRA\(.*has no factors"),
        (lambda: [jlora.adapterize({"w": jnp.ones((2, 2))}, {"w": jlora.IA3()})], {}, r"w: IA3\(.*has no factors"),
        (lambda: [client(2), client(3, params={**PARAMS, "bias": jnp.zeros(6)})], {},
         "bias: adapters 0 and 1 stand on different bases"),
        (lambda: [jlora.adapterize({"w": jnp.ones((2, 2, 2))}, {"w": jlora.Axes(roles, LORA)}) for roles in
                  ("batch in out", "in batch out")], {}, "w: adapters 0 and 1 take it differently"),
    ],
    ids=["none", "count", "negative", "rank", "DoRA", "IA3", "base", "axes"],
)  # fmt: skip
def test_what_has_no_mean_is_refused_by_name(adapters, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        jlora.average(adapters(), **options)
