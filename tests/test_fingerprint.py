"""The fingerprint: equal for equal values wherever they lie, different for anything else."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora.disk import fingerprint as disk_fingerprint

VALUES = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)


def of(array):
    return jlora.fingerprint({"w": jnp.asarray(array)})


def test_resharding_changes_nothing():
    mesh = jax.make_mesh((2, 4), ("a", "b"), (AxisType.Auto,) * 2)
    for dtype in (jnp.float32, jnp.bfloat16):
        whole = jnp.asarray(VALUES, dtype)
        for spec in (P(), P("a"), P("b", "a"), P(None, ("a", "b"))):
            assert of(jax.device_put(whole, NamedSharding(mesh, spec))) == of(whole)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int4, jnp.complex64])
def test_blocks_of_a_large_leaf_change_nothing(dtype, monkeypatch):
    array = jnp.asarray(VALUES * 3, dtype)
    whole = of(array)
    monkeypatch.setattr(disk_fingerprint, "_BLOCK", 50)
    assert of(array) == whole
    assert of(array.at[7, 0].set(1)) != whole


def test_numpy_and_jax_arrays_with_the_same_values_are_the_same():
    assert jlora.fingerprint({"w": VALUES}) == of(VALUES)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.uint32, jnp.bool_])
def test_any_single_changed_bit_or_value_changes_it(dtype):
    array = np.asarray(jnp.asarray(VALUES > 0 if dtype == jnp.bool_ else VALUES * 30, dtype))
    bits = array.view(f"u{array.itemsize}")
    found = {of(array)}
    changes = 0
    for place in ((0, 0), (3, 7), (7, 15)):
        for bit in (0, 8 * array.itemsize - 1) if dtype != jnp.bool_ else (0,):
            changed = bits.copy()
            changed[place] ^= bits.dtype.type(1 << bit)
            found.add(of(changed.view(array.dtype)))
            changes += 1
    assert len(found) == changes + 1


def test_any_two_signs_that_change_together_change_it():
    changed = VALUES.copy()
    changed[0, :2] *= -1
    again = VALUES.copy()
    again[0, 1:3] *= -1
    assert len({of(VALUES), of(changed), of(again), of(-VALUES)}) == 4


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int4, jnp.uint4, jnp.float8_e4m3fn])
def test_rare_dtypes_have_a_fingerprint_too(dtype):
    array = jnp.arange(8).astype(dtype)
    assert of(array) == of(array + 0)
    assert of(array) != of(array[::-1])
    if dtype == jnp.complex64:
        assert of(array) != of(array + 1j)


def test_swapped_elements_rows_and_axes_change_it():
    rows = VALUES[[1, 0, *range(2, 8)]]
    swapped = VALUES.copy()
    swapped[0, 0], swapped[0, 1] = VALUES[0, 1], VALUES[0, 0]
    far = VALUES.copy()
    far[0, 0], far[7, 15] = VALUES[7, 15], VALUES[0, 0]
    square = VALUES[:, :8]
    assert len({of(VALUES), of(rows), of(swapped), of(far), of(VALUES[::-1]), of(VALUES.reshape(16, 8))}) == 6
    assert of(square) != of(square.T)


def test_every_exchange_of_two_elements_changes_it():
    small = np.arange(12, dtype=np.float32).reshape(3, 4)
    found = {of(small)}
    for i in range(12):
        for j in range(i):
            swapped = small.copy()
            swapped.flat[i], swapped.flat[j] = small.flat[j], small.flat[i]
            found.add(of(swapped))
    assert len(found) == 1 + 12 * 11 // 2


def test_minus_zero_and_the_kinds_of_nan_are_values_of_their_own():
    assert of(np.zeros(3, np.float32)) != of(-np.zeros(3, np.float32))
    nans = np.full(2, np.nan, np.float32)
    assert of(nans) == of(nans.copy())
    other = nans.copy()
    other.view(np.uint32)[0] ^= 1
    assert of(nans) != of(other)


def test_paths_shapes_and_dtypes_belong_to_it_and_the_order_of_keys_does_not():
    w = jnp.zeros(4)
    same = [{"a": w, "b": w + 1}, {"b": w + 1, "a": w}]
    assert jlora.fingerprint(same[0]) == jlora.fingerprint(same[1])
    others = [
        {"a": w + 1, "b": w},
        {"a": w, "c": w + 1},
        {"a": w},
        {"a": {"b": w + 1}, "b": w},
        {"a": w.reshape(2, 2), "b": w + 1},
    ]
    others += [{"a": w.astype(jnp.int32), "b": w + 1}]
    assert len({jlora.fingerprint(tree) for tree in [same[0], *others]}) == len(others) + 1


def test_a_text_counts_and_what_is_neither_array_number_nor_text_is_refused_by_name():
    assert jlora.fingerprint({"name": "a"}) != jlora.fingerprint({"name": "b"})
    with pytest.raises(TypeError, match="layer/act is no array but function.*; keep it out of the params tree"):
        jlora.fingerprint({"layer": {"act": lambda x: x, "w": jnp.zeros(2)}})


def test_arrays_that_jax_has_not_and_shapes_without_values_are_refused_by_name():
    for leaf in (
        np.array([None], object),
        np.array(["a"]),
        np.datetime64("2020"),
        jax.ShapeDtypeStruct((2,), jnp.float32),
    ):
        with pytest.raises(
            TypeError, match="layer/x is a .* of .*, no array of numbers, .*keep it out of the params tree"
        ):
            jlora.fingerprint({"layer": {"x": leaf}})


def test_a_whole_number_beyond_those_of_jax_counts_as_itself():
    assert (
        jlora.fingerprint({"seed": 2**70})
        == jlora.fingerprint({"seed": 2**70})
        != jlora.fingerprint({"seed": 2**70 + 1})
    )


def test_floats_of_half_a_byte_have_a_fingerprint_too():
    values = np.array([0.5, 1, -2, 6]).astype(ml_dtypes.float4_e2m1fn)
    assert (
        jlora.fingerprint({"w": values})
        == jlora.fingerprint({"w": values.copy()})
        != jlora.fingerprint({"w": values[::-1]})
    )
