"""`QArray` leaves of qwix, as they are: decoded values are its own, and lifted functions take them."""

from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract.problems import close, normal

import jlora

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "qwix.npz")
NAMES = sorted({name.split("/")[0] for name in GOLDEN.files})


@flax.struct.dataclass
class QArray:
    """The fields of qwix's own class."""

    qvalue: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    qtype: str = flax.struct.field(pytree_node=False, default="")


def qarray(name):
    kinds = GOLDEN[f"{name}/kinds"]
    zero = jnp.asarray(GOLDEN[f"{name}/zero_point"], str(kinds[3])) if f"{name}/zero_point" in GOLDEN else None
    return QArray(
        jnp.asarray(GOLDEN[f"{name}/qvalue"]).astype(str(kinds[0])),
        jnp.asarray(GOLDEN[f"{name}/scale"], str(kinds[1])),
        zero,
        str(kinds[2]),
    )


def taken(name, leaf=None):
    """The params with one leaf of qwix, and the report of a function that reads it."""
    leaf = qarray(name) if leaf is None else leaf
    fn = lambda params, x: jnp.einsum("lbi,liho->lbho" if leaf.qvalue.ndim == 4 else "bi,io->bo", x, params["w"])
    x = normal(0, *((3, 4, 8) if leaf.qvalue.ndim == 4 else (4, 16)))
    sites = jlora.sites(fn, {"w": jax.ShapeDtypeStruct(leaf.qvalue.shape, jnp.float32)}, x)
    return fn, {"w": leaf, "n": 3}, x, sites


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.once
def test_values_are_those_of_qwix_and_are_lifted(name):
    fn, params, x, sites = taken(name)
    base = jlora.from_qwix(params, sites)
    decoded = jlora.dequantize(base)["w"]
    assert base["n"] == 3 and str(decoded.dtype) == GOLDEN[f"{name}/kinds"][1]
    np.testing.assert_array_equal(np.asarray(decoded, np.float32), GOLDEN[f"{name}/decoded"])
    adapted = jlora.adapterize(base, {"w": jlora.LoRA(2)}, sites=sites)
    x = x.astype(decoded.dtype)
    close(jlora.lift(fn)(adapted, x), fn({"w": decoded}, x))


def test_tiles_that_do_not_lie_together_when_axes_are_folded_are_spread():
    values = jnp.asarray(np.random.default_rng(0).integers(-127, 127, (3, 8, 2, 6)), jnp.int8)
    scale = jnp.abs(normal(1, 1, 4, 1, 6)) + 0.1
    spread = jnp.repeat(jnp.repeat(scale, 2, axis=1), 2, axis=2)
    _, params, _, sites = taken("", QArray(values, scale, None, "int8"))
    found = jlora.from_qwix(params, sites)["w"]
    np.testing.assert_array_equal(found.decoded(), values.astype(jnp.float32) * spread)
    assert found.fields["scales"].shape == (3, 4, 12)


def test_what_is_not_of_qwix_is_refused():
    with pytest.raises(ValueError, match="no QArray among the params"):
        jlora.from_qwix({"w": normal(0, 4, 4)})
    _, params, _, sites = taken(
        "", QArray(jnp.ones((16, 12), jnp.int8), jnp.ones((1, 1), jnp.float8_e4m3fn), None, "nvfp4")
    )
    with pytest.raises(ValueError, match="w: qwix's nvfp4 has scales of float8_e4m3fn"):
        jlora.from_qwix(params, sites)
    _, params, _, sites = taken("int8")
    with pytest.raises(ValueError, match="is qwix's form, which jlora reads and does not make"):
        jlora.requantize(jlora.adapterize(jlora.from_qwix(params, sites), {"w": jlora.LoRA(2)}, sites=sites))
