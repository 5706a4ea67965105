"""Codes of bases: formulas, errors, sizes, parts, and what they refuse."""

import dataclasses
from functools import partial
from statistics import NormalDist

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from coded import COLUMNS, ROWS, decode, encode, equal, named, normal

from jlora import stored
from jlora.core.protocol.code import Code
from jlora.stored import FP4, NF2, NF3, NF4, Float8, Int4, Int8, Uniform, packing
from jlora.stored.float8 import _widened

pytestmark = pytest.mark.once

CLASSES = [value for value in vars(stored).values() if isinstance(value, type) and issubclass(value, Code)]
CASES = [case for cls in CLASSES for case in cls.CASES]
LEVELS = [NF4(32), NF3(32), NF2(32), FP4(32), Int4(32)]


def again(w, code):
    return np.asarray(decode(encode(w, code), code, *w.shape))


@pytest.mark.parametrize("cls", CLASSES)
def test_every_code_has_cases(cls):
    assert cls.CASES and all(type(case) is cls for case in cls.CASES)


@named(CASES)
def test_fields_have_the_axes_that_the_code_states(code):
    code.check(ROWS, COLUMNS)
    fields = jax.eval_shape(code.encode, jnp.zeros((ROWS, COLUMNS)))
    assert {name: len(axes) for name, axes in code.axes.items()} == {name: f.ndim for name, f in fields.items()}
    decoded = jax.eval_shape(partial(code.decode, rows=ROWS, columns=COLUMNS), fields)
    assert decoded.shape == (ROWS, COLUMNS) and decoded.dtype == jnp.float32
    assert {name: fields[name].dtype for name in fields if name == "codes"}["codes"].itemsize == 1


def test_a_decoded_matrix_of_fp4_is_itself_again_though_it_has_two_zeros():
    w = again(normal(), FP4(32))
    equal(again(w, FP4(32)), w)


@named(LEVELS)
def test_no_number_is_further_from_its_own_than_half_the_widest_gap(code):
    w = normal(seed=2)
    error = np.abs(again(w, code) - w).reshape(-1, code.block, COLUMNS).max(1)
    inside = np.sort([level for level in code.levels if abs(level) <= 1])
    bound = np.abs(w).reshape(-1, code.block, COLUMNS).max(1) * np.diff(inside).max() / 2
    assert (error <= bound * (1 + 1e-6)).all()
    if code.bits < 4:
        assert (error > bound / 2).any()


@named([Int8(), Float8(), Float8("e5m2")])
def test_no_number_is_further_from_its_own_than_half_a_step(code):
    w = normal(seed=2)
    most = np.abs(w).max(0)
    mantissa = {Int8(): 0, Float8(): 4, Float8("e5m2"): 3}[code]
    step = np.abs(w) / 2**mantissa + most * 2.0**-14 if mantissa else most / 254
    assert (np.abs(again(w, code) - w) <= step * (1 + 1e-6)).all()


ERRORS = [
    (NF4(), 0.092), (NF4(double=True), 0.092), (FP4(), 0.122), (Int4(), 0.107), (NF3(), 0.201), (NF2(), 0.563),
    (Int8(), 0.0083), (Float8(), 0.0265), (Float8("e5m2"), 0.0527), (Uniform(4), 0.131), (Uniform(3), 0.194),
    (Uniform(2), 0.393),
]  # fmt: skip


@pytest.mark.parametrize(("code", "wanted"), ERRORS, ids=str)
def test_the_relative_error_on_normal_weights_is_that_of_the_docstring(code, wanted):
    w = normal(2048, 128)
    assert np.linalg.norm(again(w, code) - w) / np.linalg.norm(w) == pytest.approx(wanted, rel=0.02)


BITS = [
    (NF4(), 4.5), (NF4(32), 5), (NF4(256), 4.125), (NF4(double=True), 4 + 8 / 64 + 32 / (64 * 256) + 32 / (4096 * 256)),
    (FP4(), 4.5), (Int4(), 4.5), (NF3(), 3.5), (NF2(), 2.5), (Int8(), 8 + 32 / 4096), (Float8(), 8 + 32 / 4096),
    (Uniform(4), 4 + 32 * 16 / (4096 * 256)), (Uniform(3), 3 + 32 * 8 / (4096 * 256)), (Uniform(2), 2 + 32 * 4 / (4096 * 256)),
]  # fmt: skip


