"""VeRA: the numbers of PEFT 0.21, projections shared by the whole tree, and DVoRA."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import checks, discovery
from descent import descend
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora

pytestmark = pytest.mark.once

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "vera.npz"))
CHECKS = discovery.checks(checks)
LAYERS = ("up", "down")
BASE = {layer: {"kernel": jnp.asarray(GOLDEN[f"{layer}/w"])} for layer in LAYERS}
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def forward(params, x):
    x = jnp.tanh(x @ params["up"]["kernel"] + GOLDEN["up/bias"])
    return x @ params["down"]["kernel"] + GOLDEN["down/bias"]


def vectors(prefix):
    return {
        layer: {"kernel": {name: jnp.asarray(GOLDEN[f"{prefix}/{layer}/{name}"]) for name in "db"}} for layer in LAYERS
    }


def with_projections_of_peft(prefix):
    adapted = jlora.adapterize(BASE, {".*": jlora.VeRA(rank=3)})
    drawer = {name: jnp.asarray(GOLDEN[name]) for name in "ab"}
    assert jax.tree.map(jnp.shape, adapted.frozen) == {"~shared": {"VeRA": jax.tree.map(jnp.shape, drawer)}}
    return adapted.replace(params=vectors(prefix), frozen={"~shared": {"VeRA": drawer}})


def test_outputs_gradients_and_steps_are_those_of_peft():
    adapted = with_projections_of_peft("before")

    def outputs(p):
        return jlora.lift(forward, strict=True)(adapted.replace(params=p), GOLDEN["x"])

    tx = jlora.optimizer(adapted, optax.adam, learning_rate=0.02)
    y, _, gradients, after = descend(outputs, adapted.params, tx, steps=5)
    close(y[0], GOLDEN["y"])
    jax.tree.map(lambda mine, theirs: close(mine[0], theirs), gradients, vectors("gradient"))
    jax.tree.map(close, after, vectors("after"))


def test_merged_weights_are_those_of_peft():
    merged = jlora.merge(with_projections_of_peft("after"))
    for layer in LAYERS:
        close(merged[layer]["kernel"], GOLDEN[f"merged/{layer}"])


def test_the_start_is_that_of_peft():
    adapted = jlora.adapterize(BASE, {".*": jlora.VeRA(rank=3)})
    jax.tree.map(np.testing.assert_array_equal, adapted.params, vectors("start"))
    drawn = jlora.adapterize({"w": jnp.zeros((256, 128))}, {"w": jlora.VeRA(rank=16)}).frozen["~shared"]["VeRA"]
    for name in "ab":
        extreme, deviation = GOLDEN[f"drawn/{name}"]
        np.testing.assert_allclose(jnp.max(jnp.abs(drawn[name])), extreme, rtol=0.01)
        np.testing.assert_allclose(jnp.std(drawn[name]), deviation, rtol=0.05)


def test_in_the_first_step_only_b_has_a_gradient():
    adapted = jlora.adapterize(BASE, {".*": jlora.VeRA(rank=3)})
    lifted = jlora.lift(forward)
    gradients = jax.grad(lambda p: jnp.sum(jnp.sin(lifted(adapted.replace(params=p), GOLDEN["x"]))))(adapted.params)
    for layer in LAYERS:
        assert not np.any(gradients[layer]["kernel"]["d"]) and np.all(gradients[layer]["kernel"]["b"] != 0)


def test_the_projections_come_from_their_own_key_and_from_nothing_else():
    def drawn(method, key, params):
        return jax.device_get(jlora.adapterize(params, {".*": method}, key=jax.random.key(key)).frozen["~shared"])

    first = drawn(jlora.VeRA(rank=3), 0, BASE)
    jax.tree.map(np.testing.assert_array_equal, first, drawn(jlora.VeRA(rank=3), 1, BASE))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), BASE)
    jax.tree.map(np.testing.assert_array_equal, first, drawn(jlora.VeRA(rank=3, d_initial=0.1), 2, half))
    with jax.default_prng_impl("rbg"):
        jax.tree.map(np.testing.assert_array_equal, first, drawn(jlora.VeRA(rank=3), 0, BASE))
    other = drawn(jlora.VeRA(rank=3, projection_key=1), 0, BASE)
    assert np.all(first["VeRA"]["a"] != other["VeRA"]["a"]) and np.all(first["VeRA"]["b"] != other["VeRA"]["b"])


def test_leaves_of_all_sizes_and_stacks_slice_one_pair():
    shapes = {"small": (4, 3), "tall": (9, 2), "wide": (2, 11), "stack": (2, 4, 3)}
    params = {name: jnp.asarray(np.random.default_rng(0).standard_normal(s), jnp.float32) for name, s in shapes.items()}
    method = jlora.VeRA(rank=5)
    adapted = jlora.adapterize(params, {"stack": jlora.Axes("batch in out", method), ".*": method})
    drawer = adapted.frozen["~shared"]["VeRA"]
    assert set(adapted.frozen) == {"~shared"} and (drawer["a"].shape, drawer["b"].shape) == ((9, 5), (5, 11))
    assert {name: p["d"].shape + p["b"].shape for name, p in adapted.params.items()} == {
        "small": (5, 3),
        "tall": (5, 2),
        "wide": (5, 11),
        "stack": (2, 5, 2, 3),
    }
    noisy = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.arange(leaf.size).reshape(leaf.shape), adapted.params)
    for name, merged in jlora.merge(adapted.replace(params=noisy)).items():
        rows, columns = shapes[name][-2:]
        a, b = np.asarray(drawer["a"])[:rows], np.asarray(drawer["b"])[:, :columns]
        d, scale = noisy[name]["d"], noisy[name]["b"]
        np.testing.assert_allclose(
            merged, params[name] + np.einsum("ik,...k,ko,...o->...io", a, d, b, scale), rtol=1e-5, atol=1e-5
        )


def test_the_projections_lie_whole_on_every_device_and_are_saved(tmp_path):
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
    params = {"w": jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, P("data", "model")))}
    adapted = jlora.adapterize(params, {"w": jlora.VeRA(rank=3)})
    jlora.save(tmp_path / "adapters", adapted)
    loaded = jlora.load(tmp_path / "adapters", params)
    for each in (adapted, loaded):
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(each.frozen))
        assert all(leaf.sharding.mesh.size == 8 for leaf in jax.tree.leaves(each.frozen))
        assert each.params["w"]["b"].sharding.spec == P("model")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded.frozen), jax.device_get(adapted.frozen))


def test_the_projections_are_no_constants_of_the_compiled_program():
    adapted = jlora.adapterize({"w": jnp.ones((64, 64))}, {"w": jlora.VeRA(rank=32)})
    lowered = jax.jit(jlora.lift(lambda params, x: x @ params["w"])).lower(adapted, jnp.ones((2, 64)))
    assert len(lowered.as_text()) < 64 * 32


QUICK = ["check_agree", "check_io", "check_mesh", "check_start"]


@pytest.mark.parametrize("check", QUICK)
def test_dvora_keeps_the_contract(check):
    CHECKS[check](jlora.DoRA(jlora.VeRA(rank=4)))


@pytest.mark.long
@pytest.mark.parametrize("check", sorted(set(CHECKS) - set(QUICK)))
def test_dvora_keeps_the_rest_of_the_contract(check):
    CHECKS[check](jlora.DoRA(jlora.VeRA(rank=4)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 0}, "VeRA's rank must be an integer of at least 1, got 0"),
        ({"rank": 2.0}, "VeRA's rank must be an integer of at least 1, got 2.0"),
        ({"projection_key": -1}, "VeRA's projection_key must be an integer of at least 0, got -1"),
        ({"d_initial": 0.0}, "VeRA's d_initial must be finite and not zero, got 0.0"),
        ({"dropout": 1}, "VeRA's dropout must be at least 0 and below 1, got 1"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        jlora.VeRA(**wrong)
