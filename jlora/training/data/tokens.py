"""A model's tokenizer, with what training needs to know of it: its ends, its padding, and that it fits the model."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from jlora.disk.json_files import read_object, shown


class Codec:
    """A tokenizer with its special tokens.

    Attributes:
        tokenizer: the `tokenizers.Tokenizer`.
        begin: id of the token that begins a text, or None.
        end: id of the token that ends a text, or None.
        added: ids of the tokens that stand for themselves, such as ends of texts and turns.
        directory: the model's directory.
    """

    def __init__(self, tokenizer: Tokenizer, config: Mapping[str, Any], directory: str | Path):
        """Args: tokenizer; the model's `config.json`; the model's directory, for its tokenizer_config.json."""
        self.tokenizer, self.directory = tokenizer, directory
        self._check(config)
        named = _named_tokens(directory)
        self.begin = self._id(config, named, "bos_token")
        self.end = self._id(config, named, "eos_token")
        self.added = sorted(tokenizer.get_added_tokens_decoder())

    def _check(self, config: Mapping[str, Any]) -> None:
        """Every special id of the config is a token; `load_tokenizer` has checked that every token has a row."""
        for name in ("bos_token_id", "eos_token_id"):
            for value in _as_list(config.get(name)):
                if type(value) is not int or not 0 <= value < 2**32 or self.tokenizer.id_to_token(value) is None:
                    raise ValueError(
                        f"{name} is {reprlib.repr(value)} in config.json of {self.directory}, but its tokenizer.json has "
                        "no such token: it is another model's"
                    )

    def _id(self, config: Mapping[str, Any], named: Mapping[str, str | None], name: str) -> int | None:
        """The id of a special token: by name in tokenizer_config.json, else by id in config.json."""
        if name not in named:
            return next(iter(_as_list(config.get(f"{name}_id"))), None)
        token = named[name]
        found = self.tokenizer.token_to_id(token) if token is not None else None
        if token is not None and found is None:
            raise ValueError(
                f"{name} is {token!r} in tokenizer_config.json of {self.directory}, but its tokenizer.json has no such "
                "token: it is another model's"
            )
        return found

    def encode_many(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids `[tokens]` and character offsets `[tokens, 2]` of each text, without special tokens."""
        encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [(np.array(e.ids, np.int32), np.array(e.offsets, np.int64).reshape(-1, 2)) for e in encodings]

    def encode_for_classification(
        self, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
    ) -> list[tuple[np.ndarray, np.ndarray, bool]]:
        """Ids and types `[tokens]` of each text (and its pair), with the special tokens, and whether `max_length` cut it."""
        self.tokenizer.enable_truncation(max_length)
        try:
            inputs = list(texts) if pairs is None else list(zip(texts, pairs))
            encodings = self.tokenizer.encode_batch(inputs, add_special_tokens=True)
        finally:
            self.tokenizer.no_truncation()
        return [(np.array(e.ids, np.int32), np.array(e.type_ids, np.int32), bool(e.overflowing)) for e in encodings]

    def prompt(self, text: str) -> list[int]:
        """Ids of a prompt to continue: the begin token, then the text."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids if text else []
        return ids if self.begin is None or ids[:1] == [self.begin] else [self.begin, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, without special tokens."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def _as_list(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _named_tokens(directory: str | Path) -> dict[str, str | None]:
    """The begin and end tokens as far as tokenizer_config.json speaks of them; None where it wants none."""
    path = Path(directory) / "tokenizer_config.json"
    config = read_object(path) if path.exists() else {}
    found: dict[str, str | None] = {}
    for name in ("bos_token", "eos_token"):
        token = config.get(name)
        if name == "bos_token" and config.get("add_bos_token") is False:
            found[name] = None
        elif name in config:
            found[name] = token.get("content") if isinstance(token, Mapping) else token
            if not isinstance(found[name], str | None):
                raise ValueError(f"{path}: {name} must be a text, got {shown(token)}")
    return found
