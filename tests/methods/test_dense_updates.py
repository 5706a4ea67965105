"""SineLoRA, SpectralTensorTrain, FourierFT, RandLoRA and C3A: the numbers of numpy, or of PEFT 0.21, and what they refuse."""

import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from descent import descend

import jlora
from jlora.core.products.trains import prime_factors, train
from jlora.methods.c3a import circulant
from jlora.methods.fourierft import positions
from jlora.methods.sinelora import sine

pytestmark = pytest.mark.once

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "dense_updates.npz"))
LAYERS = ("wide", "square", "tall")
PEFT = {
    "fourierft": (jlora.FourierFT(13, scale=40.0), {"spectrum": "fourierft_spectrum"}),
    "fourierft_all": (jlora.FourierFT(24, scale=9.0, seed=3), {"spectrum": "fourierft_spectrum"}),
    "randlora": (jlora.RandLoRA(3, alpha=6.0), {"lambda": "randlora_lambda", "gamma": "randlora_gamma"}),
    "c3a": (jlora.C3A(2), {"kernel": "c3a_kernel"}),
}
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def adapted_to(w, method, **fields):
    """A leaf with the given trained arrays."""
    adapted = jlora.adapterize({"w": jnp.asarray(w, jnp.float32)}, {"w": method})
    given = {name: jnp.asarray(fields.get(name, value), jnp.float32) for name, value in adapted.params["w"].items()}
    return adapted.replace(params={"w": given})


def merged(w, method, **fields):
    return jax.jit(jlora.merge)(adapted_to(w, method, **fields))["w"]


def gradient(w, method, direction, **fields):
    """Of the sum of `direction * weight`."""
    adapted = adapted_to(w, method, **fields)

    def loss(p, direction):
        return jnp.sum(direction * jlora.merge(adapted.replace(params=p))["w"])

    return jax.jit(jax.grad(loss))(adapted.params, direction)["w"]


# What PEFT computes.


def forward(name, params, x):
    for layer in LAYERS:
        x = x @ params[layer]["kernel"] + GOLDEN[f"{name}/bias/{layer}"]
        x = x if layer == "tall" else jnp.tanh(x)
    return x


def trained(name, moment):
    fields = PEFT[name][1].items()
    return {
        layer: {"kernel": {f: jnp.asarray(GOLDEN[f"{name}/{moment}/{layer}/{key}"]) for f, key in fields}}
        for layer in LAYERS
    }


def with_values_of_peft(name):
    adapted = jlora.adapterize(
        {layer: {"kernel": jnp.asarray(GOLDEN[f"{name}/w/{layer}"])} for layer in LAYERS}, {".*": PEFT[name][0]}
    )
    frozen = adapted.frozen
    if name == "randlora":
        pair = {side: jnp.asarray(GOLDEN[f"randlora/{side.upper()}"]) for side in "ab"}
        assert jax.tree.map(jnp.shape, frozen) == {"~shared": {"RandLoRA": jax.tree.map(jnp.shape, pair)}}
        frozen = {"~shared": {"RandLoRA": pair}}
    return adapted.replace(params=trained(name, "before"), frozen=frozen)


@pytest.mark.parametrize("name", PEFT)
def test_outputs_gradients_ten_steps_and_merged_weights_are_those_of_peft(name):
    adapted = with_values_of_peft(name)

    def outputs(p):
        return jlora.lift(partial(forward, name), strict=True)(adapted.replace(params=p), GOLDEN[f"{name}/x"])

    tx = jlora.optimizer(adapted, optax.adam, learning_rate=0.02)
    y, losses, gradients, after = descend(outputs, adapted.params, tx, steps=10)
    close(y[0], GOLDEN[f"{name}/y"])
    jax.tree.map(lambda mine, theirs: close(mine[0], theirs, atol=1e-4), gradients, trained(name, "gradient"))
    close(losses, GOLDEN[f"{name}/losses"], rtol=5e-5, atol=5e-5)
    jax.tree.map(partial(close, atol=1e-4), after, trained(name, "after"))
    for layer, leaf in jlora.merge(adapted.replace(params=after)).items():
        close(leaf["kernel"], GOLDEN[f"{name}/merged/{layer}"], atol=1e-4)


