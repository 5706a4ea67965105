"""Rows of text as rows of tokens: what is read, what is predicted, and where the loss is taken."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from jlora.training.data import chat
from jlora.training.data.layouts import PREFERENCE, layout_of, normal
from jlora.training.data.messages import messages_of, variables_of
from jlora.training.data.rows import Row
from jlora.training.data.tokens import Codec
from jlora.training.errors import DataError, EmptyRow


@dataclasses.dataclass(frozen=True)
class Example:
    """One row of tokens for the model.

    Attributes:
        tokens: int32 `[length]`, what the model reads.
        targets: int32 `[length]`, the token after each of them; for classification, empty.
        weights: float32 `[length]`, 1 where the loss is taken; for classification, empty.
        types: int32 `[length]`, 0 for the first text and 1 for the second; for language models, empty.
        label: index of the label; for language models, -1.
        segments: int32 `[length]`, which of the rows packed into this one each token is of, from 1; 0 is padding.
        cut: whether the row was longer and its end is left out.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    types: np.ndarray
    label: int
    segments: np.ndarray
    cut: bool = False

    def __len__(self) -> int:
        return len(self.tokens)


def language_example(tokens: np.ndarray, wanted: np.ndarray) -> Example:
    """An example that predicts each of `tokens` from those before it, with the loss where `wanted` holds."""
    none = np.zeros(0, np.int32)
    ones = np.ones(len(tokens) - 1, np.int32)
    return Example(tokens[:-1], tokens[1:], wanted[1:].astype(np.float32), none, -1, ones)


def encode_language(
    rows: Sequence[Row],
    codec: Codec,
    template: Callable[[], chat.Template],
    text_column: str,
    max_length: int,
    long_rows: str | None = None,
    counts: collections.Counter[str] | None = None,
) -> list[Example]:
    """Rows in any layout of `jlora.training.data.layouts` as examples of at most `max_length` tokens.

    Args:
        rows: the rows.
        codec: the model's tokenizer.
        template: makes the template of chats, when the first one comes.
        text_column: the key of texts.
        max_length: tokens of an example.
        long_rows: what becomes of longer rows: `truncate` keeps the beginning, `split` makes pieces in which every token
            is predicted once, `drop` leaves them out. By default texts are split, and what has an answer is truncated.
            Pieces without a token of an answer are left out.
        counts: counts rows that did not become whole examples, by what became of them: `split`, `dropped`,
            `answerless` and `empty`; and as `preferences` those of which one answer is not used.

    Raises:
        DataError: for a row that cannot be used, naming file and line.
    """
    counts = collections.Counter() if counts is None else counts
    template = functools.cache(template)  # it is read and compiled once
    pieces = [found for row in rows if (found := _pieces(row, template, text_column, counts))]
    texts = ["".join(text for text, _ in segments) for segments, _ in pieces]
    examples: list[Example] = []
    for (segments, whole), text, (ids, offsets) in zip(pieces, texts, codec.encode_many(texts)):
        wanted = _wanted(segments, offsets)
        if whole:
            tokens, wanted = with_answer_end(codec, ids, wanted, offsets[:, 1] >= len(text.rstrip()))
        else:
            tokens, wanted = with_ends(codec, ids, wanted)
        usual = "split" if all(answer for _, answer in segments) else "truncate"
        examples += _fitted(tokens, wanted, max_length, long_rows or usual, counts)
    return [example for example in examples if len(example) > 0]


def _pieces(
    row: Row, template: Callable[[], chat.Template], text_column: str, counts: collections.Counter[str]
) -> tuple[chat.Segments, bool] | None:
    """The row's text in pieces, and whether that is all the model reads; None where there is nothing to learn."""
    counts["preferences"] += layout_of(row) is PREFERENCE
    try:
        row = normal(row, text_column)
        segments = _segments(row, template, text_column)
        "".join(text for text, _ in segments).encode()
    except EmptyRow:
        counts["empty"] += 1
        return None
    except UnicodeEncodeError as error:
        raise row.error(f"the text has half of a character, {error.object[error.start]!r}") from error
    return segments, "messages" in row.values and template().whole


def _segments(row: Row, template: Callable[[], chat.Template], text_column: str) -> chat.Segments:
    """The row's text in pieces, each with whether the loss is taken on it."""
    if "messages" in row.values:
        made = template()
        messages, more = messages_of(row, made.knows), variables_of(row)
        try:
            return made(messages, **more)
        except Exception as error:
            raise row.error(str(error)) from error
    if "prompt" in row.values or "completion" in row.values:
        return [(row.text("prompt"), False), (row.text("completion"), True)]
    return [(row.text(text_column), True)]


