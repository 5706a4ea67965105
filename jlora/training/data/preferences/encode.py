"""Rows of preferences as pairs of rows of tokens."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jlora.training.data import chat
from jlora.training.data.encode import Example, language_example, with_answer_end, with_ends
from jlora.training.data.layouts import normal
from jlora.training.data.messages import messages_of, variables_of
from jlora.training.data.preferences.answers import Answered, judged_of, pair_of, with_messages
from jlora.training.data.preferences.pairs import Pair
from jlora.training.data.rows import Row
from jlora.training.data.tokens import Codec
from jlora.training.errors import EmptyRow

Make = Callable[[], chat.Template]


class _Texts(NamedTuple):
    """The text of a prompt, those of it with each answer, and whether these are all that the model reads."""

    prompt: str
    wholes: list[str]
    whole: bool
    desirable: bool | None


def encode_preferences(
    rows: Sequence[Row],
    codec: Codec,
    template: Make,
    max_length: int,
    judged_by: str | None = None,
    drop: bool = False,
    counts: collections.Counter[str] | None = None,
) -> list[Pair]:
    """Rows of preferences as pairs whose rows have at most `max_length` tokens.

    An answer begins where the tokens of the prompt alone, with the header that asks for an answer, and those of the whole are
    no longer the same; in both rows at the same place. All tokens from there on are the answer's.

    Args:
        rows: the rows.
        codec: the model's tokenizer.
        template: makes the template of chats, when the first one comes.
        max_length: tokens of a row.
        judged_by: the key of the label, where answers are good or bad each by itself; by default they come in pairs.
        drop: whether pairs with a longer row are left out; by default the end of a longer row is.
        counts: counts rows that are left out, by the reason: `dropped`, `answerless`, `empty` and `same`.

    Raises:
        DataError: for a row that cannot be used, naming file and line.
    """
    counts = collections.Counter() if counts is None else counts
    template = functools.cache(template)
    found = [texts for row in rows for texts in _texts(row, template, judged_by, counts)]
    encoded = iter(codec.encode_many([text for texts in found for text in (texts.prompt, *texts.wholes)]))
    pairs = []
    for texts in found:
        prompt = next(encoded)[0]
        sides = [next(encoded) for _ in texts.wholes]
        start = min(_common(prompt, ids) for ids, _ in sides)
        made = [_side(codec, texts, n, *side, start, max_length) for n, side in enumerate(sides)]
        if (why := _refused(made, drop)) is not None:
            counts[why] += 1
            continue
        pairs.append(Pair(made[0], made[-1], -1 if texts.desirable is None else int(texts.desirable)))
    return pairs


def _texts(row: Row, template: Make, judged_by: str | None, counts: collections.Counter[str]) -> list[_Texts]:
    try:
        found = [pair_of(row)] if judged_by is None else judged_of(row, judged_by)
        return [_written(row, answered, template) for answered in found]
    except EmptyRow:
        counts["empty"] += 1
        return []


def _written(row: Row, answered: Answered, template: Make) -> _Texts:
    prompt, answers, desirable = answered
    if isinstance(prompt, str):
        found = _Texts(prompt, [prompt + answer for answer in answers], False, desirable)
    else:
        made, chats = template(), [normal(with_messages(row, [*prompt, *answer]), "text") for answer in answers]
        messages, more = [messages_of(chat, made.knows) for chat in chats], variables_of(row)
        try:
            head = made.render(messages[0][: len(prompt)], prompt=True, **more)
            found = _Texts(head, [made.checked(each, **more) for each in messages], made.whole, desirable)
        except Exception as error:
            raise row.error(str(error)) from error
    try:
        "".join(found.wholes).encode()
    except UnicodeEncodeError as error:
        raise row.error(f"the text has half of a character, {error.object[error.start]!r}") from error
    return found


def _common(prompt: np.ndarray, ids: np.ndarray) -> int:
    """How many tokens both begin with."""
    size = min(len(prompt), len(ids))
    other = np.flatnonzero(prompt[:size] != ids[:size])
    return int(other[0]) if len(other) else size


def _side(
    codec: Codec, texts: _Texts, number: int, ids: np.ndarray, offsets: np.ndarray, start: int, max_length: int
) -> Example:
    """A row that predicts the tokens of one answer, cut at its end where it is too long."""
    wanted = np.arange(len(ids)) >= start
    if texts.whole:
        last = offsets[:, 1] >= len(texts.wholes[number].rstrip())
        tokens, wanted = with_answer_end(codec, ids, wanted, last)
    else:
        tokens, wanted = with_ends(codec, ids, wanted)
    made = language_example(tokens[: max_length + 1], wanted[: max_length + 1])
    return dataclasses.replace(made, cut=len(tokens) > max_length + 1)


def _refused(made: Sequence[Example], drop: bool) -> str | None:
    """Why nothing can be learned from these rows, or None."""
    if drop and any(example.cut for example in made):
        return "dropped"
    if not all(example.weights.any() for example in made):
        return "answerless"
    if len(made) > 1 and np.array_equal(made[0].tokens, made[1].tokens) and made[0].targets[-1] == made[1].targets[-1]:
        return "same"
    return None
