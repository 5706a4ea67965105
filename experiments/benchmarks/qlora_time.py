"""What a step of QLoRA takes beside one of LoRA on a base in bfloat16, on the GPU that is there.

    python experiments/benchmarks/qlora_time.py [--model 7b] [--layers N] [--rows N] [--tokens N] [--repeats N]

The steps are those of qlora_memory.py, their arrays drawn and not read: time doesn't depend on values. The one on NF4 is run
first, alone, for the peak of the device's memory where the backend tells it; then both in turns. What counts is the median of
the turns' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "")  # not the CPU that qlora_memory.py compiles from

import jax
import jax.numpy as jnp
from qlora_memory import GIB, SIZES, model_config, training_step


def drawn(shapes: Any) -> Any:
    """Arrays of some shapes: small normal numbers, and whole numbers of all bits."""
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))

    def one(key: jax.Array, leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jax.random.bits(key, leaf.shape, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(leaf.dtype)
        return 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)

    draw = jax.jit(one, static_argnums=1)
    return structure.unflatten(
        draw(key, jax.ShapeDtypeStruct(x.shape, x.dtype)) for key, x in zip(keys, leaves, strict=True)
    )


def runner(model: str, base: str, layers: int | None, rows: int, tokens: int, rank: int) -> Callable[[], float]:
    """A function that takes a step and gives its seconds."""
    step, (trained, state, rest, row) = training_step(model_config(model, layers), base, rows, tokens, rank)
    program = jax.jit(step, donate_argnums=(0, 1))
    now = {"trained": drawn(trained), "state": jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)}
    rest, row = drawn(rest), jnp.zeros(row.shape, row.dtype)

    def run() -> float:
        begin = time.perf_counter()
        now["trained"], now["state"], value = program(now["trained"], now["state"], rest, row)
        jax.block_until_ready((now, value))
        return time.perf_counter() - begin

    for _ in range(2):
        run()
    return run


def main() -> None:
    """Prints the seconds and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="7b")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10)
    asked = parser.parse_args()
    of = asked.layers, asked.rows, asked.tokens, asked.rank
    quantized = runner(asked.model, "nf4", *of)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    plain = runner(asked.model, "bf16", *of)
    turns = [(quantized(), plain()) for _ in range(asked.repeats)]
    found = {
        "device": jax.devices()[0].device_kind,
        "model": asked.model,
        "layers": asked.layers,
        "rows": asked.rows,
        "tokens": asked.tokens,
        "nf4_seconds": statistics.median(turn[0] for turn in turns),
        "bf16_seconds": statistics.median(turn[1] for turn in turns),
        "ratio": statistics.median(turn[0] / turn[1] for turn in turns),
        "nf4_peak_gib": None if peak is None else round(peak / GIB, 2),
        "jax": jax.__version__,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