def _wanted(segments: chat.Segments, offsets: np.ndarray) -> np.ndarray:
    """Which tokens have a character in a piece with loss."""
    lasts = offsets[:, 1]
    firsts = np.minimum(offsets[:, 0], lasts - 1)  # offsets leave blanks out: of blanks alone they are empty
    wanted, start = np.zeros(len(offsets), bool), 0
    for text, answer in segments:
        end = start + len(text)
        if answer:
            wanted |= (lasts > start) & (firsts < end)
        start = end
    return wanted


def with_answer_end(
    codec: Codec, ids: np.ndarray, wanted: np.ndarray, last: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a template's text as they are, but for an end after a last answer that the template ends by no token.

    Without any the model would never learn to stop. `last` holds for tokens with nothing but blanks after them.
    """
    if codec.end is not None and wanted[-1:].any() and not np.isin(ids[last], codec.added).any():
        ids, wanted = np.append(ids, codec.end), np.append(wanted, True)
    return ids.astype(np.int32), wanted


def with_ends(codec: Codec, ids: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens with the begin and end tokens that the model has, where the text does not bring them itself."""
    tokens, flags = [ids], [wanted]
    if codec.begin is not None and not (len(ids) and ids[0] == codec.begin):
        tokens.insert(0, np.array([codec.begin]))
        flags.insert(0, np.array([False]))
    if codec.end is not None and not (len(ids) and ids[-1] == codec.end):
        tokens.append(np.array([codec.end]))
        flags.append(wanted[-1:] if len(wanted) else np.array([True]))
    return np.concatenate(tokens).astype(np.int32), np.concatenate(flags).astype(bool)


def _fitted(
    tokens: np.ndarray, wanted: np.ndarray, max_length: int, way: str, counts: collections.Counter[str]
) -> list[Example]:
    """The row as examples of at most `max_length` tokens, each with a token to learn."""
    long = len(tokens) > max_length + 1
    if long and way == "drop":
        counts["dropped"] += 1
        return []
    # Pieces overlap by one token, so that each token but the first is a target once.
    starts = range(0, max(len(tokens) - 1, 0), max_length)[: 1 if way == "truncate" else None]
    pieces = [language_example(tokens[i : i + max_length + 1], wanted[i : i + max_length + 1]) for i in starts]
    found = [dataclasses.replace(piece, cut=long and way == "truncate") for piece in pieces if piece.weights.any()]
    counts["answerless"] += bool(pieces) and not found
    counts["split"] += long and way == "split"
    return found


def label_names(rows: Iterable[Row], column: str) -> list[str]:
    """The labels that occur, in the order of their indices: numbers by value, other texts by alphabet.

    Raises:
        DataError: if a row has no label, or all rows have the same.
    """
    names = {_label(row, column) for row in rows}
    if len(names) < 2:
        raise DataError(
            next(iter(rows)).path, None, f"the column {column!r} has the one label {names.pop()!r}; wanted two or more"
        )
    numbers = all(name.lstrip("-").isdigit() for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if numbers else None)


def _label(row: Row, column: str) -> str:
    if column not in row.values:
        raise row.missing(column, "; name the one of the label by --label-column")
    value = row.values.get(column)
    return str(value) if isinstance(value, int) else row.text(column).strip()


def encode_classification(
    rows: Sequence[Row], codec: Codec, columns: tuple[str, str | None, str], labels: Mapping[str, int], max_length: int
) -> list[Example]:
    """Rows of a text, perhaps a second text, and a label, as examples cut at `max_length` tokens.

    Args:
        rows: the rows.
        codec: the model's tokenizer.
        columns: names of the text, the second text (or None) and the label.
        labels: label to index.
        max_length: tokens, the special ones included.

    Raises:
        DataError: for a row that cannot be used or whose label is unknown, naming file and line.
    """
    text, pair, column = columns
    for name, flag in ((text, "--text-column"), (pair, "--text-pair-column")):
        if name is not None and name not in rows[0].values:
            raise rows[0].missing(name, f"; name the one to read by {flag}")
    firsts = [row.text(text) for row in rows]
    seconds = [row.text(pair) for row in rows] if pair else None
    none, examples = np.zeros(0, np.int32), []
    for row, (ids, types, cut) in zip(rows, codec.encode_for_classification(firsts, seconds, max_length)):
        label = _label(row, column)
        if label not in labels:
            raise row.error(f"the label {label!r} does not occur in the training data")
        ones = np.ones(len(ids), np.int32)
        examples.append(Example(ids, none, none.astype(np.float32), types, labels[label], ones, cut))
    return examples
