"""Memory of attention in training: full, in blocks and in groups, compiled at several lengths; prints the table of its page."""

import functools

import jax
import jax.numpy as jnp

from jlora.models import attention, s2_attention

LENGTHS, HEADS, WIDTH, GROUP = (8192, 16384, 32768), 8, 64, 2048


def temporary(fn, length: int) -> int:
    """MiB that a forward and a backward pass need beside arguments and results; nothing is run."""
    shape = jax.ShapeDtypeStruct((1, length, HEADS, WIDTH), jnp.float32)
    step = jax.jit(jax.grad(lambda *x: fn(*x).sum(), argnums=(0, 1, 2)))
    return round(step.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes / 2**20)


def in_blocks(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Full attention as the models of jlora have it: all scores where they are few, else those of a block of queries."""
    segments, positions = jnp.ones(query.shape[:2], jnp.int32), jnp.arange(query.shape[1])[None]
    return attention.attend(query, key, value, attention.Visible(segments, segments, positions, positions))


def main() -> None:
    """Prints the table."""
    full = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    grouped = functools.partial(s2_attention, group=GROUP)
    print(f"| tokens | all scores | in blocks | in groups of {GROUP:,} |\n|---|---|---|---|")
    for length in LENGTHS:
        found = [temporary(fn, length) for fn in (full, in_blocks, grouped)]
        print(f"| {length:,} | {' | '.join(f'{each:,}' for each in found)} |", flush=True)


if __name__ == "__main__":
    main()
