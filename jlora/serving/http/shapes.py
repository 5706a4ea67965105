"""Answers as OpenAI writes them in JSON, and as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from jlora.serving.http.answers import Chance, Piece
from jlora.serving.http.asked import Asked
from jlora.serving.http.voice import Voice


class Shape:
    """The answer to one call, whole or in pieces."""

    def __init__(self, asked: Asked, voice: Voice):
        kind = "chat.completion" if asked.chat else "text_completion"
        self._asked, self._voice = asked, voice
        self._piece_kind = f"{kind}.chunk" if asked.chat else kind
        self._head = {
            "id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": asked.entry.name,
        }

    def whole(self, answers: list[Piece], usage: dict[str, int]) -> dict[str, Any]:
        """The answer at once."""
        return self._head | {"choices": [self._choice(each) for each in answers], "usage": usage}

    def first(self, index: int) -> bytes:
        """The event before a chat's text, which says whose text it is; nothing for a completion."""
        if not self._asked.chat:
            return b""
        delta = {"role": "assistant", "content": ""}
        return self._event([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def piece(self, piece: Piece) -> bytes:
        """The event of a piece."""
        return self._event([self._choice(piece, part=True)])

    def last(self, usage: dict[str, int]) -> bytes:
        """The events after all text."""
        return (self._event([], usage) if self._asked.usage else b"") + event("[DONE]")

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        more = {"usage": usage} if self._asked.usage else {}
        return event(self._head | {"object": self._piece_kind, "choices": choices} | more)

    def _choice(self, piece: Piece, part: bool = False) -> dict[str, Any]:
        asked = self._asked.logprobs is not None and not (part and not piece.chances)
        if not self._asked.chat:
            text: dict[str, Any] = {"text": piece.text}
            logprobs = self._completion_logprobs(piece.chances) if asked else None
        else:
            text = {"message": {"role": "assistant", "content": piece.text, "refusal": None}}
            if part:
                text = {"delta": {"content": piece.text} if piece.text else {}}
            logprobs = {"content": [self._chat_logprob(each) for each in piece.chances]} if asked else None
        return {"index": piece.index, **text, "logprobs": logprobs, "finish_reason": piece.reason}

    def _completion_logprobs(self, chances: tuple[Chance, ...]) -> dict[str, Any]:
        return {
            "tokens": [self._name(each.id) for each in chances],
            "token_logprobs": [each.logprob for each in chances],
            "top_logprobs": [self._top(each) for each in chances],
            "text_offset": [each.start for each in chances],
        }

    def _top(self, chance: Chance) -> dict[str, float]:
        """The likeliest tokens by name, and the token itself, which need not be among them."""
        found: dict[str, float] = {}
        for id, logprob in chance.top:
            # A byte has the name of its character, if there is a token for that too: the likelier one is told.
            found.setdefault(self._name(id), logprob)
        return found | {self._name(chance.id): chance.logprob}

    def _chat_logprob(self, chance: Chance) -> dict[str, Any]:
        top = [self._told(id, logprob) for id, logprob in chance.top]
        return self._told(chance.id, chance.logprob) | {"top_logprobs": top}

    def _told(self, id: int, logprob: float) -> dict[str, Any]:
        text, raw = self._voice.token(id)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}

    def _name(self, id: int) -> str:
        """A token as text; one that is a part of a character by its bytes, so that two such are not told by one name."""
        text, raw = self._voice.token(id)
        return text if text.encode() == raw else "bytes:" + "".join(f"\\x{each:02x}" for each in raw)


def event(value: Any) -> bytes:
    """A server-sent event."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