def test_randlora_starts_as_in_peft():
    adapted = jlora.adapterize(
        {layer: {"kernel": jnp.asarray(GOLDEN[f"randlora/w/{layer}"])} for layer in LAYERS}, {".*": jlora.RandLoRA(3)}
    )
    jax.tree.map(np.testing.assert_array_equal, adapted.params, trained("randlora", "start"))
    for bases, share in (("dense", 1.0), ("sparse", 1 / 3), ("very_sparse", 1 / 8)):
        params = {"u": jnp.zeros((64, 200)), "v": jnp.zeros((90, 40))}
        pair = jlora.adapterize(params, {".*": jlora.RandLoRA(40, bases=bases)}).frozen["~shared"]["RandLoRA"]
        # The largest input is 90 and the largest output 200, of which 90 needs three bases of rank 40.
        assert (pair["a"].shape, pair["b"].shape) == ((40, 1, 90), (200, 3, 40))
        smaller = 1 / math.sqrt(90) if bases == "very_sparse" else share
        for side in pair.values():
            np.testing.assert_allclose([jnp.std(side), jnp.mean(side != 0)], [1, smaller], rtol=0.1)
            if bases == "dense":
                np.testing.assert_allclose(jnp.max(jnp.abs(side)), math.sqrt(3), rtol=0.02)


def test_the_positions_of_fourierft_are_the_first_of_the_permutation_of_torch():
    drawn = np.array(
        [11, 7, 3, 8, 0, 2, 9, 6, 4, 10, 5, 1]
    )  # torch.randperm(12, generator=torch.Generator().manual_seed(777))
    as_torch_has_it = drawn // 4, drawn % 4  # rows are outputs
    wanted = as_torch_has_it[1] * 3 + as_torch_has_it[0]
    for number in (1, 7, 11, 12):
        np.testing.assert_array_equal(positions(4, 3, number, 777), wanted[:number])
    assert len(set(positions(500, 400, 1000, 0))) == 1000


# Closed forms.


@pytest.mark.parametrize(("frequency", "gain"), [(5.0, "sqrt_in"), (2.0, "sqrt_out"), (None, "sqrt_out")])
def test_sinelora_is_the_sine_of_numpy_in_values_gradients_and_steps(frequency, gain):
    w, a, b, direction = normal(0, 9, 4), normal(1, 9, 2), normal(2, 2, 4), normal(3, 9, 4)
    g = {"sqrt_in": 3.0, "sqrt_out": 2.0}[gain]
    omega, scale = frequency or 3 * g, 5.0 / 2 / g
    method = jlora.SineLoRA(2, alpha=5.0, frequency=frequency, gain=gain)
    mine = {"a": a, "b": b}
    for _ in range(10):
        close(merged(w, method, **mine), w + scale * np.sin(omega * (a @ b)), atol=2e-5)
        inner = direction * np.cos(omega * (a @ b)) * scale * omega
        found = gradient(w, method, direction, **mine)
        close(found["a"], inner @ b.T, rtol=1e-4, atol=1e-4)
        close(found["b"], a.T @ inner, rtol=1e-4, atol=1e-4)
        a, b = a - 0.001 * inner @ b.T, b - 0.001 * a.T @ inner
        mine = {name: mine_ - 0.001 * found[name] for name, mine_ in mine.items()} if frequency else {"a": a, "b": b}


def test_the_sine_is_that_of_64_bits_up_to_large_angles_and_bounded_beyond_them():
    angle = np.concatenate([np.linspace(-9, 9, 4001), np.linspace(-1e4, 1e4, 4001), [0, 1e-30]]).astype(np.float32)
    value, slope = jax.jit(jax.vmap(jax.value_and_grad(sine)))(angle)
    close(value, np.sin(angle.astype(np.float64)), rtol=0, atol=2.5e-7)
    close(slope, np.cos(angle.astype(np.float64)), rtol=0, atol=2.5e-7)
    assert value[-2] == 0 and value[-1] == angle[-1]
    assert np.max(np.abs(sine(jnp.float32([1e6, 1e20, -3e38])))) <= 1 and np.isnan(sine(jnp.float32(np.inf)))


def test_sinelora_has_a_high_rank_bounded_entries_and_lora_as_its_limit():
    a, b = normal(1, 32, 2), normal(2, 2, 32)
    update = merged(np.zeros((32, 32)), jlora.SineLoRA(2, alpha=2.0), a=a, b=b)
    assert np.linalg.matrix_rank(update, tol=1e-3) == 32 and np.max(np.abs(update)) <= 1 / math.sqrt(32) + 1e-6
    slow = jlora.SineLoRA(2, alpha=3.0, frequency=1e-3, gain="sqrt_in")
    close(merged(np.zeros((32, 32)), slow, a=a, b=b) * math.sqrt(32) / 1e-3, 1.5 * a @ b, atol=1e-4)


