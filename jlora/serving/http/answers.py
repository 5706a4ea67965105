"""The requests of one call on their way: from the engine's thread to pieces of text, and cancelled with the call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from jlora.serving.engine import Engine
from jlora.serving.http.asked import Asked
from jlora.serving.http.refusals import Refused, bad
from jlora.serving.http.voice import Voice
from jlora.serving.request import Closed, Finished, QueueFull, Request, Token, UnknownAdapter
from jlora.serving.text import Text

_RETRY = {"Retry-After": "1"}


@dataclass(frozen=True)
class Chance:
    """A token and its probability.

    Attributes:
        id: the token.
        logprob: the logarithm of its probability.
        top: the likeliest tokens at its place with theirs.
        start: where its text begins in the answer, in characters.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    start: int


@dataclass(frozen=True)
class Piece:
    """A piece of an answer.

    Attributes:
        index: which of the call's answers.
        text: what is new; may be empty.
        chances: of the tokens whose text it tells.
        reason: why the answer ends with it, "stop" or "length"; None where it goes on.
    """

    index: int
    text: str
    chances: tuple[Chance, ...] = ()
    reason: str | None = None


class Failed(Exception):
    """The engine failed while it wrote an answer."""


@dataclass
class _Answer:
    """One answer: its text, and the tokens whose text has not been told."""

    index: int
    text: Text
    logprobs: bool
    request: Request | None = None
    written: int = 0
    ended: bool = False
    waiting: list[Chance] = field(default_factory=list)

    def add(self, event: Token | Finished) -> Piece | None:
        """What is new by an event of the engine, None for nothing.

        Raises:
            Failed: where the engine gave the answer up.
        """
        if isinstance(event, Finished):
            return self._end(event)
        self.written += 1
        start = len(self.text.whole)
        piece = self.text.add(event.id)
        if self.logprobs and event.logprob is not None:
            self.waiting.append(Chance(event.id, event.logprob, event.top, start))
        if self.text.stopped:
            self.ended = True
            if self.request is not None:
                self.request.cancel()
            return Piece(self.index, piece, self._told(False), "stop")
        chances = self._told(False)
        return Piece(self.index, piece, chances) if piece or chances else None

    def _end(self, event: Finished) -> Piece:
        self.ended = True
        if event.reason not in ("stop", "length"):
            raise Failed(event.error or f"the engine gave the answer up ({event.reason})")
        piece = self.text.end()
        # The last characters may hold the whole of a stop text that bytes of no character kept back.
        reason = "stop" if self.text.stopped else event.reason
        return Piece(self.index, piece, self._told(not self.text.stopped), reason)

    def _told(self, all_of_them: bool) -> tuple[Chance, ...]:
        """The tokens whose text has been told, in part at least; those of a stop text never are."""
        found = [chance for chance in self.waiting if all_of_them or chance.start < self.text.told]
        self.waiting = self.waiting[len(found) :]
        return tuple(found)


class Answers:
    """The answers of one call, all of them asked for at once; `cancel` must be called at its end, whatever that was."""

    def __init__(self, engine: Engine, voice: Voice, asked: Asked, count: Callable[[int], None]):
        """Submits the requests. To be called in the thread of the event loop.

        Args:
            engine: who answers.
            voice: the model's words.
            asked: what the call asks for.
            count: is told of every token that is written.

        Raises:
            Refused: where the engine refuses one of them; then none is left.
        """
        self.asked, self._count = asked, count
        self._events: asyncio.Queue[tuple[int, Token | Finished]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        prompts = [(prompt, room) for prompt, room in zip(asked.prompts, asked.max_new_tokens) for _ in range(asked.n)]
        self._answers = [
            _Answer(index, Text(voice.decode, prompt, asked.stop), asked.logprobs is not None)
            for index, (prompt, _) in enumerate(prompts)
        ]
        try:
            for answer, (prompt, room) in zip(self._answers, prompts):
                answer.request = self._submit(engine, voice, answer.index, prompt, room)
        except BaseException:
            self.cancel()
            raise

    def _submit(self, engine: Engine, voice: Voice, index: int, prompt: list[int], room: int) -> Request:
        asked = self.asked

        def listen(event: Token | Finished) -> None:
            # In the engine's thread; where the loop is closed this raises, and the engine cancels the request.
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        try:
            return engine.submit(
                prompt,
                adapter=asked.entry.adapter,
                max_new_tokens=room,
                temperature=asked.temperature,
                top_k=asked.top_k,
                top_p=asked.top_p,
                seed=None if asked.seed is None else asked.seed + index,
                ends=voice.ends,
                logprobs=asked.logprobs,
                listen=listen,
            )
        except UnknownAdapter as error:
            raise Refused(404, f"there is no model {asked.entry.name!r}", "model_not_found", "model") from error
        except QueueFull as error:
            message = f"as many requests wait as this server lets wait ({error}): ask again later"
            raise Refused(429, message, "queue_full", headers=_RETRY) from error
        except Closed as error:
            raise Refused(503, f"the server takes no more requests: {error}", "closed", headers=_RETRY) from error
        except ValueError as error:
            raise bad(None, str(error)) from error

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces of all answers as they are written.

        Raises:
            Failed: where the engine fails.
        """
        left = len(self._answers)
        while left:
            index, event = await self._events.get()
            answer = self._answers[index]
            if answer.ended:
                continue  # what was written after a stop text, and its end
            if isinstance(event, Token):
                self._count(1)
            piece = answer.add(event)
            if piece is not None:
                yield piece
            left -= answer.ended

    def cancel(self) -> None:
        """Ends what is still being written."""
        for answer in self._answers:
            if answer.request is not None:
                answer.request.cancel()

    def usage(self) -> dict[str, int]:
        """The numbers of tokens, each prompt counted once."""
        prompt, written = sum(map(len, self.asked.prompts)), sum(answer.written for answer in self._answers)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def joined(index: int, pieces: list[Piece]) -> Piece:
    """The whole of an answer."""
    mine: list[Any] = [piece for piece in pieces if piece.index == index]
    text, chances = "".join(piece.text for piece in mine), tuple(each for piece in mine for each in piece.chances)
    return Piece(index, text, chances, mine[-1].reason)
