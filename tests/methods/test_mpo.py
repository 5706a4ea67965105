"""MPO: the numbers of its reference code, entries one by one, and what layers share."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.problems import perturbed, weight
from descent import descend

import jlora

pytestmark = pytest.mark.once

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "mpo.npz"))
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
METHOD = jlora.MPO(bond=3, mode=2, depth=2, scale=2.0)
NAMES = ("t0", "t1", "t3", "t4")


def forward(params, x):
    first, second = params["layers_0"]["up"], params["layers_1"]["up"]
    return jnp.tanh(x @ first)[:, :32] @ second


def cores(prefix):
    own = {f"layers_{n}": {"up": {name: GOLDEN[f"{prefix}/{n}/{name}"] for name in NAMES}} for n in range(2)}
    return jax.tree.map(jnp.asarray, {**own, "~shared": {"MPO": {"central": GOLDEN[f"{prefix}/central"][None]}}})


def of_the_reference():
    base = {f"layers_{n}": {"up": jnp.asarray(GOLDEN[f"w/{n}"])} for n in range(2)}
    adapted = jlora.adapterize(base, {".*": METHOD})
    assert jax.tree.map(jnp.shape, cores("before")) == jax.tree.map(jnp.shape, adapted.params)
    return adapted.replace(params=cores("before"))


def test_outputs_gradients_and_steps_are_those_of_the_reference():
    adapted = of_the_reference()

    def outputs(p):
        return jlora.lift(forward)(adapted.replace(params=p), GOLDEN["x"])

    tx = jlora.optimizer(adapted, optax.adam, learning_rate=0.01)
    y, _, gradients, after = descend(outputs, adapted.params, tx, steps=3)
    close(y[0], GOLDEN["y"], atol=1e-4)
    jax.tree.map(lambda mine, theirs: close(mine[0], theirs, atol=1e-3), gradients, cores("gradient"))
    jax.tree.map(partial(close, atol=1e-3), after, cores("after"))


def test_merged_weights_are_those_of_the_reference():
    merged = jlora.merge(of_the_reference())
    for n in range(2):
        close(merged[f"layers_{n}"]["up"], GOLDEN[f"merged/{n}"])


def digits(number, bases):
    found = []
    for base in reversed(bases):
        number, digit = divmod(number, base)
        found.append(digit)
    return found[::-1]


def test_an_entry_is_the_product_of_the_matrices_that_its_digits_choose_also_where_the_matrix_is_cut():
    method = jlora.MPO(bond=4, mode=2)
    params = {"up": weight(0, 3, 7, 9), "down": weight(1, 3, 9, 7)}
    adapted = perturbed(jlora.adapterize(params, {".*": jlora.Axes("batch in out", method)}))
    shared = np.asarray(adapted.params["~shared"]["MPO"]["central"], np.float64)
    assert shared.shape == (2, 4, 3, 3, 4)
    merged = jlora.merge(adapted)
    for kind, name in enumerate(("down", "up")):
        rows, columns = params[name].shape[1:]
        for layer in range(3):
            first, last = (np.asarray(adapted.params[name][t][layer], np.float64) for t in ("t0", "t2"))
            wanted = np.zeros((rows, columns))
            for i in range(rows):
                for o in range(columns):
                    a, c, z = zip(digits(i, (2, -(-rows // 4), 2)), digits(o, (2, -(-columns // 4), 2)))
                    chosen = first[:, *a], shared[kind, :, *c], last[:, *z]
                    wanted[i, o] = (chosen[0] @ chosen[1] @ chosen[2]).item()
            close(merged[name][layer] - params[name][layer], wanted, atol=1e-4)


def test_a_central_core_has_the_gradient_of_its_own_kind():
    params = {"up": weight(0, 7, 9), "down": weight(1, 9, 7)}
    adapted = perturbed(jlora.adapterize(params, {".*": jlora.MPO(bond=4, mode=2)}))
    direction = weight(2, 7, 9)

    def moved(p):
        return jnp.sum(direction * (jlora.merge(adapted.replace(params=p))["up"] - params["up"]))

    value, gradient = jax.jit(jax.value_and_grad(moved))(adapted.params)
    down, up = (
        np.sum(each) for each in gradient["~shared"]["MPO"]["central"] * adapted.params["~shared"]["MPO"]["central"]
    )
    assert down == 0
    close(up, value, rtol=1e-4)  # it is linear in the core


def test_full_bonds_have_as_many_values_in_the_central_core_as_the_matrix_has():
    for size in (768, 1024):
        shapes = jax.eval_shape(
            lambda p: jlora.adapterize(p, {"w": jlora.MPO(bond=10**6, depth=2)}),
            {"w": jax.ShapeDtypeStruct((size,) * 2, "float32")},
        )
        assert shapes.params["~shared"]["MPO"]["central"].size == size**2
        assert sum(core.size for core in shapes.params["w"].values()) == 2 * (16 * 16 + 16 * 16 * 256)


def test_with_auxiliary_cores_alone_the_central_one_is_a_constant():
    adapted = jlora.adapterize({"w": weight(0, 16, 16)}, {"w": jlora.MPO(learn="auxiliary")})
    assert set(adapted.params) == {"w"} and adapted.frozen["~shared"]["MPO"]["central"].shape == (1, 8, 1, 1, 8)
    assert np.array_equal(jlora.merge(adapted)["w"], adapted.base["w"])


def test_a_matrix_with_fewer_rows_than_the_auxiliary_cores_number_is_refused():
    with pytest.raises(ValueError, match=r"w.*the 8 x 40 matrix has a side below 16, .* mode 4 and depth 1 number"):
        jlora.adapterize({"w": weight(0, 8, 40)}, {"w": jlora.MPO()})