def test_fourierft_is_the_real_part_of_the_inverse_transform_of_numpy():
    for shape in ((4, 6), (5, 7), (6, 1)):
        number = min(shape[0] * shape[1], 11)
        spectrum, dense = normal(0, number), np.zeros(shape)
        dense.reshape(-1)[positions(*shape, number, 777)] = spectrum
        method = jlora.FourierFT(number, scale=3.0)
        close(merged(np.ones(shape), method, spectrum=spectrum), 1 + 3 * np.fft.ifft2(dense).real)
        direction = normal(1, *shape)
        back = 3 * np.fft.fft2(direction).real.reshape(-1)[positions(*shape, number, 777)] / dense.size
        close(gradient(np.ones(shape), method, direction, spectrum=spectrum)["spectrum"], back)


def test_a_block_of_c3a_is_a_circular_convolution():
    first, x = normal(0, 5), normal(1, 5)
    convolved = np.fft.ifft(np.fft.fft(first) * np.fft.fft(x)).real
    close(circulant(jnp.asarray(first, jnp.float32)) @ x, convolved)
    kernel = normal(2, 2, 3, 4)  # out 8, in 12
    update = np.zeros((12, 8))
    for (m, n, k), value in np.ndenumerate(kernel):
        for column in range(4):
            update[4 * n + (column + k) % 4, 4 * m + column] = value / 12
    close(merged(np.ones((12, 8)), jlora.C3A(4), kernel=kernel), 1 + update)


def test_the_inits_of_c3a_and_fourierft_are_those_of_peft():
    params = {"w": jnp.zeros((96, 32))}
    for init, most, deviation in (
        ("xavier_uniform", math.sqrt(6 / 128), math.sqrt(2 / 128)),
        ("kaiming_uniform", 1 / math.sqrt(96), 1 / math.sqrt(3 * 96)),
        ("gaussian", None, 1.0),
    ):
        kernel = jlora.adapterize(params, {"w": jlora.C3A(2, init=init)}).params["w"]["kernel"]
        np.testing.assert_allclose(jnp.std(kernel), deviation, rtol=0.05)
        if most:
            np.testing.assert_allclose(jnp.max(jnp.abs(kernel)), most, rtol=0.01)
    drawn = jlora.adapterize(params, {"w": jlora.FourierFT(3000, init="normal")}).params["w"]["spectrum"]
    np.testing.assert_allclose([jnp.mean(drawn), jnp.std(drawn)], [0, 1], atol=0.05)


# The spectral tensor train, by reflections one after the other.


def reflections(values, rows, columns, full):
    """In numpy: the first columns of the product of reflections, and what is left of the values."""
    y, below = np.eye(rows, columns), (rows - columns) * columns
    y[columns:] = values[:below].reshape(rows - columns, columns)
    used = below
    if full:
        for row in range(columns):
            for column in range(row):
                y[row, column], used = values[used], used + 1
    product = np.eye(rows)
    for v in y.T:
        product = product @ (np.eye(rows) - 2 * np.outer(v, v) / (v @ v))
    return product[:, :columns], values[used:]


def side_in_numpy(values, modes, rank, last):
    """`[size, rank]` of a train, its first core of all modes that fit into the rank and one more."""
    first = 1
    while first * modes[0] <= rank and len(modes) > 1:
        first, modes = first * modes[0], modes[1:]
    made, rows = None, first * modes[0]
    for number, mode in enumerate([None, *modes[1:]]):
        core, values = reflections(values, rows if mode is None else rank * mode, rank, number == len(modes) - 1)
        if mode is None:
            made = core
        else:
            parts = [made @ core.reshape(rank, mode, rank)[:, index] for index in range(mode)]
            made = np.stack(parts, axis=1 if last else 0).reshape(-1, rank)
    assert values.size == 0
    return made


