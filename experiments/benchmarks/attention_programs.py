"""What attention moves and keeps: jlora's blocks of queries beside kernels of vendors, compiled for chips that are not there.

    pip install -U "jax[tpu]"                              (the compiler for v5e)
    pip install jax-cuda13-plugin jax-cuda13-pjrt          (of JAX's own version: the compiler for H100)
    python experiments/benchmarks/attention_programs.py [--chip v5e h100] [--length 8192 32768] [--rows causal packed window]

One text in bfloat16, 32 heads of 128 that share 8 keys; forward and backward from a cotangent of the output. Temporary memory
is the compiler's, bytes are counted by hlo.py: each instruction's arrays once, without what stays on the chip. Of a vendor's
kernel that is what comes in and goes out once; what it reads again inside is not known to the compiler. Nothing is run.

jlora     `models.attention.attend`, with 2^26, 2^24 or 2^22 scores at a time (2^26 is what it does).
splash    the kernel for TPUs that JAX ships (Pallas), block sizes as it has them.
cudnn     `jax.nn.dot_product_attention(implementation="cudnn")`; packed texts take a mask, `[length, length]`.

causal    each token sees those before it; packed: those before it in its own segment, which are an argument; window: the 4,096
          before it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import hlo
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from qlora_memory import OPTIONS, h100
from tpu_programs import topology_devices

from jlora.models import attention

HEADS, KEYS, WIDTH, WINDOW = 32, 8, 128, 4096
ROWS = ("causal", "packed", "window")
KINDS = {
    "v5e": ("jlora 26", "jlora 24", "jlora 22", "splash"),
    "h100": ("jlora 26", "cudnn"),
}
Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def jlora(rows: str) -> Attention:
    """jlora's own."""

    def fn(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
        segments = segments if rows == "packed" else jnp.ones_like(segments)
        positions = attention.token_positions(segments)
        window = WINDOW if rows == "window" else None
        return attention.attend(query, key, value, attention.Visible(segments, segments, positions, positions, window))

    return fn


def splash(rows: str, length: int) -> Attention:
    """The kernel that JAX ships for TPUs."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, length)
    mask = masks.LocalMask(shape, (WINDOW - 1, 0), 0) if rows == "window" else masks.CausalMask(shape)
    kernel = kernels.make_splash_mqa_single_device(masks.MultiHeadMask([mask] * (HEADS // KEYS)))

    def fn(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
        ids = kernels.SegmentIds(segments[0], segments[0]) if rows == "packed" else None
        grouped = (query[0] * WIDTH**-0.5).transpose(1, 0, 2).reshape(KEYS, HEADS // KEYS, length, WIDTH)
        keys, values = (each[0].transpose(1, 0, 2) for each in (key, value))
        mixed = jax.vmap(lambda q, k, v: kernel(q, k, v, ids))(grouped, keys, values)
        return mixed.reshape(HEADS, length, WIDTH).transpose(1, 0, 2)[None]

    return fn


def cudnn(rows: str) -> Attention:
    """NVIDIA's."""

    def fn(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
        mask = segments[:, None, :, None] == segments[:, None, None, :] if rows == "packed" else None
        window = (WINDOW - 1, 0) if rows == "window" else None
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, is_causal=True, local_window_size=window, implementation="cudnn"
        )

    return fn


def measure(kind: str, chip: str, rows: str, length: int) -> dict[str, float]:
    """Temporary MB and GB moved, forward and backward."""
    name, scores = kind.split(" ") if " " in kind else (kind, "26")
    fn = {"jlora": lambda: jlora(rows), "splash": lambda: splash(rows, length), "cudnn": lambda: cudnn(rows)}[name]()
    device = h100() if chip == "h100" else topology_devices("v5e:2x2")[0]
    place = SingleDeviceSharding(device)

    def struct(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def both(query: Any, key: Any, value: Any, segments: Any, cotangent: Any) -> Any:
        y, pull = jax.vjp(lambda *a: fn(*a, segments).reshape(cotangent.shape), query, key, value)
        return y, pull(cotangent)

    wide, narrow = struct(1, length, HEADS, WIDTH), struct(1, length, KEYS, WIDTH)
    arguments = wide, narrow, narrow, struct(1, length, dtype=jnp.int32), wide
    platform = "cuda" if chip == "h100" else "tpu"
    with mock.patch.object(attention, "SCORES", 2 ** int(scores)):
        lowered = jax.jit(both).trace(*arguments).lower(lowering_platforms=(platform,))
    compiled = lowered.compile(compiler_options=OPTIONS if chip == "h100" else None)
    moved = hlo.Module(compiled.as_text()).tally().hbm_bytes
    return {"temporary": compiled.memory_analysis().temp_size_in_bytes / 2**20, "moved": moved / 1e9}


def main() -> None:
    """Prints a table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--length", nargs="+", type=int, default=[8192, 32768])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    o = parser.parse_args()
    print(f"| chip, tokens, attention | {' | '.join(o.rows)} |\n|---|" + "---|" * len(o.rows))
    for chip in o.chip:
        for length in o.length:
            for kind in KINDS[chip]:
                cells = []
                for rows in o.rows:
                    try:
                        found = measure(kind, chip, rows, length)
                        cells.append(f"{found['temporary']:,.0f} MB, {found['moved']:.1f} GB")
                    except Exception as error:
                        cells.append(f"{type(error).__name__}: {str(error).splitlines()[0][:100]}")
                print(f"| {chip}, {length:,}, {kind.replace(' ', ' 2^')} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
