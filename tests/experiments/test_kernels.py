"""The low-rank kernels for TPUs, interpreted, give what numpy gives; the bytes that are said of them follow from their grid."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "kernels"))
import layer
import low_rank
from low_rank import Tiles

pytestmark = pytest.mark.once

T, K, N, R = 256, 128, 256, 3


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """A tile of more rows than are multiplied at a time."""
    monkeypatch.setattr(low_rank, "ROWS", 64)


def arrays(dtype, *shapes):
    """Random numbers in the dtype, and the same in 64 bits."""
    rng = np.random.default_rng(0)
    made = [jnp.asarray(rng.standard_normal(shape) / 4, dtype) for shape in shapes]
    return made, [np.asarray(one, np.float64) for one in made]


def close(got, wanted, dtype):
    """Within one rounding to the dtype and the sums of 32 bits."""
    rounding = 2.0**-8 if dtype == jnp.bfloat16 else 0.0
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=rounding, atol=2e-5)


@pytest.mark.parametrize(
    ("dtype", "m", "n", "k", "added"),
    [(jnp.bfloat16, 128, 128, 64, True), (jnp.float32, 256, 128, 128, False)],
)
def test_both_kernels_give_what_numpy_gives(dtype, m, n, k, added):
    width = jnp.dtype(dtype).itemsize
    (x, w, a, b, g, rest), (x_, w_, a_, b_, g_, rest_) = arrays(dtype, (T, K), (K, N), (K, R), (R, N), (T, N), (T, K))
    y, t = low_rank.forward(x, w, a, b, Tiles("forward", T, K, N, R, m, n, k, width), interpret=True)
    close(t, x_ @ a_, dtype)
    t_ = np.asarray(t, np.float64)
    close(y, x_ @ w_ + t_ @ b_, dtype)

    tiles = Tiles("backward", T, K, N, R, m, n, k, width, added)
    dx, u, db = low_rank.backward(g, w, a, b, t, tiles, rest if added else None, interpret=True)
    close(u, g_ @ b_.T, dtype)
    close(dx, g_ @ w_.T + np.asarray(u, np.float64) @ a_.T + added * rest_, dtype)
    assert db.dtype == jnp.float32
    close(db, t_.T @ g_, jnp.float32)


def test_a_small_update_arrives_in_16_bits():
    (x, w, a, b), (x_, _, a_, b_) = arrays(jnp.bfloat16, (T, K), (K, N), (K, R), (R, N))
    tiles = Tiles("forward", T, K, N, R, 128, 128, 64)
    small = b * jnp.bfloat16(2**-12)
    product = jax.jit(lambda b: low_rank.forward(x, w, a, b, tiles, interpret=True)[0].astype(jnp.float32))
    moved, still = product(small), product(jnp.zeros_like(b))
    wanted = x_ @ (a_ @ b_) * 2.0**-12
    got = np.asarray(moved - still, np.float64)
    assert 0.8 < np.sum(got * wanted) / np.sum(wanted**2) < 1.2


def test_bytes_follow_the_grid():
    tiles = Tiles("forward", 1024, 512, 768, 16, 512, 256, 256)
    assert tiles.grid == (2, 3, 2)
    named = {name: tiles.times(block) * block.bytes for name, block in tiles.blocks.items()}
    assert named["x"] == 3 * 2 * 1024 * 512
    assert named["w"] == 2 * 2 * 512 * 768
    assert named["y"] == 2 * 1024 * 768
    assert named["t"] == 2 * 1024 * 128  # a TPU's rows have 128 values
    assert tiles.bytes == sum(named.values())
    assert tiles.once < tiles.bytes
    whole = Tiles("backward", 1024, 512, 768, 16, 1024, 256, 512)
    assert whole.grid == (1, 1, 3)
    assert whole.bytes == whole.once


def test_the_best_tiles_are_chosen_and_what_fits_none_is_refused():
    best = low_rank.choose("forward", (4096, 4096), 14336, 16, low_rank.BUDGETS["v5e"])
    assert best.bytes == best.once
    assert best.vmem <= low_rank.BUDGETS["v5e"]
    tight = low_rank.choose("forward", (4096, 4096), 14336, 16, 16 * low_rank.MIB)
    assert tight.bytes > best.bytes
    with pytest.raises(ValueError, match=r"no tiles for x \(4000, 4096\) and w \(4096, 14336\)"):
        low_rank.choose("forward", (4000, 4096), 14336, 16, low_rank.BUDGETS["v5e"])


def test_a_group_on_two_devices_has_the_gradients_of_the_plain_formula(monkeypatch):
    monkeypatch.setattr(low_rank, "STEPS", 1)
    rows, spread = 512, jax.make_mesh((2,), ("fsdp",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    kernels = layer.Kernels(spread, low_rank.BUDGETS["v5e"], interpret=True)
    (x, w, v, a, c, b, d), _ = arrays(
        jnp.float32, (rows, 256), (256, 512), (256, 256), (256, R), (256, R), (R, 512), (R, 256)
    )

    def loss(product, x, a, b):
        y, z = product(x, [w, v], a, b)
        return jnp.sum(jnp.sin(y)) + jnp.sum(z**2)

    def plain(x, weights, a, b):
        return [x @ m + (x @ one) @ other for m, one, other in zip(weights, a, b)]

    def grads(product):
        return jax.jit(jax.grad(lambda x, a, b: loss(product, x, a, b), argnums=(0, 1, 2)))(x, [a, c], [b, d])

    got = grads(lambda x, weights, a, b: layer.group(kernels, x, weights, a, b))
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-3), got, grads(plain))


def test_what_windows_read_again_is_counted_and_what_is_on_the_chip_is_not():
    windows = '"iteration_bounds":["4","2","1"]'

    def text(place):
        return f"""
%fused (p0: bf16[512,256], p1: bf16[256,1024]) -> bf16[512,1024] {{
  %p0 = bf16[512,256]{{1,0}} parameter(0)
  %p1 = bf16[256,1024]{{1,0}} parameter(1)
  ROOT %c = bf16[512,1024]{{1,0}} convolution(%p0, %p1), dim_labels=bf_io->bf
}}
ENTRY %main (x: bf16[512,256], w: bf16[256,1024]) -> bf16[512,1024] {{
  %x = bf16[512,256]{{1,0{place}}} parameter(0)
  %w = bf16[256,1024]{{1,0}} parameter(1)
  ROOT %f = bf16[512,1024]{{1,0}} fusion(%x, %w), kind=kOutput, calls=%fused, backend_config={{{windows}}}
}}
"""

    once = 2 * (512 * 256 + 256 * 1024 + 512 * 1024)
    assert layer.Once(text("")).tally().hbm_bytes == once
    # Over columns first `x` comes four times, over rows first `w` comes twice: the fewer bytes count.
    assert layer.Tiled(text("")).tally().hbm_bytes == once + 2 * min(3 * 512 * 256, 1 * 256 * 1024)
    assert layer.Tiled(text("S(1)")).tally().hbm_bytes == once - 2 * 512 * 256
    summed = text("").replace('"2","1"]', '"2","3"]')
    assert layer.Tiled(summed).tally().hbm_bytes == once + 2 * (3 * 512 * 256 + 256 * 1024)