@pytest.mark.parametrize(("cores", "shape"), [("svd", (7, 5)), ("tt", (24, 18))])
def test_the_spectral_tensor_train_is_that_of_numpy(cores, shape):
    method, rank = jlora.SpectralTensorTrain(3, scale=2.0, cores=cores), 3
    sizes = [sum(core.size for core in method.side(size)) for size in shape]
    left, right, sigma, direction = normal(0, sizes[0]), normal(1, sizes[1]), normal(2, rank), normal(3, *shape)

    def by_numpy(left, right, sigma):
        modes = [prime_factors(size) if cores == "tt" else [size] for size in shape]
        u, v = side_in_numpy(left, modes[0], rank, True), side_in_numpy(right, modes[1], rank, False)
        return 2 * u @ np.diag(sigma) @ v.T

    update = by_numpy(left, right, sigma)
    close(merged(np.ones(shape), method, left=left, right=right, sigma=sigma), 1 + update)
    values = np.linalg.svd(update, compute_uv=False)
    close(values[:rank], np.sort(2 * np.abs(sigma))[::-1])
    assert np.max(values[rank:]) < 1e-10, "the rank is bounded, and the sides are orthonormal"
    found = gradient(np.ones(shape), method, direction, left=left, right=right, sigma=sigma)
    fields = {"left": left, "right": right, "sigma": sigma}
    for name, value in fields.items():
        along, tiny = normal(4, value.size), 1e-5
        ahead, behind = (by_numpy(**{**fields, name: value + sign * tiny * along}) for sign in (1, -1))
        slope = np.sum(direction * (ahead - behind)) / (2 * tiny)
        close(np.sum(np.asarray(found[name]) * along), slope, rtol=1e-4, atol=1e-4)


def test_the_spectral_tensor_train_has_as_many_values_as_degrees_of_freedom():
    wanted = {("svd", 8): 12_224, ("svd", 64): 94_208, ("svd", 768): 768**2, ("tt", 768): 768**2, ("tt", 8): 960}
    for (cores, rank), number in wanted.items():
        assert jlora.SpectralTensorTrain(rank, cores=cores).number(768, 768) == number
    assert jlora.SpectralTensorTrain(4, cores="tt").number(13, 7) == jlora.SpectralTensorTrain(4).number(13, 7), (
        "primes"
    )


def test_the_sides_of_a_spectral_tensor_train_start_uniformly_random():
    method = jlora.SpectralTensorTrain(4)
    adapted = jlora.adapterize({"w": jnp.zeros((500, 12, 9))}, {"w": jlora.Axes("batch in out", method)})
    u = jax.jit(jax.vmap(partial(train, cores=method.side(12))))(adapted.params["w"]["left"])
    np.testing.assert_allclose(jnp.mean(u**2, axis=0), np.full((12, 4), 1 / 12), atol=0.03)


# What they refuse.

REFUSED = [
    (jlora.SineLoRA(4), (3, 8), "rank 4 is above the smaller side of the 3 x 8 matrix"),
    (jlora.SpectralTensorTrain(4), (8, 3), "rank 4 is above the smaller side of the 8 x 3 matrix"),
    (jlora.SpectralTensorTrain(1), (8, 1), "a side of 1 has no orthonormal columns to turn"),
    (jlora.FourierFT(7), (2, 3), "7 frequencies are more than the 6 entries of the 2 x 3 matrix"),
    (jlora.C3A(4), (12, 6), "block 4 must divide both sides of the 12 x 6 matrix; use 6 or a divisor of it"),
]
BAD = [
    (partial(jlora.SineLoRA, frequency=0.0), "SineLoRA's frequency must be positive"),
    (partial(jlora.SineLoRA, gain="sqrt"), "SineLoRA's gain must be one of"),
    (partial(jlora.SpectralTensorTrain, cores="tensor"), "SpectralTensorTrain's cores must be one of"),
    (partial(jlora.FourierFT, seed=2**32), "FourierFT's seed must be a whole number of at least 0 and below"),
    (partial(jlora.RandLoRA, bases="thin"), "RandLoRA's bases must be one of"),
    (partial(jlora.RandLoRA, rank=0), "RandLoRA's rank must be"),
    (partial(jlora.C3A, block=0), "C3A's block must be a positive whole number"),
]


@pytest.mark.parametrize(("method", "shape", "message"), REFUSED, ids=lambda each: str(each)[:30])
def test_a_matrix_that_can_t_be_adapted_is_refused_by_name(method, shape, message):
    with pytest.raises(ValueError, match=f"^w, shape .*{message}"):
        jlora.adapterize({"w": jnp.ones(shape)}, {"w": method})
    with pytest.raises(ValueError, match="entries are 214748364 or more"):
        jax.eval_shape(
            lambda w: jlora.adapterize({"w": w}, {"w": jlora.FourierFT()}),
            jax.ShapeDtypeStruct((2**14, 2**14), "bfloat16"),
        )


@pytest.mark.parametrize(("make", "message"), BAD, ids=lambda each: str(each)[:30])
def test_a_hyperparameter_out_of_range_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
