"""SAID and its Fastfood map: numpy's matrices, norms, adjoints, steps, and a map that a seed fixes forever."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.methods.said.fastfood import constants, fastfood, fwht, padded

close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
# The signs, the order and the normal numbers of seed 7.
PINNED = (
    [1.0, 1.0, 1.0, -1.0, -1.0, 1.0, -1.0, -1.0],
    [7, 2, 0, 5, 4, 1, 6, 3],
    [-0.34912, -1.55031, 0.845124, -0.073818, 0.115601, -0.383374, 0.0919, 0.754172],
)
made = jax.jit(constants, static_argnums=(1, 2))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def sylvester(n):
    common = np.arange(n)[:, None] & np.arange(n)
    for shift in (8, 4, 2, 1):
        common = common ^ (common >> shift)
    return 1.0 - 2 * (common & 1)


def map_of(seed, dimension, size):
    """`[size, dimension]` by whole matrices, from the signs, the order and the normal numbers of a seed."""
    n = 1 << int(np.ceil(np.log2(size)))
    signs, order, gaussian = (np.asarray(each, float) for each in made(jnp.uint32(seed), n, jnp.dtype("float32")))
    h = sylvester(n)
    whole = h @ np.diag(gaussian) @ np.eye(n)[order.astype(int)] @ h @ np.diag(signs)
    return whole[:size, :dimension] / (np.sqrt(n * np.sum(gaussian**2)) * np.sqrt(size / n))


@pytest.mark.once
@pytest.mark.parametrize("n", [1, 2, 128, 1024, 2048])
def test_the_transform_is_a_product_with_sylvester_s_matrix_and_its_own_inverse(n):
    x, some = normal(0, 3, n), -(-2 * n // 3)
    y, first, again = jax.jit(lambda x: (fwht(x), fwht(x, some), fwht(fwht(x))))(jnp.asarray(x, jnp.float32))
    close(y, x @ sylvester(n), rtol=1e-4, atol=1e-4)
    close(first, y[:, :some], rtol=1e-4, atol=1e-4)
    close(again / n, x)


@pytest.mark.once
@pytest.mark.parametrize(("dimension", "size"), [(5, 24), (16, 16), (40, 60)])
def test_the_map_is_linear_with_the_matrix_and_the_adjoint_of_numpy(dimension, size):
    v, y = (jnp.asarray(normal(n, length), jnp.float32) for n, length in enumerate((dimension, size)))

    def spread(v):
        return fastfood(v, *constants(jnp.uint32(9), padded(size), v.dtype), size)

    found, back = jax.jit(lambda v, y: (spread(v), jax.linear_transpose(spread, v)(y)[0]))(v, y)
    matrix = map_of(9, dimension, size)
    close(found, matrix @ v)
    close(back, matrix.T @ y)


@pytest.mark.once
def test_the_map_keeps_norms_on_average_and_differs_from_seed_to_seed():
    v = jnp.asarray(normal(0, 30), jnp.float32)
    for size in (64, 900):
        spread = jax.jit(jax.vmap(lambda seed: fastfood(v, *constants(seed, padded(size), v.dtype), size)))
        found = np.asarray(spread(jnp.arange(400, dtype=jnp.uint32)))
        ratios = np.linalg.norm(found, axis=1) / np.linalg.norm(v)
        np.testing.assert_allclose(np.mean(ratios**2), 1, atol=0.04)
        np.testing.assert_allclose(np.std(ratios), 0, atol=0.4 if size == 64 else 0.15)
        unit = found / np.linalg.norm(found, axis=1, keepdims=True)
        angles = (unit @ unit.T)[np.triu_indices(400, 1)]
        assert abs(np.mean(angles)) < 0.01 and np.std(angles) < 1.5 / np.sqrt(min(size, 64)), "maps are independent"


def test_what_a_seed_stands_for_is_random_and_the_same_forever():
    signs, order, gaussian = map(np.asarray, made(jnp.uint32(7), 8, jnp.dtype("float32")))
    assert (signs.tolist(), order.tolist()) == PINNED[:2]
    close(gaussian, PINNED[2])
    for bits in (0, 1, 2, 3, 5, 14):
        drawn = made(jnp.uint32(123), 2**bits, jnp.dtype("float32"))
        assert sorted(drawn[1].tolist()) == list(range(2**bits)), "no permutation"
    signs, order, gaussian = map(np.asarray, drawn)
    moments = [signs.mean(), gaussian.mean(), gaussian.std() - 1, (gaussian**3).mean(), (gaussian**4).mean() / 3 - 1]
    moments += [np.mean(signs * gaussian), np.corrcoef(order, np.arange(2**14))[0, 1], np.mean(signs[1:] * signs[:-1])]
    np.testing.assert_allclose(moments, 0, atol=0.1)
    signs, order, gaussian = jax.jit(jax.vmap(lambda seed: constants(seed, 8, jnp.dtype("float32"))))(
        jnp.arange(2000, dtype=jnp.uint32)
    )
    places = [jnp.mean(signs, 0), jnp.mean(gaussian, 0), jnp.std(gaussian, 0) - 1, (jnp.mean(order, 0) - 3.5) / 8]
    np.testing.assert_allclose(jnp.stack(places), 0, atol=0.1, err_msg="a place is alike from seed to seed")


@pytest.mark.once
@pytest.mark.parametrize("aware", [True, False])
def test_ten_steps_of_all_matrices_are_those_of_numpy(aware):
    shapes = {"u": (6, 5), "v": (5, 7)}
    method = jlora.SAID(11, structure_aware=aware)
    base = {name: jnp.asarray(normal(n, *shape), jnp.float32) for n, (name, shape) in enumerate(shapes.items())}
    adapted = jlora.adapterize(base, {".*": method})
    theta = normal(3, 9 if aware else 11)
    assert adapted.params["~shared"]["SAID"]["theta"].shape == theta.shape
    targets = {name: jnp.asarray(normal(9, *shape), jnp.float32) for name, shape in shapes.items()}
    maps = {name: map_of(adapted.frozen[name]["seed"], len(theta), targets[name].size) for name in shapes}
    scale = {name: 0.5 + n for n, name in enumerate(shapes)} if aware else dict.fromkeys(shapes, 1.0)
    own = {name: {"scale": jnp.float32(scale[name])} if aware else {} for name in shapes}
    p = {**own, "~shared": {"SAID": {"theta": jnp.asarray(theta, jnp.float32)}}}

    @jax.jit
    def step(p):
        def loss(p):
            merged = jlora.merge(adapted.replace(params=p))
            return sum(jnp.sum((merged[name] - targets[name]) ** 2) for name in shapes) / 2

        return jax.tree.map(lambda leaf, g: leaf - 0.02 * g, p, jax.grad(loss)(p))

    for _ in range(10):
        p, old, moved = step(p), dict(scale), np.zeros_like(theta)
        for name in shapes:
            spread = maps[name] @ theta
            error = np.asarray(base[name] - targets[name], float).reshape(-1) + old[name] * spread
            moved += old[name] * maps[name].T @ error
            scale[name] -= 0.02 * aware * error @ spread
        theta -= 0.02 * moved
        close(p["~shared"]["SAID"]["theta"], theta, rtol=1e-4, atol=1e-4)
        for name in shapes if aware else ():
            close(p[name]["scale"], scale[name], rtol=1e-4, atol=1e-4)


@pytest.mark.once
def test_every_matrix_of_a_stack_has_its_map_and_takes_its_scale_from_the_budget():
    spec = {"stack": jlora.Axes("batch in out", jlora.SAID(10)), "w": jlora.SAID(10)}
    adapted = jlora.adapterize({"stack": jnp.zeros((3, 4, 6)), "w": jnp.zeros((5, 5))}, spec)
    assert sum(leaf.size for leaf in jax.tree.leaves(adapted.params)) == 10
    theta = jnp.asarray(normal(0, 6), jnp.float32)
    merged = jax.jit(jlora.merge)(adapted.replace(params={**adapted.params, "~shared": {"SAID": {"theta": theta}}}))
    for seed, matrix in zip(adapted.frozen["stack"]["seed"], merged["stack"], strict=True):
        close(matrix.reshape(-1), map_of(seed, 6, 24) @ theta)
    assert len(set(adapted.frozen["stack"]["seed"].tolist())) == 3


@pytest.mark.once
def test_what_can_t_be_is_refused_by_name():
    with pytest.raises(
        ValueError, match="^w, shape .*dimension 40 is above 32, to which the entries of the 5 x 6 matrix"
    ):
        jlora.adapterize({"w": jnp.ones((5, 6))}, {"w": jlora.SAID(40)})
    with pytest.raises(
        ValueError, match="dimension 2 leaves nothing to share beside a scale for each of the 2 matrices"
    ):
        jlora.adapterize({"u": jnp.ones((5, 6)), "v": jnp.ones((5, 6))}, {".*": jlora.SAID(2)})
    with pytest.raises(ValueError, match="SAID's dimension must be a positive whole number"):
        jlora.SAID(0)
