"""`jlora data`: how rows are read, what of them is learned, and how long they are."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jlora.training.data.dataset import chat_template, encode, subset
from jlora.training.data.encode import Example, label_names
from jlora.training.data.formats.mixture import files_of
from jlora.training.data.layouts import layout_of
from jlora.training.data.pipeline import padded_length
from jlora.training.data.preferences.pairs import Pair
from jlora.training.data.rows import Row
from jlora.training.data.streaming.opening import open_rows, streams
from jlora.training.data.streaming.sources import DataRows
from jlora.training.data.tokens import Codec
from jlora.training.errors import SettingError
from jlora.training.model.subject import open_codec
from jlora.training.settings.fields import Settings

# Rows that are shown, rows whose lengths are looked at; characters of a row, and tokens, that are written out.
_SHOWN, _LOOKED_AT, _TEXT, _TOKENS = 3, 10_000, 2_000, 24
# Longer than any row.
_NO_LIMIT = 2**30
_BEGIN, _END = "«", "»"


def shown(settings: Settings) -> str:
    """The first rows of `settings.data` as they are read, and the lengths of all, in words.

    Args:
        settings: resolved, with a file.

    Raises:
        DataError: for a row that cannot be used, naming file and line.
        SettingError: without a file.
    """
    if settings.data is None:
        raise SettingError("data", "must be given: the file to look at")
    codec, config = open_codec(settings)
    rows = open_rows(settings, {}, streams(settings, {}, lambda text: None))
    labels = label_names(rows, settings.label_column) if settings.task == "classify" else []
    template = functools.cache(lambda: chat_template(settings, codec))
    # As they are, without cut, split or packed rows.
    whole = dataclasses.replace(settings, max_length=_NO_LIMIT, packing=None, long_rows=None)

    def read(rows: DataRows) -> list[Any]:
        return encode(rows, whole, codec, labels, collections.Counter(), template)

    parts = [f"{len(rows):,} rows of {', '.join(files_of(settings.data))}; {_layouts(rows)}"]
    parts += [_row(row, read([row]), codec, labels) for row in itertools.islice(rows, _SHOWN)]
    looked_at = subset(rows, _LOOKED_AT, settings.seed)
    parts.append(_lengths(read(looked_at), settings, config, len(looked_at) < len(rows)))
    if template.cache_info().currsize:
        made = template()
        parts.insert(1, "\n".join([f"chats are written by the template {made.name}", *made.notes]))
    return "\n\n".join(parts)


def _layouts(rows: DataRows) -> str:
    """How many rows there are of each layout."""
    kinds = collections.Counter("+".join(found.keys) if (found := layout_of(row)) else "" for row in rows)
    told = ", ".join(f"{count:,} of {kind or 'a text'}" for kind, count in kinds.items())
    return f"the first has {', '.join(map(repr, next(iter(rows)).values))}; layouts: {told}"


def _row(row: Row, examples: Sequence[Any], codec: Codec, labels: Sequence[str]) -> str:
    lines = [f"{row.path}:{row.line}"]
    for example in examples:
        if isinstance(example, Pair):
            titles = ("chosen", "rejected") if example.desirable < 0 else ("good" if example.desirable else "bad",)
            sides = zip(titles, (example.first, example.second))
            lines += [line for title, side in sides for line in _side(side, codec, f"{title}: ")]
        elif example.label >= 0:
            lines.append(f"label: {labels[example.label]}")
            lines += _tokens(codec, example.tokens, len(example), 0)
        else:
            lines += _side(example, codec, "")
    return "\n".join(lines)


def _side(example: Example, codec: Codec, title: str) -> list[str]:
    """The text of a row of tokens with what is learned between marks, and its tokens."""
    tokens = np.append(example.tokens, example.targets[-1])
    learned = np.append(False, example.weights > 0)
    text = marked(codec, tokens, learned)
    text = text if len(text) <= _TEXT else f"{text[: _TEXT // 2]} […] {text[-_TEXT // 2 :]}"
    return [title + text, *_tokens(codec, tokens, len(tokens), int(learned.sum()))]


def marked(codec: Codec, tokens: np.ndarray, learned: np.ndarray) -> str:
    """The text of tokens, special ones too, with « and » around what is learned."""
    borders = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(tokens)]
    # Differences of decoded beginnings: a decoder may leave out the blank that a piece begins with.
    texts = [codec.tokenizer.decode(tokens[:end].tolist(), skip_special_tokens=False) for end in borders]
    pieces = []
    for (start, before), (_, after) in zip(zip(borders, texts), zip(borders[1:], texts[1:])):
        piece = after[len(before) :]
        pieces.append(f"{_BEGIN}{piece}{_END}" if start < len(tokens) and learned[start] else piece)
    return "".join(pieces)


def _tokens(codec: Codec, tokens: np.ndarray, count: int, learned: int) -> list[str]:
    names = [str(codec.tokenizer.id_to_token(int(each))) for each in tokens[:_TOKENS]]
    rest = f" … {count - _TOKENS:,} more" if count > _TOKENS else ""
    of_them = f", {learned:,} of them learned" if learned else ""
    return [f"{count:,} tokens{of_them}: {' '.join(names)}{rest}"]


def _lengths(examples: Sequence[Any], settings: Settings, config: dict[str, Any], some: bool) -> str:
    """Quantiles of the lengths, what `--max-length` does to the rows, and what it might be."""
    lengths = np.sort([len(example) for example in examples])
    names = {"shortest": 0, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1}
    told = ", ".join(f"{name} {int(np.quantile(lengths, q, method='higher')):,}" for name, q in names.items())
    assert settings.max_length is not None
    over = int(np.sum(lengths > settings.max_length))
    lines = [f"lengths in tokens{f' of {len(lengths):,} rows' if some else ''}: {told}"]
    lines.append(
        f"--max-length {settings.max_length}: {over:,} of {len(lengths):,} rows are longer"
        + (" (--long-rows truncate, drop or split says what becomes of them)" if over else "")
    )
    lines.append(_proposal(lengths, config))
    return "\n".join(lines)


def _proposal(lengths: np.ndarray, config: dict[str, Any]) -> str:
    """A length that 99 rows of 100 have at most, as rows are padded, within the model's positions."""
    wanted = int(np.quantile(lengths, 0.99, method="higher"))
    positions = config.get("max_position_embeddings") or wanted
    proposed = min(padded_length(max(wanted, 2), _NO_LIMIT), positions)
    whole = int(np.sum(lengths <= proposed))
    return f"proposal: --max-length {proposed}, which holds {whole:,} of {len(lengths):,} rows whole"
