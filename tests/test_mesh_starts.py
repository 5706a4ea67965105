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
