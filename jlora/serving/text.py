"""Tokens as they are written turned into text, and where a text ends: across the borders of tokens and of characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# A token in the middle of a character is shown so until the character is whole.
_PART_OF_CHARACTER = "�"
# A decoder may treat the first of its tokens in another way than the others, so some stand before those that count.
_CONTEXT = 8
_WINDOW = 64


class Text:
    """The text of tokens that come one after the other, told in pieces that are never taken back.

    A piece is told as soon as its characters are whole and no stop text can begin in it. The pieces together are the text up
    to the first stop text, which is left out. Only the last tokens are decoded again for each that comes, from the border of
    a character on, so that a long text costs no more for a token than a short one.

    Attributes:
        whole: all of the text that is known, told or held back; without the stop text.
        told: how many of its characters have been told.
        stopped: whether a stop text was found.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        """Args: text of ids; the ids that stand before the text; texts that end it, none of them empty."""
        self._decode, self._stop = decode, tuple(stop)
        self._ids, border = _context(decode, prompt)
        # Of the window: the characters that are known, and the places between tokens where a character ended.
        self._known, self._borders = decode(self._ids[:border]), [border]
        self.whole, self.told, self.stopped = "", 0, False

    def add(self, token: int) -> str:
        """The piece that is certain now that a token was written; often nothing."""
        self._ids.append(int(token))
        text = self._window()
        known = text.rstrip(_PART_OF_CHARACTER)
        if len(known) > len(self._known):
            self.whole += known[len(self._known) :]
            self._known = known
        if known == text:
            self._borders.append(len(self._ids))
            self._slide()
        return self._tell(self._held_back())

    def end(self) -> str:
        """The last piece, when no more tokens come."""
        if not self.stopped:
            text = self._window()
            self.whole += text[len(self._known) :]
            self._known = text
        return self._tell(0)

    def _window(self) -> str:
        text = self._decode(self._ids)
        if not text.startswith(self._known):
            # Bytes of no character: some decoders then take back the characters of the bytes before them.
            self._ids = self._ids[self._borders[-1] :]
            self._known, self._borders = "", [0]
            text = self._decode(self._ids)
        return text

    def _tell(self, held: int) -> str:
        cut = self._stopped_at()
        if cut is not None:
            self.whole, self.stopped, held = self.whole[:cut], True, 0
        start, self.told = self.told, max(self.told, len(self.whole) - held)
        return self.whole[start : self.told]

    def _stopped_at(self) -> int | None:
        """Where the first stop text begins; never in what has been told, since that could not begin one."""
        found = (self.whole.find(each, self.told) for each in self._stop)
        return min((place for place in found if place >= 0), default=None)

    def _held_back(self) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        return max((_begun(self.whole, each) for each in self._stop), default=0)

    def _slide(self) -> None:
        """Forgets tokens at the front of a long window, up to a border of characters."""
        if len(self._ids) <= _WINDOW:
            return
        keep = [border for border in self._borders if border <= len(self._ids) - _CONTEXT]
        if not keep or keep[-1] == 0:
            return
        cut = keep[-1]
        self._ids = self._ids[cut:]
        self._borders = [border - cut for border in self._borders if border >= cut]
        self._known = self._decode(self._ids)


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop text, but not the whole of it.

    Only places with its first character are looked at: trying all its beginnings for each token costs their length squared.
    """
    place = text.find(stop[0], max(len(text) - len(stop) + 1, 0))
    while place >= 0 and not stop.startswith(text[place:]):
        place = text.find(stop[0], place + 1)
    return 0 if place < 0 else len(text) - place


def _context(decode: Callable[[Sequence[int]], str], prompt: Sequence[int]) -> tuple[list[int], int]:
    """The last tokens of a prompt, from the border of a character on, and where in them the last whole character ends."""
    size = len(prompt)
    for start in range(max(size - _CONTEXT, 0), max(size - _CONTEXT - 4, -1), -1):
        for border in range(size, max(size - 4, start - 1), -1):
            if _PART_OF_CHARACTER not in decode(prompt[start:border]):
                return list(prompt[start:]), border - start
    return list(prompt[-_CONTEXT:]), min(size, _CONTEXT)


def whole_text(
    decode: Callable[[Sequence[int]], str], prompt: Sequence[int], tokens: Sequence[int], stop: Sequence[str] = ()
) -> str:
    """The text of tokens after a prompt, up to the first stop text."""
    text = Text(decode, prompt, stop)
    for token in tokens:
        text.add(token)
        if text.stopped:
            return text.whole
    text.end()
    return text.whole
