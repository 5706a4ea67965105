"""Memory of attention in training: full and in groups, compiled at several lengths; prints a table for docs/long-context.md."""

import functools

import jax
import jax.numpy as jnp

from jlora.models import s2_attention

LENGTHS, HEADS, WIDTH, GROUP = (8192, 16384, 32768), 8, 64, 2048


def temporary(fn, length: int) -> int:
    """MiB that a forward and a backward pass need beside arguments and results; nothing is run."""
    shape = jax.ShapeDtypeStruct((1, length, HEADS, WIDTH), jnp.float32)
    step = jax.jit(jax.grad(lambda *x: fn(*x).sum(), argnums=(0, 1, 2)))
    return round(step.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes / 2**20)


def main() -> None:
    """Prints the table."""
    full = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    grouped = functools.partial(s2_attention, group=GROUP)
    print(f"| tokens | full | in groups of {GROUP:,} | ratio |\n|---|---|---|---|")
    for length in LENGTHS:
        one, other = temporary(full, length), temporary(grouped, length)
        print(f"| {length:,} | {one:,} | {other:,} | {one / other:.1f} |", flush=True)


if __name__ == "__main__":
    main()
