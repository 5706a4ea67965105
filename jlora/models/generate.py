"""Writing text with a decoder and a key-value cache: `generate` in one compiled program, `stream` token by token."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
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
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature: wanted 0 or more, got {self.temperature}.")
        if self.temperature and not 2.0**-100 <= self.temperature < 2.0**127:
            # Logits divided by less are infinite in 32 bits, and any token would be drawn.
            raise ValueError(f"temperature: wanted 0 or a number from 2^-100 and below 2^127, got {self.temperature}.")
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
            logits = jnp.where(logits < nucleus_border(-jnp.sort(-logits, axis=-1), self.top_p), -jnp.inf, logits)
        return jax.random.categorical(key, logits).astype(jnp.int32)


def nucleus_border(ordered: jax.Array, top_p: float | jax.Array) -> jax.Array:
    """The least logit `[batch, 1]` among the fewest likeliest tokens whose probabilities reach `top_p`.

    Args:
        ordered: logits `[batch, vocab]`, largest first.
        top_p: a number for all rows, or `[batch, 1]`.
    """
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
    eos_id: int | Sequence[int] | None = None,
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
        eos_id: A row ends where it draws this token, or one of these.
        key: Random key; wanted unless the temperature is 0.

    Returns:
        The new tokens of each prompt, without the prompt and without the token that ended it.

    Raises:
        ValueError: A setting is out of its range, a prompt is empty, or the key is missing.
    """
    sampling = _sampling(temperature, top_k, top_p, max_new_tokens, key)
    tokens, mask = _pad_left(prompt_tokens, WIDTH_STEP)
    key = jax.random.key(0) if key is None else key
    written, lengths = _write(apply, sampling, max_new_tokens, params, tokens, mask, _ends(eos_id), key)
    return [row[:length].tolist() for row, length in zip(np.asarray(written), np.asarray(lengths), strict=True)]


def stream(
    apply: Callable[..., Any],
    params: Any,
    prompt_tokens: Sequence[int] | np.ndarray,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | Sequence[int] | None = None,
    key: jax.Array | None = None,
    chunk: int = 1,
    width_step: int = WIDTH_STEP,
) -> Iterator[int]:
    """Continues one prompt, and yields each token as soon as it is drawn: those of `generate`, by the same arguments.

    Two programs are compiled, one for the prompt and one for what follows; the same `apply`, prompts of the same rounded length
    and the same `max_new_tokens` share them.

    Args:
        apply: As for `generate`.
        params: As for `generate`.
        prompt_tokens: Token ids of the prompt, at least one.
        max_new_tokens: Tokens to write, at most.
        temperature: As for `generate`; so are `top_k`, `top_p`, `eos_id` and `key`.
        chunk: Tokens that are drawn before the next of them are yielded: more are quicker, and come less evenly.
        width_step: Prompts are padded to a multiple of this.

    Raises:
        ValueError: As `generate`.
    """
    sampling = _sampling(temperature, top_k, top_p, max_new_tokens, key)
    if chunk < 1:
        raise ValueError(f"chunk: wanted 1 or more, got {chunk}.")
    tokens, mask = _pad_left([list(prompt_tokens)], width_step)
    key = jax.random.key(0) if key is None else key
    return _streamed(apply, sampling, max_new_tokens, params, tokens, mask, _ends(eos_id), key, chunk)


def _streamed(apply, sampling, steps, params, tokens, mask, ends, key, chunk) -> Iterator[int]:
    state = _begin(apply, steps, params, tokens, mask)
    done = 0
    while done < steps:
        state, written, length, going_on = _go_on(
            apply, sampling, steps, params, state, ends, key, jnp.int32(done + chunk)
        )
        yield from np.asarray(written)[0, done : int(length[0])].tolist()
        done += chunk
        if not going_on:
            return


def _sampling(
    temperature: float, top_k: int | None, top_p: float | None, max_new_tokens: int, key: jax.Array | None
) -> Sampling:
    """The way of drawing, with what else must hold."""
    sampling = Sampling(temperature, top_k, top_p)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: wanted 1 or more, got {max_new_tokens}.")
    if temperature and key is None:
        raise ValueError("key: a temperature above 0 draws at random; give a key, such as jax.random.key(0).")
    return sampling


def _ends(eos_id: int | Sequence[int] | None) -> np.ndarray:
    """The tokens that end a row; -1, which is none, where there are none."""
    ends = [] if eos_id is None else [eos_id] if isinstance(eos_id, int | np.integer) else list(eos_id)
    return np.array(ends or [-1], np.int32)


def _pad_left(prompts: Sequence[Sequence[int]] | np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask `[batch, width]`, prompts at the right, so that the last column is every row's last token."""
    if not len(prompts) or not all(len(prompt) for prompt in prompts):
        raise ValueError("prompt_tokens: every prompt wants at least one token; begin an empty one with the BOS token.")
    width = max(len(prompt) for prompt in prompts)
    width = -(-width // step) * step
    tokens = np.zeros((len(prompts), width), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = np.asarray(prompt)
        mask[row, width - len(prompt) :] = True
    return tokens, mask


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _write(apply, sampling, steps, params, tokens, mask, ends, key):
    """New tokens `[batch, steps]` and how many of them count in each row."""
    state = _read_prompt(apply, steps, params, tokens, mask)
    *_, written, lengths, _ = _drawn(apply, sampling, steps, params, state, ends, key, steps)
    return written, lengths


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(apply, steps, params, tokens, mask):
    return _read_prompt(apply, steps, params, tokens, mask)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _go_on(apply, sampling, steps, params, state, ends, key, until):
    """The state after more tokens, those written so far, how many count in each row, and whether any row goes on."""
    state = _drawn(apply, sampling, steps, params, state, ends, key, until)
    *_, written, lengths, running = state
    return state, written.copy(), lengths.copy(), jnp.any(running)


def _read_prompt(apply, steps, params, tokens, mask):
    """The state before the first new token: step, logits, cache, new tokens, their numbers, and which rows go on."""
    rows, width = tokens.shape
    apply = runnable(apply, params)
    logits, cache = apply({"params": params}, tokens, attention_mask=mask, cache=empty_cache(rows, width + steps))
    written, lengths = jnp.zeros((rows, steps), jnp.int32), jnp.zeros((rows,), jnp.int32)
    return jnp.int32(0), logits[:, -1], cache, written, lengths, jnp.ones((rows,), bool)


def _drawn(apply, sampling, steps, params, state, ends, key, until):
    """The state after step `until` (`steps` at most), or where all rows have ended."""
    apply = runnable(apply, params)

    def unfinished(state):
        step, *_, running = state
        return (step < jnp.minimum(until, steps)) & jnp.any(running)

    def write_one(state):
        step, logits, cache, written, lengths, running = state
        token = sampling.choose(logits, jax.random.fold_in(key, step))
        running = running & jnp.all(token[:, None] != ends, axis=1)
        written = written.at[:, step].set(token)
        lengths = lengths + running.astype(jnp.int32)
        logits, cache = apply({"params": params}, token[:, None], cache=cache)
        return step + 1, logits[:, -1], cache, written, lengths, running

    return jax.lax.while_loop(unfinished, write_one, state)
