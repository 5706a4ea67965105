"""Codes of smaller arrays against numpy: what is nearest, what is exact, how far off the rest may be, and what they refuse."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from coded import decode, encode, equal, named, normal

from jlora.core.products.trains import Core, side, train
from jlora.core.protocol.code import Code
from jlora.stored import compressed
from jlora.stored.compressed import JointLowRank, LowRank, SpectralTrain, TensorTrain, TransposedPair
from jlora.stored.compressed.spectral_train import turned

pytestmark = pytest.mark.once

ROWS, COLUMNS = 20, 12
CLASSES = [value for value in vars(compressed).values() if isinstance(value, type) and issubclass(value, Code)]
CASES = [case for cls in CLASSES for case in cls.CASES]
close = lambda got, wanted, size=1e-5: np.testing.assert_allclose(got, wanted, rtol=size, atol=size)
together = jax.jit(lambda matrices, code: code.encode_together(matrices), static_argnames="code")


def again(code, w):
    return np.asarray(decode(encode(w, code), code, *w.shape))


def off(code, w):
    return np.linalg.norm(again(code, w) - w)


def nearest(w, rank):
    """The matrix of a rank that is nearest to another, and how far it is."""
    u, s, v = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank], np.sqrt(np.sum(s[rank:] ** 2))


def tail(unfolded, rank):
    return np.linalg.norm(np.linalg.svd(unfolded.astype(np.float64), compute_uv=False)[rank:])


@pytest.mark.parametrize("cls", CLASSES)
def test_every_code_has_cases(cls):
    assert cls.CASES and all(type(case) is cls for case in cls.CASES)


@named(CASES)
def test_fields_have_the_axes_that_the_code_states(code):
    shapes = [(ROWS, COLUMNS), (COLUMNS, ROWS)] if code == TransposedPair() else [(ROWS, COLUMNS)] * 2
    code.check_group(shapes)
    for fields, shape in zip(jax.eval_shape(code.encode_together, [jnp.zeros(s) for s in shapes]), shapes):
        code.check(*shape)
        assert {name: len(axes) for name, axes in code.axes.items()} == {name: f.ndim for name, f in fields.items()}
        assert code.trained | {"turned"} >= fields.keys() > code.common
        decoded = jax.eval_shape(lambda fields, shape=shape: code.decode(fields, *shape), fields)
        assert decoded.shape == shape and decoded.dtype == jnp.float32
        assert all(jnp.issubdtype(fields[name].dtype, jnp.floating) for name in code.trained)


@named([LowRank(5), LowRank(5, inner=3), SpectralTrain(5, "svd")])
def test_a_product_of_a_rank_is_the_nearest_of_that_rank(code):
    w = normal(ROWS, COLUMNS)
    close(again(code, w), nearest(w, 5)[0])
    assert off(code, w) == pytest.approx(nearest(w, 5)[1], rel=1e-5)


def test_a_deep_network_has_singular_vectors_outside_and_roots_of_singular_values_inside():
    w = normal(ROWS, COLUMNS)
    fields = encode(w, LowRank(5, inner=3))
    s = np.linalg.svd(w, compute_uv=False)[:5]
    for inner in fields["inner"]:
        close(inner, np.diag(s ** (1 / 3)))
    close(fields["left"].T @ fields["left"], np.eye(5))
    close(fields["right"] @ fields["right"].T, np.eye(5))
    assert sum(x.size for x in fields.values()) == 5 * (ROWS + COLUMNS) + 3 * 25


def test_factors_of_16_bits_err_by_their_rounding_alone():
    w = normal(ROWS, COLUMNS)
    fields = encode(w, LowRank(12, dtype="bfloat16"))
    assert {x.dtype for x in fields.values()} == {jnp.dtype(jnp.bfloat16)}
    assert 1e-4 < off(LowRank(12, dtype="bfloat16"), w) / np.linalg.norm(w) < 2**-8


def test_a_part_of_the_factors_is_a_part_of_the_matrix():
    fields = encode(normal(ROWS, COLUMNS), LowRank(5))
    part = decode({"left": fields["left"][:10], "right": fields["right"][:, 6:]}, LowRank(5), 10, 6)
    close(part, decode(fields, LowRank(5), ROWS, COLUMNS)[:10, 6:])
    assert LowRank().local == JointLowRank().local == {"in", "out"}


@named([JointLowRank(5), JointLowRank(5, "layers")])
def test_matrices_of_one_left_factor_are_the_nearest_side_by_side(code):
    matrices = [normal(ROWS, columns, seed=columns) for columns in (COLUMNS, 7)]
    found = together(matrices, code)
    equal(found[0]["left"], found[1]["left"])
    got = np.concatenate([decode(f, code, *w.shape) for f, w in zip(found, matrices)], 1)
    close(got, nearest(np.concatenate(matrices, 1), 5)[0])
    with pytest.raises(ValueError, match=r"one number of inputs, got \[12, 20\]"):
        code.check_group([(ROWS, COLUMNS), (COLUMNS, ROWS)])
    with pytest.raises(ValueError, match="rank 5 is above the smaller side of the 20 x 4 matrix; use 4 or less"):
        code.check_group([(ROWS, 1), (ROWS, 3)])


@pytest.mark.parametrize("shape", [(ROWS, COLUMNS), (COLUMNS, COLUMNS)])
def test_a_transposed_pair_is_the_mean(shape):
    first, second = normal(*shape), normal(*shape[::-1], seed=1)
    found = together([first, second], TransposedPair())
    mean = (first + second.T) / 2
    close(decode(found[0], TransposedPair(), *shape), mean)
    close(decode(found[1], TransposedPair(), *shape[::-1]), mean.T)
    for sizes in ([(3, 4), (3, 4)], [(3, 4)], [(3, 4), (4, 3), (3, 4)]):
        with pytest.raises(
            ValueError, match=r"a pair is two matrices \[d, h\] and \[h, d\] in one layer, got \[3, 4\]"
        ):
            TransposedPair().check_group(sizes)


def chain(fields, code):
    """The array `[row digits, column digits]` of cores, and the matrix, by numpy."""
    made = np.ones((1, 1, 1))
    for name in code.names:
        core = np.asarray(fields[name], np.float64)
        made = np.einsum("rca,aijb->ricjb", made, core)
        made = made.reshape(made.shape[0] * made.shape[1], -1, core.shape[-1])
    return made[..., 0]


@named([TensorTrain(16, 2, 2), TensorTrain(4, 2, 1), TensorTrain(9, 3, 1), TensorTrain(3, 2, 1), TensorTrain(5, 2, 2)])
def test_a_tensor_train_is_the_product_of_the_matrices_that_digits_choose(code):
    w = normal(ROWS, 17)
    fields = encode(w, code)
    got = decode(fields, code, ROWS, 17)
    close(got, chain(fields, code)[:ROWS, :17])
    if code.bond >= code.mode ** (2 * code.depth):
        close(got, w)
    outer = code.mode**code.depth
    sizes = [-(-size // outer**2) for size in w.shape]
    assert max(x.size for x in fields.values()) == fields["central"].size
    assert fields["central"].shape == (min(code.bond, outer**2), *sizes, min(code.bond, outer**2))
    assert len(set(code.names)) == 2 * code.depth + 1


@named([TensorTrain(3, 2, 1), TensorTrain(5, 2, 2)])
def test_a_tensor_train_errs_by_no_more_than_the_singular_values_that_its_bonds_leave_out(code):
    w = normal(16, 32)
    n, digits = 2 * code.depth + 1, [2] * code.depth
    shapes = [[*digits, size // 4**code.depth, *digits] for size in w.shape]
    x = w.reshape(*shapes[0], *shapes[1]).transpose([a for k in range(n) for a in (k, n + k)])
    tails = []
    for k in range(1, n):
        rows = int(np.prod(x.shape[: 2 * k]))
        tails.append(tail(x.reshape(rows, -1), min(code.bond, 4 ** min(k, n - k))))
    assert max(tails) <= off(code, w) * (1 + 1e-5) and off(code, w) <= np.linalg.norm(tails) * (1 + 1e-5)
    assert off(code, w) < np.linalg.norm(w) / 1.2


def test_the_outer_cores_of_a_tensor_train_are_orthonormal():
    fields = encode(normal(16, 32), TensorTrain(5, 2, 2))
    for name in ("t0", "t1"):
        core = np.asarray(fields[name]).reshape(-1, fields[name].shape[-1])
        close(core.T @ core, np.eye(core.shape[1]))
    for name in ("t2", "t3"):
        core = np.asarray(fields[name]).reshape(len(fields[name]), -1)
        close(core @ core.T, np.eye(len(core)))


def test_layers_that_are_alike_lose_nothing_by_one_central_core():
    w = normal(16, 32)
    code = TensorTrain(4, 2, 1, share=True, sweeps=2)
    found = together([w, w, w], code)
    assert found[0]["central"].shape == found[2]["central"].shape == (4, 4, 8, 4)
    for fields in found:
        close(decode(fields, code, 16, 32), w)


def by_numpy(middles, sweeps):
    """The sum of squared errors of one core for all layers, of which either bond may be turned."""

    def nearest(x, wanted):
        u, _, v = np.linalg.svd(x.reshape(len(x), -1) @ wanted.reshape(len(wanted), -1).T)
        return u @ v

    mean, after = middles[0], [np.eye(middles.shape[-1])] * len(middles)
    for _ in range(sweeps):
        half = [np.tensordot(nearest(x @ h, mean).T, x, 1) for x, h in zip(middles, after)]
        after = [nearest(np.moveaxis(x, -1, 0), np.moveaxis(mean, -1, 0)) for x in half]
        turned = np.stack([x @ h for x, h in zip(half, after)])
        mean = turned.mean(0)
    return np.sum((turned - mean) ** 2)


def test_sweeps_bring_layers_nearer_to_one_central_core():
    w = normal(16, 32)
    layers = [w + 0.3 * normal(16, 32, seed=seed) for seed in (1, 2, 3)]
    errors = []
    for sweeps in (1, 2, 8):
        code = TensorTrain(3, 2, 1, share=True, sweeps=sweeps)
        found = together(layers, code)
        equal(found[0]["central"], found[2]["central"])
        errors.append(sum(np.sum((decode(f, code, 16, 32) - layer) ** 2) for f, layer in zip(found, layers)))
    assert all(after < before for before, after in pairwise(errors))
    middles = np.stack([encode(layer, TensorTrain(3, 2, 1))["central"] for layer in layers]).astype(np.float64)
    lost = sum(np.sum(layer**2) for layer in layers) - np.sum(middles**2)
    assert errors[-1] == pytest.approx(lost + by_numpy(middles, 8), rel=1e-4)
    with pytest.raises(
        ValueError, match=r"layers with one central core must have one size, got \[\(16, 32\), \(32, 16\)\]"
    ):
        TensorTrain(share=True).check_group([(32, 16), (16, 32)])


@named([SpectralTrain(12), SpectralTrain(12, "svd")])
def test_a_spectral_train_of_full_rank_is_exact_with_as_many_numbers_as_the_matrix(code):
    w = normal(ROWS, COLUMNS)
    close(again(code, w), w)
    # ROWS - COLUMNS columns of the larger side are free in neither.
    assert sum(x.size for x in encode(w, code).values()) == ROWS * COLUMNS


def test_a_spectral_train_errs_by_no_more_than_the_singular_values_that_its_cores_leave_out():
    code, shape = SpectralTrain(4), (24, 18)
    w = normal(*shape)
    tails = [tail(w, 4)]
    for x in (w, w.T):
        cores = side(len(x), 4, split=True)
        taken = np.cumprod([core.rows // before for core, before in zip(cores, [1, *(c.columns for c in cores)])])
        tails += [tail(x.reshape(rows, -1), 4) for rows in taken[:-1]]
    assert len(tails) == 3
    assert max(tails) <= off(code, w) * (1 + 1e-5) and off(code, w) <= np.linalg.norm(tails) * (1 + 1e-5)
    fields = encode(w, code)
    for name, size in zip(("left", "right"), shape):
        made = jax.jit(lambda x, size=size: train(x, side(size, 4, split=True)))(fields[name])
        close(made.T @ made, np.eye(4))
    close(np.sort(np.abs(fields["sigma"])), np.sort(np.linalg.svd(again(code, w), compute_uv=False)[:4]))


@pytest.mark.parametrize("full", [False, True])
def test_reflections_make_the_columns_up_to_signs_or_their_space(full):
    q, _ = np.linalg.qr(normal(9, 4))
    values, made = jax.jit(lambda q: turned(q, Core(9, 4, full)))(q)
    assert values.shape == (Core(9, 4, full).size,)
    close(made @ made.T, q @ q.T)
    if full:
        close(np.abs(made.T @ q), np.eye(4))


def test_hyperparameters_and_sizes_are_checked():
    for make, words in (
        (lambda: LowRank(0), "LowRank's rank must be an integer of at least 1, got 0"),
        (lambda: LowRank(2, -1), "LowRank's inner must be an integer of at least 0, got -1"),
        (lambda: LowRank(2, dtype="int8"), "LowRank's dtype must be one of .*, got 'int8'"),
        (lambda: JointLowRank(2, "heads"), "JointLowRank's over must be one of .'leaves', 'layers'.*, got 'heads'"),
        (lambda: TensorTrain(mode=1), "TensorTrain's mode must be an integer of at least 2, got 1"),
        (lambda: TensorTrain(share=1), "TensorTrain's share must be True or False, got 1"),
        (lambda: SpectralTrain(2, "qr"), "SpectralTrain's cores must be one of .'svd', 'tt'.*, got 'qr'"),
        (lambda: LowRank(5).check(4, 9), "rank 5 is above the smaller side of the 4 x 9 matrix; use 4 or less"),
        (lambda: SpectralTrain(1).check(1, 9), "the 1 x 9 matrix has a side of 1, with nothing to turn; leave it out"),
        (
            lambda: TensorTrain().check(255, 999),
            "the 255 x 999 matrix has a side below 256, .* mode 4 and depth 2 number",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            make()
