"""What the API asks of whoever knows the model's words: tokens of texts and chats, and texts of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

Chat = Callable[[Sequence[dict[str, Any]]], list[int]]
"""The tokens of a chat up to the header that asks for an answer; a ValueError where the template refuses it."""


class Voice(Protocol):
    """The words of a model.

    Attributes:
        tokens: how many there are; ids are below.
        ends: ids that end a text.
        stop: texts that end it.
        temperature, top_k, top_p: how tokens are drawn where a call doesn't say; None for all tokens.
    """

    tokens: int
    ends: tuple[int, ...]
    stop: tuple[str, ...]
    temperature: float
    top_k: int | None
    top_p: float | None

    def prompt(self, text: str) -> list[int]:
        """The ids of a text to go on with."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        ...

    def token(self, id: int) -> tuple[str, bytes]:
        """One token as text and as bytes, special ones too."""
        ...

    def chat(self, folder: str | None) -> Chat | None:
        """How chats are written for the adapter in a folder, or for the base; None where no template is run.

        Raises:
            ValueError: for a template that is damaged.
        """
        ...
