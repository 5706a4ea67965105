"""The next token of every row, each drawn in its own way."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.models.generate import nucleus_border
from jlora.serving.request import TOP, Asked


class Ways(NamedTuple):
    """How rows draw and end: arrays with one entry a row.

    Attributes:
        temperature: float32; 0 for the likeliest token.
        top_k: int32; 0 for all.
        top_p: float32; 1 for all.
        seed: uint32.
        ends: int32 `[rows, most]`, filled up with -1.
        limit: int32, tokens to write at most.
        logprobs: bool, whether logarithms of probabilities are wanted.
        alive: bool, whether the row may write.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    seed: Any
    ends: Any
    limit: Any
    logprobs: Any
    alive: Any

    @classmethod
    def empty(cls, rows: int, ends: int) -> Ways:
        """Those of rows in which nothing is, with room for so many end tokens."""
        numbers = {
            "temperature": np.float32,
            "top_k": np.int32,
            "top_p": np.float32,
            "seed": np.uint32,
            "limit": np.int32,
        }
        made = {name: np.zeros(rows, dtype) for name, dtype in numbers.items()}
        flags = {name: np.zeros(rows, bool) for name in ("logprobs", "alive")}
        return cls(**made, **flags, ends=np.full((rows, ends), -1, np.int32))

    def take(self, row: int, asked: Asked) -> None:
        """Sets a row to what a request asks for; it may not write yet."""
        self.temperature[row], self.seed[row] = asked.temperature, asked.seed
        self.top_k[row] = 0 if asked.top_k is None else min(asked.top_k, np.iinfo(np.int32).max)
        self.top_p[row] = 1 if asked.top_p is None else asked.top_p
        self.ends[row] = -1
        self.ends[row, : len(asked.ends)] = asked.ends
        self.limit[row], self.logprobs[row], self.alive[row] = asked.max_new_tokens, asked.logprobs is not None, False

    def drop(self, row: int) -> None:
        """Lets a row write no more."""
        # Rows that draw nothing cost nothing where all others take the likeliest token.
        self.temperature[row], self.logprobs[row], self.alive[row] = 0, False, False

    def row(self, row: jax.Array) -> Ways:
        """Those of one row, as of a batch of one."""
        return jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, row, 1), self)


class Drawn(NamedTuple):
    """What rows have drawn.

    Attributes:
        token: int32 `[rows]`.
        logprob: float32 `[rows]`, its probability's logarithm before temperature, top_k and top_p.
        top: int32 `[rows, most]`, the likeliest tokens.
        top_logprob: float32 `[rows, most]`.
        sound: bool `[rows]`, whether the logits were numbers.
    """

    token: jax.Array
    logprob: jax.Array
    top: jax.Array
    top_logprob: jax.Array
    sound: jax.Array


def draw(logits: jax.Array, ways: Ways, count: jax.Array) -> Drawn:
    """One token for every row.

    A row's key is `fold_in(key(seed), count)`: what it draws depends on nothing but its own logits, seed and place in its text,
    and is what `jlora.models.generate` draws for it alone.

    Args:
        logits: float32 `[rows, vocab]`.
        ways: how rows draw.
        count: int32 `[rows]`, how many tokens each has drawn before.
    """
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    hot = ways.temperature > 0

    def at_random() -> jax.Array:
        scaled = logits / jnp.where(hot, ways.temperature, 1)[:, None]
        cut = hot & ((ways.top_k > 0) | (ways.top_p < 1))
        scaled = jax.lax.cond(jnp.any(cut), lambda: _cut(scaled, ways), lambda: scaled)
        keys = jax.vmap(lambda seed, count: jax.random.fold_in(jax.random.key(seed), count))(ways.seed, count)
        return jnp.where(hot, jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32), likeliest)

    token = jax.lax.cond(jnp.any(hot), at_random, lambda: likeliest)
    rows, most = logits.shape[0], min(TOP, logits.shape[1])

    def with_logprobs() -> tuple[jax.Array, jax.Array, jax.Array]:
        logarithms = jax.nn.log_softmax(logits, axis=-1)
        values, top = jax.lax.top_k(logarithms, most)
        return jnp.take_along_axis(logarithms, token[:, None], axis=-1)[:, 0], top.astype(jnp.int32), values

    def without() -> tuple[jax.Array, jax.Array, jax.Array]:
        return jnp.zeros(rows), jnp.zeros((rows, most), jnp.int32), jnp.zeros((rows, most))

    logprob, top, values = jax.lax.cond(jnp.any(ways.logprobs), with_logprobs, without)
    return Drawn(token, logprob, top, values, jnp.isfinite(jnp.max(logits, axis=-1)))


def _cut(logits: jax.Array, ways: Ways) -> jax.Array:
    """Logits, -inf for all but each row's likeliest tokens: its top_k, and of these its top_p."""
    ordered = -jnp.sort(-logits, axis=-1)
    last = jnp.clip(jnp.where(ways.top_k > 0, ways.top_k, logits.shape[-1]), 1, logits.shape[-1]) - 1
    border = jnp.take_along_axis(ordered, last[:, None], axis=-1)
    ordered = jnp.where(ordered < border, -jnp.inf, ordered)
    whole = ways.top_p[:, None] >= 1
    border = jnp.where(whole, border, jnp.maximum(border, nucleus_border(ordered, ways.top_p[:, None])))
    return jnp.where(logits < border, -jnp.inf, logits)
