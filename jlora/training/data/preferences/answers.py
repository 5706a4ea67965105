"""A row of preferences as a prompt with its answers.

Pairs are rows of `chosen` and `rejected`, texts or lists of messages, with a `prompt` beside them, or with what both begin with
as their prompt. Answers that are good or bad each by itself are rows of `prompt`, `completion` and a label.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from jlora.training.data.layouts import spoken, system_turns, turns
from jlora.training.data.rows import Row
from jlora.training.errors import EmptyRow

_PAIR = '{"prompt": "…", "chosen": "…", "rejected": "…"}'
_JUDGED = '{"prompt": "…", "completion": "…", "label": true}'
# What a label may be, and numbers that equal these; CSV files have texts alone.
_LABELS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


class Answered(NamedTuple):
    """A prompt with its answers.

    Attributes:
        prompt: a text, or the messages before the answers.
        answers: texts that follow on the prompt, or messages.
        desirable: for an answer by itself whether it is good; None for a pair, the better one first.
    """

    prompt: Any
    answers: list[Any]
    desirable: bool | None = None


def pair_of(row: Row) -> Answered:
    """The row's `chosen` and `rejected` after their prompt.

    Raises:
        EmptyRow: a DataError, for a text that is empty.
        DataError: for a row that is no pair, and one without a prompt.
    """
    for key in ("chosen", "rejected"):
        if key not in row.values:
            hint = "; rows with a label are for --preference-loss kto" if "completion" in row.values else ""
            raise row.missing(key, f"; --task preference reads rows like {_PAIR}, texts or lists of messages{hint}")
    prompt = row.values.get("prompt", row.values.get("conversations"))
    answers = [row.values[key] for key in ("chosen", "rejected")]
    if (prompt is None or isinstance(prompt, str)) and all(isinstance(answer, str) for answer in answers):
        return _texts(row, prompt)
    return _chats(row, prompt, [turns(answer, "assistant") for answer in answers])


def judged_of(row: Row, label_column: str) -> list[Answered]:
    """The row's `completion` after its `prompt`, with its label; of a pair both answers, the chosen one as the good one.

    Raises:
        EmptyRow: a DataError, for a text that is empty.
        DataError: for a row that has not all of them, and a label that says neither yes nor no.
    """
    if "chosen" in row.values and "rejected" in row.values:
        pair = pair_of(row)
        return [Answered(pair.prompt, [answer], good) for answer, good in zip(pair.answers, (True, False))]
    for key in ("prompt", "completion", label_column):
        if key not in row.values:
            raise row.missing(key, f"; --preference-loss kto reads rows like {_JUDGED}, or {_PAIR}")
    prompt, completion, label = (row.values[key] for key in ("prompt", "completion", label_column))
    label = label.strip().lower() if isinstance(label, str) else label
    if not isinstance(label, bool | int | float | str) or label not in _LABELS:
        scored = isinstance(label, int | float)
        hint = "; of a score say from where on an answer is good, and write that down" if scored else ""
        raise row.error(
            f"{label_column!r} must be true or false (or 1 or 0), whether the answer is good, got {label!r:.60}{hint}"
        )
    if isinstance(prompt, str) and isinstance(completion, str):
        return [Answered(row.text("prompt"), [row.text("completion")], _LABELS[label])]
    chat = _chats(row, prompt, [turns(completion, "assistant")])
    return [chat._replace(desirable=_LABELS[label])]


def _texts(row: Row, prompt: str | None) -> Answered:
    answers = [row.text(key) for key in ("chosen", "rejected")]
    if prompt is not None:
        return Answered(row.text("prompt"), answers)
    common = answers[0][: _shared(*answers)]
    start = len(common) - common.endswith(" ")  # a blank belongs to the word after it
    if not common.strip():
        raise row.missing("prompt", "; 'chosen' and 'rejected' don't begin with the same prompt either")
    if not all(answer[start:].strip() for answer in answers):
        raise EmptyRow(row.path, row.line, "an answer has no text of its own")
    return Answered(common[:start], [answer[start:] for answer in answers])


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many characters, or messages, both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _chats(row: Row, prompt: Any, answers: list[list[Any]]) -> Answered:
    """A chat with its last turns in several forms; what all begin with is the prompt, where there is none beside them."""
    answers = [[_turn(turn) for turn in answer] for answer in answers]
    whole = all(answer and isinstance(answer[0], dict) and answer[0].get("role") != "assistant" for answer in answers)
    if prompt is not None and not whole:
        before = [_turn(turn) for turn in turns(prompt, "user")]
    else:
        size = _shared(*answers) if len(answers) > 1 else len(answers[0]) - 1
        before, answers = answers[0][:size], [answer[size:] for answer in answers]
    if not before:
        raise row.error("there is no prompt: neither a 'prompt', nor messages that all answers begin with")
    if not all(answers):
        raise row.error("an answer has no message of its own")
    return Answered([*system_turns(row, before), *before], answers)


def _turn(turn: Any) -> Any:
    return spoken(turn) if isinstance(turn, dict) and "from" in turn else turn


def with_messages(row: Row, messages: list[Any]) -> Row:
    """The row as a chat of these messages, with what else it says about its chat, such as tools."""
    rest = {key: value for key, value in row.values.items() if key not in ("prompt", "completion", "conversations")}
    return dataclasses.replace(row, values={**rest, "messages": messages})
