"""An optimizer on a mesh: its state and its steps stay where they are, and moments may be cut over one axis more (ZeRO)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora

MESH = jax.make_mesh((4, 2), ("data", "fsdp"), (AxisType.Auto,) * 2)
X = jnp.asarray(np.random.default_rng(0).standard_normal((16, 8)), jnp.float32)
SPEC = {"up": jlora.LoRA(3, init="random"), "down": jlora.VeRA(4), "bias": jlora.Full()}


def model(p, x):
    return jnp.tanh(x @ p["up"] + p["bias"]) @ p["down"]


def adapt(mesh=MESH):
    place = lambda leaf, *spec: jax.device_put(leaf, NamedSharding(mesh, P(*spec)))
    normal = lambda seed, *shape: jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)
    params = {"up": place(normal(1, 8, 12), "fsdp"), "down": place(normal(2, 12, 8), None, "fsdp")}
    return jlora.adapterize(params | {"bias": place(normal(3, 12))}, SPEC, key=jax.random.key(0))


def train(zero=None, factory=optax.adamw, steps=3, wrap=lambda tx: tx):
    """The loop of the README: after some steps the params, the state, the compiled first step, and how many were compiled."""
    adapted = adapt()
    tx = wrap(jlora.optimizer(adapted, factory, 1e-2, zero=zero))
    x = jax.device_put(X, NamedSharding(MESH, P("data")))

    @jax.jit
    def step(adapted, state):
        loss = lambda p: jnp.mean(jlora.lift(model)(adapted.replace(params=p), x) ** 2)
        updates, state = tx.update(jax.grad(loss)(adapted.params), state, adapted.params)
        return adapted.replace(params=optax.apply_updates(adapted.params, updates)), state

    first = given = adapted, tx.init(adapted.params)
    compiled = step.lower(*given).compile()
    for _ in range(steps):
        given = step(*given)
    moved = jax.tree.map(lambda a, b: a.sharding == b.sharding, *(each[1] for each in (first, given)))
    assert jax.tree.all(moved), "an array of the state lies elsewhere after the steps"
    return given[0].params, given[1], compiled, step._cache_size()


def close(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found, wanted)


def moments(state):
    """Adam's two, of every group."""
    inner = [each.inner_state[0] for each in state.inner_states.values()]
    return [leaf for each in inner for leaf in jax.tree.leaves((each.mu, each.nu))]


def test_the_loops_step_is_compiled_once_and_moments_lie_beside_what_is_trained():
    params, state, _, compiled = train()
    assert compiled == 1 or (compiled == 0 and jax.__version_info__ < (0, 11))  # which drops some among many programs
    assert (
        state.inner_states["a"].inner_state[0].mu["up"]["a"].sharding.spec
        == params["up"]["a"].sharding.spec
        == P("fsdp")
    )
    assert state.inner_states["a"].inner_state[0].count.sharding == NamedSharding(MESH, P())


def test_moments_cut_over_the_data_axis_take_their_share_of_memory_and_give_the_same():
    params, state, plain, _ = train()
    cut, cut_state, program, compiled = train("data")
    close((cut, moments(cut_state)), (params, moments(state)))
    assert compiled == 1 or (compiled == 0 and jax.__version_info__ < (0, 11))  # which drops some among many programs
    lies = jlora.mesh.moments(adapt(), "data")
    assert lies["up"]["a"].spec == P(("fsdp", "data"))
    assert lies["bias"]["w"].spec == P("data") and lies["up"]["b"].spec == P(None, "data")
    local = lambda leaf: leaf.addressable_shards[0].data.nbytes
    saved = sum(map(local, moments(state))) - sum(map(local, moments(cut_state)))
    assert saved == 2 * 4 * sum(
        np.prod(place.shard_shape(leaf.shape)) * 3 for place, leaf in zip(jax.tree.leaves(lies), jax.tree.leaves(params))
        if "data" in str(place.spec)
    )  # fmt: skip
    sizes = [each.memory_analysis().argument_size_in_bytes for each in (plain, program)]
    assert sizes[0] - sizes[1] == saved


def test_what_the_axis_does_not_divide_stays_whole():
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    params = {name: jax.device_put(jnp.zeros((n, 6)), NamedSharding(mesh, P())) for name, n in (("u", 16), ("v", 6))}
    adapted = jlora.adapterize(params, {".*": jlora.LoRA(3)})
    lies = jlora.mesh.moments(adapted, "data")
    whole = {name for name, fields in lies.items() for place in fields.values() if "data" not in str(place.spec)}
    assert lies["u"]["a"].spec == P("data") and lies["u"]["b"].spec == P() and whole == {"u", "v"}
    with pytest.raises(ValueError, match=r"the mesh axis data=8 cuts no moment: .* \[\(3, 6\), \(6, 3\)\]"):
        jlora.optimizer(jlora.adapterize({"v": params["v"]}, {"v": jlora.LoRA(3)}), optax.adam, 1e-3, zero="data")
    with pytest.raises(ValueError, match="moments can't be cut by 'pod': the mesh has only data=8"):
        jlora.mesh.moments(adapted, "pod")
    with pytest.raises(ValueError, match="lie on a mesh of several devices with automatic axes; these do not"):
        jlora.optimizer(jlora.adapterize({"v": jnp.zeros((8, 8))}, {"v": jlora.LoRA(2)}), optax.adam, 1e-3, zero="data")


def test_sums_over_rows_and_offloaded_moments_are_cut_as_others_are():
    params, state, *_ = train(factory=optax.adafactor)
    cut, cut_state, *_ = train("data", optax.adafactor)
    close(cut, params)
    found, host, _, compiled = train("data", wrap=jlora.offload)
    close(found, train()[0])
    kinds = {leaf.sharding.memory_kind for leaf in moments(host)}
    assert kinds == {"pinned_host"} and compiled == 1
    assert any("data" in str(leaf.sharding.spec) for leaf in moments(host))
    assert jax.tree.structure(state) == jax.tree.structure(cut_state)


def test_an_optimizer_made_on_a_mesh_leaves_other_meshes_alone():
    adapted = adapt()
    tx = jlora.optimizer(adapted, optax.adamw, 1e-2)
    other = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    few = jax.device_put(adapted.params, NamedSharding(other, P()))
    updates, state = jax.jit(tx.update)(few, jax.jit(tx.init)(few), few)
    assert all(len(leaf.sharding.device_set) == 2 for leaf in jax.tree.leaves((updates, state)))
    spread = jax.shard_map(lambda p: tx.update(p, tx.init(p), p)[0], mesh=MESH, in_specs=P(), out_specs=P())
    close(jax.jit(spread)(adapted.params), updates)
