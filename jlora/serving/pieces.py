"""Single tokens as text and as bytes, those too that are a part of a character."""

from __future__ import annotations

from tokenizers import Tokenizer


class Pieces:
    """The tokens of a tokenizer, one by one, as text and as bytes."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        # Decoders take the space of a text's first token away: so a token is decoded behind another.
        self._before = tokenizer.encode("a", add_special_tokens=False).ids[-1:]
        self._start = self._decode([])

    def of(self, id: int) -> tuple[str, bytes]:
        """A token as text and bytes; one that is a part of a character has � as its text."""
        token = self._tokenizer.id_to_token(id)
        if token is None or id in self._special:
            text = token or ""
            return text, text.encode()
        text = self._decode([id]).removeprefix(self._start)
        if "�" not in text:
            return text, text.encode()
        return text, _raw(token) or text.encode()

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode([*self._before, *ids], skip_special_tokens=True)


def _raw(token: str) -> bytes | None:
    """The bytes of a token that is no whole character: `<0xE4>`, or GPT-2's letters for bytes."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    try:
        return bytes(_LETTERS[letter] for letter in token)
    except KeyError:
        return None


def _letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others for those from 256 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [each for each in range(256) if each not in printable]
    return {chr(each): each for each in printable} | {chr(256 + n): each for n, each in enumerate(others)}


_LETTERS = _letters()
