"""A request to an engine: what was asked, what is told of it, and the reasons for which one is refused."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jlora.models.generate import Sampling

#: Likeliest tokens whose logarithms of probabilities a request may ask for.
TOP = 20


class UnknownAdapter(LookupError):
    """There is no adapter of that name in the store."""


class QueueFull(RuntimeError):
    """As many requests wait as the engine lets wait."""


class Closed(RuntimeError):
    """The engine takes no more requests: it is being closed, is closed, or has failed."""


@dataclass(frozen=True)
class Token:
    """A token that was written.

    Attributes:
        id: the token.
        logprob: logarithm of its probability under the model, before temperature, top_k and top_p; None where the request
            didn't ask.
        top: the likeliest tokens with theirs, likeliest first, as many as the request asked for.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of a request.

    Attributes:
        reason: "stop" (an end token, which is not told as a `Token`), "length", "cancelled" or "error".
        error: what went wrong, where the reason is "error".
    """

    reason: str
    error: str | None = None


Listener = Callable[[Token | Finished], None]


@dataclass(frozen=True)
class Asked:
    """What a request asks for; see `Engine.submit`.

    Raises:
        ValueError: for what is out of range.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    ends: tuple[int, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        # What doesn't fit into the rows' arrays would end the engine, and all that it answers.
        for name in ("max_new_tokens", "top_k", "seed", "logprobs"):
            _check_whole(name, getattr(self, name))
        Sampling(self.temperature, self.top_k, self.top_p)
        if not self.prompt:
            raise ValueError("prompt: wanted at least one token; begin an empty one with the BOS token")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: wanted 1 or more, got {self.max_new_tokens}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: wanted a whole number from 0 to 2^32 - 1, got {self.seed}")
        if self.logprobs is not None and not 0 <= self.logprobs <= TOP:
            raise ValueError(f"logprobs: wanted a number from 0 to {TOP} (None for none), got {self.logprobs}")


@dataclass(eq=False)
class Request:
    """A request that an engine has taken.

    Attributes:
        asked: what it asks for.
        adapter: the name of its adapter; None for the base.
        held: the adapter's arrays, as they were when it was taken.
        listen: what is told of its tokens and its end.
        number: its place among all requests.
        cancelled: whether it is to end.
        finished: its end, where it has ended.
    """

    asked: Asked
    adapter: str | None
    held: Any
    listen: Listener = field(repr=False)
    number: int
    cancelled: bool = False
    finished: Finished | None = None

    def cancel(self) -> None:
        """Ends the request: its row is free at the next step, and `Finished("cancelled")` is told, unless it had ended."""
        self.cancelled = True


@dataclass(frozen=True)
class State:
    """An engine in numbers, for a page of metrics.

    Attributes:
        rows: requests that can run at once.
        running: requests in rows, those included whose prompt is being read.
        waiting: requests in the queue.
        adapters: adapters in the store, in host memory.
        resident: of these, how many have arrays on the device, ready to be written into a row.
        requests: requests that were taken.
        finished: requests that have ended, by reason.
        prompt_tokens: tokens of prompts that were read.
        tokens: tokens that were told.
        steps: decoding steps of all rows.
        chunks: chunks of prompts that were read.
        swaps: adapters that were written into a row.
        loads: adapters that were moved from host memory to the device.
        programs: programs that were compiled; stays the same after `start`.
        open: whether new requests are taken.
        error: what the engine died of; None while it lives.
    """

    rows: int
    running: int
    waiting: int
    adapters: int
    resident: int
    requests: int
    finished: dict[str, int]
    prompt_tokens: int
    tokens: int
    steps: int
    chunks: int
    swaps: int
    loads: int
    programs: int
    open: bool
    error: str | None


def tokens_of(name: str, tokens: Sequence[int]) -> tuple[int, ...]:
    """Tokens as Python's whole numbers.

    Raises:
        ValueError: for one that is none, negative, or 2^31 and more.
    """
    found = tuple(int(token) for token in tokens)
    if any(not 0 <= token < 2**31 or token != given for token, given in zip(found, tokens, strict=True)):
        raise ValueError(f"{name}: wanted token ids, whole numbers from 0 and below 2^31, got {list(tokens)}")
    return found


def _check_whole(name: str, value: Any) -> None:
    try:
        operator.index(0 if value is None else value)
    except TypeError:
        raise ValueError(f"{name}: wanted a whole number, got {value!r}") from None
