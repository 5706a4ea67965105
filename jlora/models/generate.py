"""Writing text with a decoder: one compiled program, prompt and continuation, with a key-value cache."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.models.attention import empty_cache
from jlora.models.quantized import runnable

# Prompts are padded to a multiple of this, so that prompts of similar length share one compiled program.
WIDTH_STEP = 32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; see `generate` for the fields.

    Raises:
        ValueError: A field is out of its range.
    """

    temperature: float
    top_k: int | None
    top_p: float | None

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature: wanted 0 or more, got {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: wanted 1 or more (None for all), got {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: wanted a number above 0 and at most 1 (None for all), got {self.top_p}.")

    def choose(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """One token for every row of the logits `[batch, vocab]`."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = jnp.where(logits < jax.lax.top_k(logits, self.top_k)[0][:, -1:], -jnp.inf, logits)
        if self.top_p is not None:
            logits = jnp.where(logits < _nucleus_border(logits, self.top_p), -jnp.inf, logits)
        return jax.random.categorical(key, logits).astype(jnp.int32)


def _nucleus_border(logits: jax.Array, top_p: float) -> jax.Array:
    """The least logit `[batch, 1]` among the fewest likeliest tokens whose probabilities reach `top_p`."""
    ordered = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # The first is always in, whatever rounding does.
    inside = (before < top_p).at[:, 0].set(True)
    return jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)


def generate(
    apply: Callable[..., Any],
    params: Any,
    prompt_tokens: Sequence[Sequence[int]] | np.ndarray,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    key: jax.Array | None = None,
) -> list[list[int]]:
    """Continues prompts.

    The program is compiled once for each `apply`, number of prompts, rounded prompt length, `max_new_tokens` and way of
    drawing; so keep a lifted function and pass the same one again.

    Args:
        apply: `model.apply` of a decoder, or `jlora.lift(model.apply)`; called as `apply({"params": params}, tokens,
            attention_mask=mask, cache=cache)`.
        params: The model's params, or what a lifted function takes in their place. Leaves that are kept in the form of a
            code are decoded where they are used, whether or not the function is lifted.
        prompt_tokens: Token ids of each prompt, of any lengths, at least one each.
        max_new_tokens: Tokens to write, at most.
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_k: Draw from the k likeliest tokens alone.
        top_p: Draw from the fewest likeliest tokens whose probabilities reach p.
        eos_id: A row ends where it draws this token.
        key: Random key; wanted unless the temperature is 0.

    Returns:
        The new tokens of each prompt, without the prompt and without `eos_id`.

    Raises:
        ValueError: A setting is out of its range, a prompt is empty, or the key is missing.
    """
    sampling = Sampling(temperature, top_k, top_p)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: wanted 1 or more, got {max_new_tokens}.")
    if temperature and key is None:
        raise ValueError("key: a temperature above 0 draws at random; give a key, such as jax.random.key(0).")
    tokens, mask = _pad_left(prompt_tokens)
    end = jnp.int32(-1 if eos_id is None else eos_id)
    key = jax.random.key(0) if key is None else key
    written, lengths = _write(apply, sampling, max_new_tokens, params, tokens, mask, end, key)
    return [row[:length].tolist() for row, length in zip(np.asarray(written), np.asarray(lengths), strict=True)]


def _pad_left(prompts: Sequence[Sequence[int]] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask `[batch, width]`, prompts at the right, so that the last column is every row's last token."""
    if not len(prompts) or not all(len(prompt) for prompt in prompts):
        raise ValueError("prompt_tokens: every prompt wants at least one token; begin an empty one with the BOS token.")
    width = max(len(prompt) for prompt in prompts)
    width = -(-width // WIDTH_STEP) * WIDTH_STEP
    tokens = np.zeros((len(prompts), width), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = np.asarray(prompt)
        mask[row, width - len(prompt) :] = True
    return tokens, mask


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _write(apply, sampling, steps, params, tokens, mask, end, key):
    """New tokens `[batch, steps]` and how many of them count in each row."""
    rows, width = tokens.shape
    apply = runnable(apply, params)
    logits, cache = apply({"params": params}, tokens, attention_mask=mask, cache=empty_cache(rows, width + steps))
    written = jnp.zeros((rows, steps), jnp.int32)
    lengths = jnp.zeros((rows,), jnp.int32)
    running = jnp.ones((rows,), bool)

    def unfinished(state):
        step, *_, running = state
        return (step < steps) & jnp.any(running)

    def write_one(state):
        step, logits, cache, written, lengths, running = state
        token = sampling.choose(logits, jax.random.fold_in(key, step))
        running = running & (token != end)
        written = written.at[:, step].set(token)
        lengths = lengths + running.astype(jnp.int32)
        logits, cache = apply({"params": params}, token[:, None], cache=cache)
        return step + 1, logits[:, -1], cache, written, lengths, running

    state = jnp.int32(0), logits[:, -1], cache, written, lengths, running
    *_, written, lengths, _ = jax.lax.while_loop(unfinished, write_one, state)
    return written, lengths
