"""Starts on a mesh with explicit axes are those of one device, cut as their base is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora

W = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 12)), jnp.float32)
METHODS = [
    jlora.LoRA(rank=2, init="olora"),
    jlora.LoRA(rank=2, init="pissa"),
    jlora.LoRA(rank=2, init="pissa_niter_2"),
    jlora.SHiRA("weight", density=0.2),
    jlora.DoRA(jlora.LoRA(rank=2)),
    jlora.DeepLoRA(rank=2),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_start_on_explicit_axes_is_that_of_one_device(method):
    mesh = jax.make_mesh((2, 2), ("rows", "columns"), (AxisType.Explicit,) * 2)
    spec = {"w": jlora.Axes("batch in out", method)}
    alone = jlora.adapterize({"w": W}, spec)
    with jax.set_mesh(mesh):
        placed = jax.device_put(W, NamedSharding(mesh, P(None, "rows", "columns")))
        adapted = jlora.adapterize({"w": placed}, spec)
        merged = jlora.merge(adapted)["w"]
        assert merged.sharding == placed.sharding
    for ours, theirs in zip(
        jax.tree.leaves((adapted.params, adapted.frozen)), jax.tree.leaves((alone.params, alone.frozen))
    ):
        # The factorisations leave the sign of each rank free.
        np.testing.assert_allclose(np.abs(ours), np.abs(theirs), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(merged, jlora.merge(alone)["w"], rtol=1e-5, atol=1e-5)
    for name, roles in method.axes.items():
        field = {**adapted.params["w"], **adapted.frozen.get("w", {})}[name]
        wanted = P(None, *({"in": "rows", "out": "columns"}.get(role) for role in roles))
        assert field.sharding.is_equivalent_to(NamedSharding(mesh, wanted), field.ndim), f"{name}: {field.sharding}"


@pytest.mark.once
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_starts_from_data_on_a_mesh_are_those_of_one_device(kind):
    mesh = jax.make_mesh((2, 2), ("rows", "columns"), (kind,) * 2)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 6, 8)), jnp.float32)
    params = {"w": W, "v": W[0]}
    spec = {"w": jlora.Axes("batch in out", jlora.EVA(rank=2)), "v": jlora.LoRA(rank=2, init="corda")}

    def loss_fn(params, x):
        layers = jax.lax.scan(lambda x, w: (x, jnp.sum(jnp.sin(x @ w))), x, params["w"])[1]
        return jnp.sum(layers) + jnp.sum(jnp.sin(x @ params["v"]))

    def start(params, x):
        mask = lambda x: jnp.abs(x[..., 0]) < 1.5
        return jlora.adapterize(params, spec, prepared=jlora.prepare(params, spec, loss_fn, [x, 2 * x], mask=mask))

    alone = start(params, x)
    with jax.set_mesh(mesh):
        cuts = {"w": P(None, None, "columns"), "v": P(None, "columns")}
        placed = {name: jax.device_put(leaf, NamedSharding(mesh, cuts[name])) for name, leaf in params.items()}
        adapted = start(placed, jax.device_put(x, NamedSharding(mesh, P("rows"))))
        merged = jlora.merge(adapted)
    for ours, theirs in zip(
        jax.tree.leaves((adapted.params, adapted.frozen)), jax.tree.leaves((alone.params, alone.frozen)), strict=True
    ):
        np.testing.assert_allclose(np.abs(ours), np.abs(theirs), rtol=1e-3, atol=1e-4)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5), merged, params)
