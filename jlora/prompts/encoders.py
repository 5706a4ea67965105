"""The networks that make prompts while they are trained: linear layers and an LSTM over the virtual tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jlora.core.protocol.method import Arrays


def uniform(key: jax.Array, shape: tuple[int, ...], inputs: int, dtype: jnp.dtype) -> jax.Array:
    """Uniform in ±1/sqrt(inputs): what torch's linear and recurrent layers start from."""
    bound = 1 / math.sqrt(inputs)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def linear_start(key: jax.Array, name: str, inputs: int, outputs: int, dtype: jnp.dtype) -> Arrays:
    """Kernel `[inputs, outputs]` and bias of a linear layer."""
    keys = jax.random.split(key)
    return {
        f"{name}_kernel": uniform(keys[0], (inputs, outputs), inputs, dtype),
        f"{name}_bias": uniform(keys[1], (outputs,), inputs, dtype),
    }


def linear(arrays: Mapping[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
    """`x @ kernel + bias`."""
    return x @ arrays[f"{name}_kernel"] + arrays[f"{name}_bias"]


def lstm_start(key: jax.Array, name: str, inputs: int, hidden: int, dtype: jnp.dtype) -> Arrays:
    """The arrays of one layer of an LSTM that reads the virtual tokens both ways; gates in the order of torch: i, f, g, o."""
    found: Arrays = {}
    for direction, each in zip(("forward", "backward"), jax.random.split(key)):
        keys, stem = jax.random.split(each, 3), f"{name}_{direction}"
        found[f"{stem}_input"] = uniform(keys[0], (inputs, 4 * hidden), hidden, dtype)
        found[f"{stem}_hidden"] = uniform(keys[1], (hidden, 4 * hidden), hidden, dtype)
        # torch adds two biases; their sum is what counts.
        found[f"{stem}_bias"] = jnp.sum(uniform(keys[2], (2, 4 * hidden), hidden, dtype), axis=0)
    return found


def lstm(arrays: Mapping[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
    """`[tokens, inputs]` to `[tokens, 2 * hidden]`: the states of both directions beside each other."""
    ways = [_one_way(arrays, f"{name}_{way}", x, way == "backward") for way in ("forward", "backward")]
    return jnp.concatenate(ways, axis=-1)


def _one_way(arrays: Mapping[str, jax.Array], stem: str, x: jax.Array, reverse: bool) -> jax.Array:
    """The states of one direction; `c' = sigmoid(f) c + sigmoid(i) tanh(g)`, `h' = sigmoid(o) tanh(c')`."""
    into = x @ arrays[f"{stem}_input"] + arrays[f"{stem}_bias"]
    kernel = arrays[f"{stem}_hidden"]
    zero = jnp.zeros(kernel.shape[0], into.dtype)

    def step(state: tuple[jax.Array, jax.Array], given: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        h, c = state
        i, f, g, o = jnp.split(given + h @ kernel, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    return jax.lax.scan(step, (zero, zero), into, reverse=reverse)[1]
