"""What an engine's thread does: rows are given out, prompts are read in chunks between decoding steps, tokens are told."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jlora.core.tree.adapted import Adapted
from jlora.serving.drawing import Ways
from jlora.serving.pages import Pages
from jlora.serving.programs import LAST, NOTHING, STOP, UNSOUND, Programs, Told
from jlora.serving.request import Finished, Request, Token
from jlora.serving.room import Held

_LOG = logging.getLogger("jlora.serving")
_ENDS = {
    LAST: Finished("length"),
    STOP: Finished("stop"),
    UNSOUND: Finished("error", "the model's logits are not finite"),
}


@dataclass(eq=False)
class Row:
    """A request in its row.

    Attributes:
        request: the request.
        read: how many tokens of its prompt were given to the device.
        drawn: how many tokens it will have drawn, at most, after what was given to the device.
    """

    request: Request
    read: int = 0
    drawn: int = 0

    @property
    def virtual(self) -> int:
        """Tokens that its adapter puts in front of its text."""
        return 0 if self.request.held is None else self.request.held.virtual

    @property
    def reading(self) -> bool:
        """Whether its prompt is not wholly read."""
        return self.read < len(self.request.asked.prompt)

    @property
    def decoding(self) -> bool:
        """Whether more of its tokens are to be drawn."""
        return not self.reading and self.drawn < self.request.asked.max_new_tokens


@dataclass
class Results:
    """What a program that was given to the device will tell: `told`, of the requests in some rows at that time."""

    told: Told
    requests: Sequence[tuple[int, Request]]


class Loop:
    """The rows, from the host's side. Only the engine's thread changes it.

    Attributes:
        counts: how often things happened: "steps", "chunks", "swaps", "prompt_tokens", "tokens".
        finished: how many requests have ended, by reason.
    """

    def __init__(
        self, programs: Programs, params: Any, pages: Pages | None, rows: int, chunk: int, steps: int, ends: int
    ):
        """Args: the programs; the base, or the adapters of rows on it; adapters on the device; and as for `Engine`."""
        self._programs, self._pages, self._chunk, self._steps = programs, pages, chunk, steps
        self._params = params
        self._device = programs.empty(params.base if isinstance(params, Adapted) else params)
        self._rows: list[Row | None] = [None] * rows
        self._written: list[Held | None] = [None] * rows
        self._ways, self._sent = Ways.empty(rows, ends), None
        self._pending: deque[Results] = deque()
        self.counts: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()

    @property
    def busy(self) -> bool:
        """Whether any row has a request, or anything is to be told."""
        return bool(self._pending) or any(self._rows)

    @property
    def running(self) -> int:
        """How many rows have a request."""
        return sum(row is not None for row in self._rows)

    def warm(self) -> None:
        """Compiles all programs, on rows in which nothing is."""
        if self._pages is not None:
            self._write(0, None)
            if (blank := self._programs.blank(self._device)) is not None:
                self._device = self._programs.lay(self._device, 0, blank, 0)
        self._device, _ = self._read(0, np.zeros(self._chunk, np.int32), 0, 1, False)
        self._device, _ = self._programs.decode(self._params, self._device, self._on_device())
        jax.block_until_ready(self._device)

    def tick(self, take: Callable[[], Request | None], coming: Callable[[], Sequence[Request]]) -> None:
        """Gives the device its next work, and tells what the work before it has given.

        Args:
            take: the next request that waits, taken out of the queue.
            coming: those that wait, the next one first.
        """
        before = len(self._pending)
        self._drop_cancelled()
        self._admit(take)
        self._read_prompts()
        self._decode()
        if self._pages is not None:
            # The transfer goes on while the device works and the host waits for it.
            self._pages.prefetch(request.held for request in coming() if request.held is not None)
        # What was given just now is told in the next turn, so that the device has work while the host tells.
        given = len(self._pending) > before
        for _ in range(before if given else len(self._pending)):
            self._tell(self._pending.popleft())

    def end(self, request: Request, how: Finished) -> None:
        """Tells a request its end, once."""
        if request.finished is None:
            request.finished = how
            self.finished[how.reason] += 1
            self._say(request, how)

    def left(self) -> list[Request]:
        """The requests that are in rows."""
        return [row.request for row in self._rows if row is not None]

    def clear(self) -> None:
        """Forgets what is in rows, and what would be told."""
        self._rows = [None] * len(self._rows)
        self._pending.clear()

    def _drop_cancelled(self) -> None:
        for at, row in enumerate(self._rows):
            if row is not None and row.request.cancelled:
                self._free(at)
                self.end(row.request, Finished("cancelled"))

    def _free(self, at: int) -> None:
        self._rows[at] = None
        self._ways.drop(at)
        self._sent = None

    def _admit(self, take: Callable[[], Request | None]) -> None:
        while free := [at for at, row in enumerate(self._rows) if row is None]:
            if (request := take()) is None:
                return
            at = next((at for at in free if self._written[at] is request.held), free[0])
            self._rows[at] = Row(request)  # first, so that it is told if what follows fails
            if self._pages is not None and self._written[at] is not request.held:
                self._write(at, request.held)
                self.counts["swaps"] += 1
            if virtual := self._rows[at].virtual:  # type: ignore[union-attr]
                assert self._pages is not None
                self._device = self._programs.lay(self._device, at, self._pages.get(request.held), virtual)
            self._ways.take(at, request.asked)
            self._sent = None

    def _write(self, at: int, held: Held | None) -> None:
        assert self._pages is not None and isinstance(self._params, Adapted)
        self._params = self._programs.write(self._params, at, self._pages.get(held))
        self._written[at] = held

    def _read_prompts(self) -> None:
        """The next chunks of prompts, oldest first: at most as many as there are decoding steps after them."""
        reading = [(at, row) for at, row in enumerate(self._rows) if row is not None and row.reading]
        budget = self._steps
        for at, row in sorted(reading, key=lambda pair: pair[1].request.number):
            while budget and row.reading:
                budget -= 1
                self._read_chunk(at, row)

    def _read_chunk(self, at: int, row: Row) -> None:
        prompt = row.request.asked.prompt
        part = prompt[row.read : row.read + self._chunk]
        tokens = np.zeros(self._chunk, np.int32)
        tokens[: len(part)] = part
        start, row.read = row.virtual + row.read, row.read + len(part)
        if not row.reading:
            self._ways.alive[at], self._sent, row.drawn = True, None, 1
        self._device, told = self._read(at, tokens, start, len(part), not row.reading)
        self.counts["chunks"] += 1
        self.counts["prompt_tokens"] += len(part)
        # What tells nothing is waited for too, so that the host is never more than a turn ahead.
        self._pending.append(Results(told, [] if row.reading else [(0, row.request)]))

    def _read(self, at: int, tokens: np.ndarray, start: int, count: int, last: bool) -> tuple[Any, Told]:
        numbers = np.int32(at), tokens, np.int32(start), np.int32(count), np.bool_(last)
        return self._programs.read(self._params, self._device, self._on_device(), *numbers)

    def _decode(self) -> None:
        rows = [(at, row) for at, row in enumerate(self._rows) if row is not None and row.decoding]
        if not rows:
            return
        self._device, told = self._programs.decode(self._params, self._device, self._on_device())
        self.counts["steps"] += self._steps
        for _, row in rows:
            row.drawn += self._steps
        self._pending.append(Results(told, [(at, row.request) for at, row in rows]))

    def _on_device(self) -> Ways:
        if self._sent is None:
            # A copy: what is sent may be read later than the host changes it.
            self._sent = jax.device_put(Ways(*(array.copy() for array in self._ways)))
        return self._sent

    def _tell(self, results: Results) -> None:
        told = results.told
        rows = [(at, request) for at, request in results.requests if request.finished is None]
        events, tokens = (np.atleast_2d(each) for each in jax.device_get((told.event, told.drawn.token)))
        wanted = any(request.asked.logprobs is not None for _, request in rows)
        scores = jax.device_get(told.drawn) if wanted else None
        for at, request in rows:
            for step in range(len(events)):
                event = int(events[step, at])
                if event == NOTHING or request.finished is not None:
                    break
                if event not in (STOP, UNSOUND):
                    self._tell_token(request, _token(request, int(tokens[step, at]), scores, step, at))
                if event in _ENDS:
                    self._release(request)
                    self.end(request, _ENDS[event])

    def _tell_token(self, request: Request, token: Token) -> None:
        self.counts["tokens"] += 1
        self._say(request, token)

    def _release(self, request: Request) -> None:
        for at, row in enumerate(self._rows):
            if row is not None and row.request is request:
                self._free(at)

    def _say(self, request: Request, what: Token | Finished) -> None:
        try:
            request.listen(what)
        except Exception:
            _LOG.exception("a listener failed; its request is cancelled")
            request.cancelled = True


def _token(request: Request, token: int, scores: Any, step: int, at: int) -> Token:
    most = request.asked.logprobs
    if most is None:
        return Token(token)
    where = (at,) if scores.token.ndim == 1 else (step, at)
    pairs = zip(scores.top[where][:most].tolist(), scores.top_logprob[where][:most].tolist(), strict=True)
    return Token(token, float(scores.logprob[where]), tuple(pairs))