@pytest.mark.parametrize(("code", "bits"), BITS, ids=str)
def test_a_weight_takes_the_bits_of_the_docstring(code, bits):
    fields = jax.eval_shape(code.encode, jnp.zeros((4096, 256)))
    assert 8 * sum(f.size * f.dtype.itemsize for f in fields.values()) / (4096 * 256) == bits


def part(field, axes, role):
    """The latter half of a field along the axes of a role."""
    for n, own in enumerate(axes):
        field = jax.lax.slice_in_dim(field, field.shape[n] // 2, None, axis=n) if own == role else field
    return field


@pytest.mark.parametrize("role", ["in", "out"])
@named([case for case in CASES if case.local])
def test_a_part_of_the_fields_is_a_part_of_the_matrix(code, role):
    assert code.local == {"in", "out"}
    fields = encode(normal(), code)
    rows, columns = (ROWS // 2, COLUMNS) if role == "in" else (ROWS, COLUMNS // 2)
    parts = {name: part(field, code.axes[name], role) for name, field in fields.items()}
    equal(decode(parts, code, rows, columns), decode(fields, code, ROWS, COLUMNS)[-rows:, -columns:])


def test_what_has_a_second_level_cannot_be_cut():
    assert [case for case in CASES if not case.local] == [NF4(32, double=True)]


@pytest.mark.parametrize("bits", [2, 4])
def test_the_first_input_lies_in_the_highest_bits(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (8, 3), np.uint8)
    packed = np.asarray(packing.pack(jnp.asarray(codes), bits))
    for row in range(8):
        byte, place = divmod(row, 8 // bits)
        equal(packed[byte] >> (8 - bits - bits * place) & (2**bits - 1), codes[row])
    equal(packing.unpack(jnp.asarray(packed), bits), codes)


def test_three_bits_lie_in_three_planes():
    codes = np.random.default_rng(0).integers(0, 8, (16, 3), np.uint8)
    packed = np.asarray(packing.pack(jnp.asarray(codes), 3))
    assert packed.shape == (3, 2, 3)
    equal(packed[0], np.packbits(codes >> 2, axis=0))
    equal(packed[1], np.packbits(codes >> 1 & 1, axis=0))
    equal(packed[2], np.packbits(codes & 1, axis=0))
    equal(packing.unpack(jnp.asarray(packed), 3), codes)


def quantiles(bits):
    """NormalFloat's levels as LoftQ makes them: half below 0, one less above, between the quantile 0.9677083 and 0.5."""
    inverse = NormalDist().inv_cdf
    below = [inverse(p) for p in np.linspace(0.9677083, 0.5, 2 ** (bits - 1) + 1)[:-1]]
    above = [-inverse(p) for p in np.linspace(0.9677083, 0.5, 2 ** (bits - 1))[:-1]]
    values = np.sort([*below, 0, *above])
    return values / values.max()


@named([NF2(32), NF3(32), NF4(32)])
def test_normal_floats_are_the_nearest_quantiles(code):
    levels = quantiles(code.bits)
    np.testing.assert_allclose(code.levels, levels, rtol=0, atol=1e-6)
    blocks = normal(seed=3).astype(np.float64).reshape(-1, 32, COLUMNS)
    most = np.abs(blocks).max(1, keepdims=True)
    nearest = np.abs((blocks / most)[..., None] - levels).argmin(-1)
    wanted = (levels[nearest] * most).reshape(ROWS, COLUMNS)
    np.testing.assert_allclose(again(normal(seed=3), code), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_uniform_is_that_of_loftq(bits):
    w = normal(seed=4) + np.float32(0.25)
    wide = w.astype(np.float64)
    mean, std = wide.mean(), wide.std(ddof=1)
    clipped = np.clip(wide, mean - 2 * std, mean + 2 * std)
    low, width, steps = clipped.min(), np.ptp(clipped) + 1e-8, 2**bits - 1
    wanted = np.round((clipped - low) / width * steps) / steps * width + low
    assert (clipped != wide).any()
    np.testing.assert_allclose(again(w, Uniform(bits)), wanted, rtol=1e-5, atol=1e-6)


def test_int4_is_a_scaled_whole_number():
    w = normal(seed=5)
    most = np.abs(w).reshape(-1, 32, COLUMNS).max(1).repeat(32, 0)
    np.testing.assert_allclose(again(w, Int4(32)), np.round(w / most * 7) / 7 * most, rtol=1e-6)
    codes = np.asarray(packing.unpack(encode(w, Int4(32))["codes"], 4))
    assert codes.min() == 1 and codes.max() == 15


@pytest.mark.parametrize("kind", ["e4m3fn", "e5m2"])
def test_float8_is_the_nearest_of_its_dtype(kind):
    w, dtype = normal(seed=6), getattr(ml_dtypes, f"float8_{kind}")
    most, scale = float(ml_dtypes.finfo(dtype).max), np.abs(w).max(0)
    wanted = (w * (1 / scale * np.float32(most))).astype(dtype)
    equal(np.asarray(encode(w, Float8(kind))["codes"]).view(np.uint8), wanted.view(np.uint8))
    np.testing.assert_allclose(again(w, Float8(kind)), wanted.astype(np.float32) / most * scale, rtol=1e-6)


@pytest.mark.parametrize(("kind", "mantissa", "bias"), [("e4m3fn", 3, 7), ("e5m2", 2, 15)])
def test_every_finite_byte_of_float8_is_widened_exactly(kind, mantissa, bias):
    numbers = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, f"float8_{kind}"))
    numbers = numbers[np.isfinite(numbers)]
    assert len(numbers) in (254, 248)
    equal(_widened(jnp.asarray(numbers), mantissa, bias), numbers.astype(np.float32))


@named(CASES)
def test_zeros_stay_zeros_beside_others(code):
    w = np.concatenate([np.zeros((ROWS, 1)), normal(ROWS, 2)], 1).astype(np.float32)
    w = np.zeros_like(w) if isinstance(code, Uniform) else w
    decoded = again(w, code)
    assert np.isfinite(decoded).all()
    if isinstance(code, Uniform) or code.local:
        np.testing.assert_allclose(decoded[:, 0], 0, atol=1e-7)


@named(CASES)
def test_numbers_near_the_ends_of_float32_make_none_that_are_not_finite(code):
    signs = np.sign(normal())
    for size in (3e-39, 3e-37, 1e30):
        w = signs * np.float32(size)
        # Uniform's levels are 1e-8 apart at least.
        least = 1e-8 if isinstance(code, Uniform) else 0
        assert np.abs(again(w, code)).max() <= max(1.001 * size, least)


@pytest.mark.parametrize("cls", [NF2, NF3, NF4, FP4, Int4])
def test_a_block_that_bitsandbytes_does_not_take_is_refused(cls):
    for block in (0, 16, 48, 64.0, True, None, 8192):
        with pytest.raises(ValueError, match=rf"{cls.__name__}'s block must be one of \(32, 64, .*, got {block}"):
            cls(block)


def test_other_hyperparameters_are_checked():
    with pytest.raises(ValueError, match="NF4's double must be True or False, got 1"):
        NF4(double=1)
    with pytest.raises(ValueError, match="Float8's kind must be one of .'e4m3fn', 'e5m2'., got 'e3m4'"):
        Float8("e3m4")
    with pytest.raises(ValueError, match="Uniform's bits must be 2, 3 or 4, got 8"):
        Uniform(8)


def test_a_matrix_that_blocks_do_not_divide_is_refused_with_those_that_do():
    NF4(64).check(192, 5)
    with pytest.raises(ValueError, match="block 128 must divide the 192 rows of the 192 x 5 matrix; use 64, 32$"):
        NF4(128).check(192, 5)
    with pytest.raises(ValueError, match=r"the 40 rows of the 40 x 5 matrix; none of \(32, .*\) does; leave it out"):
        Int4().check(40, 5)


@pytest.mark.parametrize(("bits", "group"), [(2, 4), (3, 8), (4, 2)])
def test_a_matrix_that_does_not_fill_bytes_is_refused(bits, group):
    Uniform(bits).check(3 * group, 5)
    with pytest.raises(ValueError, match=f"{bits} bits pack {group} rows together, .* the {3 * group + 1} rows of the"):
        Uniform(bits).check(3 * group + 1, 5)


def test_codes_of_channels_keep_any_size():
    for code in (Int8(), Float8()):
        code.check(7, 5)
        assert np.abs(again(normal(7, 5), code) - normal(7, 5)).max() < 0.2


def test_the_fields_of_codes_are_hashable_hyperparameters():
    assert len({NF4(), NF4(64), NF4(32), NF4(double=True), FP4()}) == 4
    assert [field.name for field in dataclasses.fields(NF4)] == ["block", "double"]
    assert str(NF4()) == "NF4()" and str(NF4(32)) == "NF4(block=32)"
