"""The codes of bitsandbytes, bit for bit: golden numbers of release 0.50, written by `tests/golden/make_bitsandbytes.py`."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.stored import FP4, NF4, Int8, double

pytestmark = pytest.mark.once

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "bitsandbytes.npz"))
DTYPES = ("float32", "bfloat16", "float16")
#: name: code and matrix.
CASES = {
    "plain": (NF4(), "small"),
    "half": (NF4(32), "small"),
    "blocks": (NF4(), "wide"),
    "large": (NF4(256), "wide"),
    "fp4": (FP4(), "small"),
}
RECORDED = [(name, dtype) for name in CASES for dtype in DTYPES if f"{name}/{dtype}/codes" in GOLDEN]
equal = np.testing.assert_array_equal
encode = jax.jit(lambda w, code: code.encode(w), static_argnames="code")
decode = partial(jax.jit, static_argnames=("code", "rows", "columns"))(
    lambda f, code, rows, columns: code.decode(f, rows, columns)
)


def matrix(name, dtype="float32"):
    return jnp.asarray(GOLDEN[f"w/{name}"]).astype(dtype).astype(jnp.float32)


@pytest.mark.parametrize(("name", "dtype"), RECORDED)
def test_codes_scales_and_decoded_values_are_those_of_bitsandbytes(name, dtype):
    code, size = CASES[name]
    fields = encode(matrix(size, dtype), code)
    equal(fields["codes"], GOLDEN[f"{name}/{dtype}/codes"])
    equal(fields["scales"], GOLDEN[f"{name}/{dtype}/scales"])
    if f"{name}/{dtype}/decoded" in GOLDEN:
        decoded = decode(fields, code, *GOLDEN[f"w/{size}"].shape)
        equal(decoded.astype(dtype).astype(jnp.float32), GOLDEN[f"{name}/{dtype}/decoded"])


def test_there_are_all_dtypes_and_a_block_of_zeros_among_them():
    assert {dtype for _, dtype in RECORDED} == set(DTYPES)
    assert not GOLDEN["w/small"][:, 1].any() and (GOLDEN["plain/float32/codes"][:, 1] == 0x77).all()


def test_the_numbers_that_codes_stand_for_are_those_of_bitsandbytes():
    equal(np.float32(NF4.levels), GOLDEN["nf4_levels"])
    equal(np.float32(FP4.levels), GOLDEN["fp4_levels"])
    equal(double.DYNAMIC_MAP, GOLDEN["dynamic_map"])


DOUBLE = [
    ("double", NF4(64, double=True), "long", "float32"),
    ("double_half", NF4(32, double=True), "wide", "bfloat16"),
]


@pytest.mark.parametrize(("name", "code", "size", "dtype"), DOUBLE)
def test_the_second_level_is_that_of_bitsandbytes(name, code, size, dtype):
    w = matrix(size, dtype)
    fields = encode(w, code)
    golden = {field: GOLDEN[f"{name}/{field}"] for field in fields}
    for field in ("codes", "scales", "nested_scales"):
        equal(fields[field], golden[field])
    # torch adds up the mean in an order that depends on the CPU's vectors.
    np.testing.assert_array_max_ulp(np.asarray(fields["offset"]), golden["offset"], 1)
    equal(jax.jit(double.expand)(golden), GOLDEN[f"{name}/expanded"])
    equal(decode(golden, code, *w.shape)[:, :4].astype(dtype).astype(jnp.float32), GOLDEN[f"{name}/decoded"])


@pytest.mark.parametrize(("name", "code", "size", "dtype"), DOUBLE)
def test_the_second_level_around_the_offset_of_bitsandbytes_is_its_own(name, code, size, dtype):
    scales = encode(matrix(size, dtype), NF4(code.block))["scales"]
    fields = jax.jit(double.compress_around)(scales, GOLDEN[f"{name}/offset"])
    equal(fields["scales"], GOLDEN[f"{name}/scales"])
    equal(fields["nested_scales"], GOLDEN[f"{name}/nested_scales"])


@pytest.mark.parametrize(("name", "different"), [("double", 2), ("double_half", 2)])
def test_code_for_cpus_of_bitsandbytes_rounds_before_it_looks_for_the_nearest(name, different):
    apart = GOLDEN[f"{name}/native_scales"].astype(int) - GOLDEN[f"{name}/scales"]
    assert (apart != 0).sum() == different and np.abs(apart).max() == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_that_of_llm_int8(dtype):
    fields = encode(matrix("small", dtype), Int8())
    equal(fields["codes"], GOLDEN[f"int8/{dtype}/codes"])
    equal(fields["scales"], GOLDEN[f"int8/{dtype}/scales"])


def test_int8_is_decoded_as_there_but_for_the_order_of_two_products():
    w = matrix("small")
    decoded = decode(encode(w, Int8()), Int8(), *w.shape)
    # Each of the two products rounds once.
    np.testing.assert_array_max_ulp(np.asarray(decoded), GOLDEN["int8/decoded"], 2)
