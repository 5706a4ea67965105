"""Rows in the layouts that datasets have, as one of three: a text, a prompt with its completion, or a chat.

Chats are rows of `messages` (OpenAI's, whose content may be a list of parts) or `conversations` (ShareGPT's). Rows of
`instruction` and `output` (Alpaca's) become a chat of two turns. Of preference pairs, `chosen` is the answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jlora.training.data.rows import Row

# ShareGPT's names for who speaks; others are taken for roles.
_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bard", "bing"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}


class Layout(NamedTuple):
    """A layout of rows.

    Attributes:
        keys: the keys that tell it, all of which a row has.
        read: a row's values as those of a text, a prompt and completion, or a chat.
        example: a row, as JSON.
    """

    keys: tuple[str, ...]
    read: Callable[[Row], dict[str, Any]]
    example: str


def normal(row: Row, text_column: str) -> Row:
    """The row with `text_column`, with `prompt` and `completion`, or with `messages` of `{role, content}`.

    A text column that the user named comes before everything else, one with the default name after it.

    Raises:
        DataError: for a row in no known layout, with an example of each; or one whose parts have not the right form.
    """
    found = layout_of(row)
    if text_column in row.values and (found is None or text_column != "text"):
        return dataclasses.replace(row, values={text_column: row.values[text_column]})
    if found is not None:
        return dataclasses.replace(row, values=found.read(row))
    halves = {"prompt": "completion", "completion": "prompt", "instruction": "output", "output": "instruction"}
    wanted = next((other for key, other in halves.items() if key in row.values), text_column)
    raise row.missing(wanted, "; rows are read like " + " or ".join([_TEXT, *(layout.example for layout in LAYOUTS)]))


def layout_of(row: Row) -> Layout | None:
    """The layout that a row's keys tell; None for a text, or an unknown one."""
    return next((layout for layout in LAYOUTS if all(key in row.values for key in layout.keys)), None)


def _chat(row: Row, messages: Any) -> dict[str, Any]:
    """The messages, their contents as texts; what else a row says about its chat, such as tools, stays beside them."""
    if isinstance(messages, list):
        messages = [_message(row, number, message) for number, message in enumerate(messages, 1)]
    return {**row.values, "messages": messages}


def _message(row: Row, number: int, message: Any) -> Any:
    if not isinstance(message, dict):
        return message  # `messages_of` refuses it
    if message.get("weight") not in (None, 1):
        raise row.error(
            f"message {number} has the weight {message['weight']!r}, but the loss is taken on every answer: "
            "take out the weight, or the message"
        )
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(row, number, part) for part in content)
    return {**message, "content": content}


def _part(row: Row, number: int, part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else part
        raise row.error(f"message {number} has a part of type {kind!r:.40}; only parts of type 'text' are read")
    return text


def _conversations(row: Row) -> dict[str, Any]:
    said = row.values["conversations"]
    if not isinstance(said, list) or not all(isinstance(turn, dict) for turn in said):
        raise row.error("'conversations' must be a list of {from, value}, with at least one answer")
    messages = [spoken(turn) for turn in said]
    return _chat(row, system_turns(row, messages) + messages)


def spoken(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn of `{from, value}` as `{role, content}`."""
    speaker = turn.get("from", turn.get("role"))
    role = _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {**rest, "role": role, "content": turn.get("value", turn.get("content"))}


def system_turns(row: Row, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The system message that stands beside the turns, where they have none."""
    text = row.values.get("system")
    has = bool(messages) and messages[0]["role"] == "system"
    return [{"role": "system", "content": text}] if isinstance(text, str) and text.strip() and not has else []


def _instruction(row: Row) -> dict[str, Any]:
    extra = row.values.get("input")
    if extra is not None and not isinstance(extra, str):
        raise row.error(f"'input' must be a text, got {extra!r:.60}")
    question = "\n\n".join([row.text("instruction"), *([extra] if extra and extra.strip() else [])])
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": row.text("output")}]
    return _chat(row, [*system_turns(row, messages), *messages])


def _answered(answer: str) -> Callable[[Row], dict[str, Any]]:
    """Reads `prompt` and the answer of that key, which are texts or lists of messages."""

    def read(row: Row) -> dict[str, Any]:
        prompt, end = row.values.get("prompt"), row.values[answer]
        if not isinstance(prompt, list) and not isinstance(end, list):
            if "prompt" not in row.values:
                raise row.missing("prompt", f"; a text as {answer!r} needs it")
            return {"prompt": prompt, "completion": end}
        before, after = turns(prompt, "user"), turns(end, "assistant")
        whole = bool(after) and isinstance(after[0], dict) and after[0].get("role") != "assistant"
        return _chat(row, after if whole else before + after)

    return read


def turns(value: Any, role: str) -> list[Any]:
    """The messages of a value that is a list of them, one of them, or a text of that role."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        return [value]
    return [] if value is None else [{"role": role, "content": value}]


_TEXT = '{"text": "…"} (another key by --text-column)'
PREFERENCE = Layout(("chosen", "rejected"), _answered("chosen"), '{"prompt": "…", "chosen": "…", "rejected": "…"}')
LAYOUTS = (
    Layout(
        ("messages",),
        lambda row: _chat(row, row.values["messages"]),
        '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}',
    ),
    Layout(
        ("conversations",),
        _conversations,
        '{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}',
    ),
    Layout(("prompt", "completion"), _answered("completion"), '{"prompt": "…", "completion": "…"}'),
    PREFERENCE,
    Layout(("instruction", "output"), _instruction, '{"instruction": "…", "input": "…", "output": "…"}'),
)
