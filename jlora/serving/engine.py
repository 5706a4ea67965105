"""The engine: continuous batching of requests, each with its own adapter, on one base."""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora.serving.loop import Loop
from jlora.serving.pages import Pages
from jlora.serving.programs import Programs
from jlora.serving.request import (
    Asked,
    Closed,
    Finished,
    Listener,
    QueueFull,
    Request,
    State,
    UnknownAdapter,
    tokens_of,
)
from jlora.serving.store import AdapterStore

_LOG = logging.getLogger("jlora.serving")


class Engine:
    """Continuous batching of requests, each with its own adapter, on one base.

    It has a fixed number of rows, each with its part of a key-value cache and its own copy of an adapter. A request gets a free
    row, writes its adapter there once, has its prompt read in chunks between the others' decoding steps, and leaves when it
    ends. Three programs are compiled, by `start`, and none after it; four where adapters may put virtual tokens in front.

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
        ends: end tokens that a request may have.

    Raises:
        ValueError: for a number that is not positive, a model without a head, and a store of other params.

    Example:
        >>> model, params = jlora.models.load(jlora.models.STORIES260K)
        >>> store = jlora.serving.AdapterStore(model, params)
        >>> engine = jlora.serving.Engine(model, params, rows=2, length=64, adapters=store)
        >>> told = []
        >>> request = engine.submit([1, 410, 403], max_new_tokens=16, listen=told.append)  # adapter="name of one in the store"
        >>> request.cancel()  # in place of engine.start()
        >>> engine.close()
        >>> told
        [Finished(reason='cancelled', error=None)]
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        *,
        rows: int = 8,
        length: int | None = None,
        chunk: int = 64,
        adapters: AdapterStore | None = None,
        queue: int = 256,
        steps: int = 4,
        ends: int = 16,
    ):
        for name, number in {"rows": rows, "chunk": chunk, "queue": queue, "steps": steps, "ends": ends}.items():
            if number < 1:
                raise ValueError(f"{name} must be a positive whole number, got {number}")
        self.length = _length(model.config, length)
        self.adapters, self._vocabulary = adapters, model.config.vocab_size
        params = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf), params)
        room = pages = None
        if adapters is not None:
            room = adapters.room
            params, pages = room.rows(params, rows), Pages(room, adapters.slots)
        self._programs = Programs(model, room, rows, self.length + chunk, steps)
        self._loop = Loop(self._programs, params, pages, rows, chunk, steps, ends)
        self._pages, self._rows, self._most, self._ends = pages, rows, queue, ends
        self._waiting: deque[Request] = deque()
        self._taken = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._started, self._closed, self._aborted, self._error = False, False, False, None

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        listen: Listener,
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
            seed: of what it draws, 0 to 2^32 - 1; by default one that is drawn anew for each request.
            ends: tokens that end it, at most as many as the engine has room for.
            logprobs: tell the logarithm of each token's probability, and those of that many likeliest tokens, 0 to 20.

        Raises:
            ValueError: for an argument out of range, and where prompt and `max_new_tokens` are longer than `length`.
            UnknownAdapter: where the store has no adapter of that name.
            QueueFull: where as many requests wait as may.
            Closed: where the engine is closed, being closed, or has failed.
        """
        seed = random.getrandbits(32) if seed is None else seed
        tokens, ends = tokens_of("prompt", prompt), tokens_of("ends", ends)
        if len(ends) > self._ends:
            raise ValueError(f"ends: wanted at most {self._ends} tokens, got {len(ends)}")
        asked = Asked(tokens, max_new_tokens, temperature, top_k, top_p, seed, ends, logprobs)
        if len(tokens) + max_new_tokens > self.length:
            raise ValueError(
                f"prompt: its {len(tokens)} tokens and max_new_tokens={max_new_tokens} are more than the {self.length} of a row"
            )
        if (largest := max(tokens)) >= self._vocabulary:
            raise ValueError(f"prompt: token {largest} is none of the {self._vocabulary} that the model knows")
        held = None if adapter is None else self._held(adapter)
        if held is not None and len(tokens) + max_new_tokens + held.virtual > self.length:
            raise ValueError(
                f"prompt: its {len(tokens)} tokens, max_new_tokens={max_new_tokens} and the {held.virtual} virtual tokens of "
                f"{adapter!r} are more than the {self.length} of a row"
            )
        with self._changed:
            self._check_open()
            if len(self._waiting) >= self._most:
                raise QueueFull(f"{len(self._waiting)} requests wait, as many as may")
            self._taken += 1
            request = Request(asked, adapter, held, listen, self._taken)
            self._waiting.append(request)
            self._changed.notify()
        return request

    def start(self) -> None:
        """Compiles the programs and starts the engine's thread. What was submitted before has waited.

        Raises:
            Closed: where it was started before, or closed.
        """
        with self._changed:
            self._check_open()
            if self._started:
                raise Closed("the engine was started before")
            self._started = True
        try:
            self._loop.warm()
        except BaseException as error:
            self._fail(error)
            raise
        self._thread = threading.Thread(target=self._run, name="jlora-engine", daemon=True)
        self._thread.start()

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Ends the engine; new requests are refused from now on. Returns when its thread has ended.

        Args:
            drain: finish the requests that run and wait; else they are cancelled.
            timeout: seconds after which those that are left are cancelled.
        """
        with self._changed:
            self._closed = True
            self._aborted = self._aborted or not drain
            self._changed.notify()
        if self._thread is None:
            return self._cancel_all()
        self._thread.join(timeout)
        self._aborted = True
        self._thread.join()

    def state(self) -> State:
        """The engine in numbers."""
        loop, counts = self._loop, self._loop.counts
        with self._changed:
            waiting, taken, opened = len(self._waiting), self._taken, not self._closed
        return State(
            rows=self._rows,
            running=loop.running,
            waiting=waiting,
            adapters=0 if self.adapters is None else len(self.adapters),
            resident=0 if self._pages is None else len(self._pages),
            requests=taken,
            finished=dict(loop.finished),
            prompt_tokens=counts["prompt_tokens"],
            tokens=counts["tokens"],
            steps=counts["steps"],
            chunks=counts["chunks"],
            swaps=counts["swaps"],
            loads=0 if self._pages is None else self._pages.loads,
            programs=self._programs.traced,
            open=opened,
            error=self._error,
        )

    def _held(self, adapter: str) -> Any:
        if self.adapters is None:
            raise UnknownAdapter(f"no adapter {adapter!r}: the engine has no store, it serves the base alone")
        return self.adapters.get(adapter)

    def _check_open(self) -> None:
        if self._error is not None:
            raise Closed(f"the engine has failed: {self._error}")
        if self._closed:
            raise Closed("the engine takes no more requests")

    def _run(self) -> None:
        try:
            while self._wait():
                if self._aborted:
                    self._cancel_all()
                self._drop_cancelled()
                self._loop.tick(self._take, self._coming)
        except BaseException as error:
            self._fail(error)

    def _wait(self) -> bool:
        """Returns when there is something to do; whether there will be more of it."""
        with self._changed:
            while not self._loop.busy and not self._waiting:
                if self._closed:
                    return False
                self._changed.wait()
        return True

    def _take(self) -> Request | None:
        with self._changed:
            return self._waiting.popleft() if self._waiting else None

    def _coming(self) -> list[Request]:
        with self._changed:
            return list(self._waiting)

    def _drop_cancelled(self) -> None:
        with self._changed:
            dropped = [request for request in self._waiting if request.cancelled]
            if dropped:
                self._waiting = deque(request for request in self._waiting if not request.cancelled)
        for request in dropped:
            self._loop.end(request, Finished("cancelled"))

    def _cancel_all(self) -> None:
        with self._changed:
            for request in [*self._waiting, *self._loop.left()]:
                request.cancel()
        self._drop_cancelled()

    def _fail(self, error: BaseException) -> None:
        """Ends all requests: one that is left would wait for ever."""
        _LOG.exception("the engine has failed")
        self._error = f"{type(error).__name__}: {error}"
        with self._changed:
            self._closed, waiting = True, list(self._waiting)
            self._waiting.clear()
        for request in [*self._loop.left(), *waiting]:
            self._loop.end(request, Finished("error", self._error))
        self._loop.clear()


def _length(config: Any, length: int | None) -> int:
    """The tokens of a row.

    Raises:
        ValueError: for more than the model reads in the same way whatever is beside it.
    """
    most, rope = config.max_position_embeddings, getattr(config, "rope", None)
    if rope is not None and rope.rope_type in ("dynamic", "longrope"):
        # Beyond it the rotation of all rows would be that of the longest.
        most = min(most, rope.original_length)
    length = min(2048, most) if length is None else length
    if not 2 <= length <= most:
        raise ValueError(f"length: wanted 2 to {most} tokens, as many as this model reads, got {length}")
    return length
