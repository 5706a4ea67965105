"""The engine: continuous batching of requests, each with its own adapter, on one base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jlora.serving.request import Finished, Request, State, Token
from jlora.serving.store import AdapterStore


class Engine:
    """Continuous batching of requests, each with its own adapter, on one base.

    It has a fixed number of rows, each with its part of a key-value cache and its own copy of an adapter. A request gets a free
    row, writes its adapter there once, has its prompt read in chunks between the others' decoding steps, and leaves when it
    ends. Three programs are compiled, by `start`, and none after it.

    A request's tokens are those that `jlora.models.generate` gives to its prompt alone, with `key=jax.random.key(seed)` where
    it draws at random, up to the rounding of sums; they don't depend on what runs beside it.

    Args:
        model: a decoder of `jlora.models`.
        params: its params; leaves may be kept in the form of a code.
        rows: requests that run at once.
        length: tokens of a request, prompt and continuation together.
        chunk: tokens of a prompt that are read at a time.
        adapters: the adapters, made for the same model and params; without it the base alone is served.
        queue: requests that may wait.
        steps: decoding steps between two looks at the queue: more are quicker, and tokens come less evenly.

    Raises:
        ValueError: for a number that is not positive, a model without a head, and a store of other params.

    Example:
        >>> engine = Engine(model, params, adapters=store)
        >>> engine.start()
        >>> engine.submit([1, 410], adapter="sql", max_new_tokens=16, listen=print)
        >>> engine.close()
    """

    adapters: AdapterStore | None

    def __init__(
        self,
        model: Any,
        params: Any,
        *,
        rows: int = 8,
        length: int = 2048,
        chunk: int = 64,
        adapters: AdapterStore | None = None,
        queue: int = 256,
        steps: int = 4,
    ):
        raise NotImplementedError

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        listen: Callable[[Token | Finished], None],
        adapter: str | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        ends: Sequence[int] = (),
        logprobs: int | None = None,
    ) -> Request:
        """Takes a request, from any thread; it begins when a row is free, first come, first served.

        Args:
            prompt: token ids, at least one.
            max_new_tokens: tokens to write, at most.
            listen: called from the engine's thread with every `Token`, in order, and once with `Finished` at the end. It should
                be quick; if it raises, the request is cancelled.
            adapter: its name in the store; None for the base.
            temperature, top_k, top_p: as for `jlora.models.generate`.
            seed: of what it draws, 0 to 2^32 - 1; by default one that no other request has.
            ends: tokens that end it, at most 16.
            logprobs: tell the logarithm of each token's probability, and those of that many likeliest tokens, 0 to 20.

        Raises:
            ValueError: for an argument out of range, and where prompt and `max_new_tokens` are longer than `length`.
            UnknownAdapter: where the store has no adapter of that name.
            QueueFull: where as many requests wait as may.
            Closed: where the engine is closed, being closed, or has failed.
        """
        raise NotImplementedError

    def start(self) -> None:
        """Compiles the programs and starts the engine's thread. What was submitted before has waited.

        Raises:
            Closed: where it was started before, or closed.
        """
        raise NotImplementedError

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Ends the engine; new requests are refused from now on. Returns when its thread has ended.

        Args:
            drain: finish the requests that run and wait; else they are cancelled.
            timeout: seconds after which those that are left are cancelled.
        """
        raise NotImplementedError

    def state(self) -> State:
        """The engine in numbers."""
        raise NotImplementedError
