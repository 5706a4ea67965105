"""DoRA: what follows from its formula, and that it goes around any method with a weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

pytestmark = pytest.mark.once


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) / 3, jnp.float32)


W, X = normal(0, 12, 8), normal(1, 5, 12)
FIELDS = {"a": normal(2, 12, 4), "b": normal(3, 4, 8), "m": 1 + normal(4, 8)}
DORA = jlora.DoRA(jlora.LoRA(rank=4, alpha=6))
DIRECTION = W + 1.5 * FIELDS["a"] @ FIELDS["b"]
NORMS = jnp.linalg.norm(DIRECTION, axis=0)


def adapted_with(fields=None, w=W):
    adapted = jlora.adapterize({"w": w}, {"w": DORA})
    return adapted if fields is None else adapted.replace(params={"w": fields})


def output(fields, w=W):
    return jlora.lift(lambda params: X @ params["w"])(adapted_with(fields, w))


def loss(y):
    return jnp.sum(jnp.sin(y))


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_the_start_is_the_base():
    np.testing.assert_allclose(output(None), X @ W, atol=1e-6)


def test_a_merged_columns_length_is_the_magnitude():
    merged = jlora.merge(adapted_with(FIELDS))["w"]
    close(jnp.linalg.norm(merged, axis=0), jnp.abs(FIELDS["m"]))


def test_the_factors_gradients_hold_the_norm_constant():
    def written(ab, norms):
        v = W + 1.5 * ab["a"] @ ab["b"]
        return loss(X @ (v * FIELDS["m"] / (jnp.linalg.norm(v, axis=0) if norms is None else norms)))

    ab = {"a": FIELDS["a"], "b": FIELDS["b"]}
    got = jax.grad(lambda fields: loss(output(fields)))(FIELDS)
    constant, full = jax.grad(written)(ab, NORMS), jax.grad(lambda ab: written(ab, None))(ab)
    for field in ab:
        close(got[field], constant[field])
        assert jnp.max(jnp.abs(got[field] - full[field])) > 1e-2


def test_the_magnitudes_gradient_is_the_output_gradient_along_the_direction():
    y = output(FIELDS)
    wanted = jnp.sum(jnp.cos(y) * (X @ DIRECTION), axis=0) / NORMS
    close(jax.grad(lambda fields: loss(output(fields)))(FIELDS)["m"], wanted)


def test_scaling_a_column_with_its_magnitude_and_update_scales_the_output():
    c = 2.5
    scaled = {"a": FIELDS["a"], "b": FIELDS["b"].at[:, 3].multiply(c), "m": FIELDS["m"].at[3].multiply(c)}
    close(output(scaled, W.at[:, 3].multiply(c)), output(FIELDS).at[:, 3].multiply(c))


def test_a_column_of_zeros_is_no_division_by_zero():
    w = W.at[:, 2].set(0)
    fields = adapted_with(w=w).params["w"]
    value, gradient = jax.value_and_grad(lambda fields: loss(output(fields, w)))(fields)
    close(value, loss(X @ w))
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(gradient))


def test_it_goes_around_a_method_without_factors():
    from dataclasses import dataclass

    from jlora.core.protocol.method import Start

    @dataclass(frozen=True)
    class Shift(jlora.Method):
        """Any weight will do: `w + c`."""

        @property
        def axes(self):
            return {"c": ("in", "out")}

        def start(self, key, w, site):
            return Start({"c": jnp.zeros_like(w)})

        def weight(self, view):
            return view.w + view.params["c"]

    adapted = jlora.adapterize({"w": W}, {"w": jlora.DoRA(Shift())})
    fields = {"c": normal(5, 12, 8), "m": FIELDS["m"]}
    v = W + fields["c"]
    got = jlora.lift(lambda params: X @ params["w"])(adapted.replace(params={"w": fields}))
    close(got, X @ (v * fields["m"] / jnp.linalg.norm(v, axis=0)))


@pytest.mark.parametrize("inner", [jlora.Full(), jlora.DoRA(), 8])
def test_what_has_no_matrix_of_its_own_is_refused(inner):
    with pytest.raises(TypeError, match=r"DoRA goes around a method that adapts a matrix, such as LoRA\(8\); got"):
        jlora.DoRA(inner)
