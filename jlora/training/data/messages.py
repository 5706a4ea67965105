"""The chat in a row: its messages, and what else its template is to see."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from jlora.training.data.chat import ROLES
from jlora.training.data.rows import Row

_REASONING = ("reasoning_content", "thinking", "reasoning")


def messages_of(row: Row, knows: Callable[[str], bool] = ROLES.__contains__) -> list[dict[str, Any]]:
    """The row's `messages`, with every key that they have.

    Args:
        row: the row.
        knows: whether messages may have that role.

    Raises:
        DataError: for messages that are none, or without an answer.
    """
    messages = row.values["messages"]
    if not isinstance(messages, list) or not messages:
        raise row.error("'messages' must be a list of {role, content}, with at least one answer")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise row.error(f"message {number} must be {{role, content}}, got {message!r:.60}")
        role = message.get("role")
        if not isinstance(role, str) or not knows(role):
            raise row.error(f"message {number} has the role {role!r}; wanted {', '.join(ROLES)}")
        _check_content(row, number, message)
    if not any(message["role"] == "assistant" for message in messages):
        raise row.error("no message is by the assistant, so there is nothing to learn")
    return messages


def _check_content(row: Row, number: int, message: dict[str, Any]) -> None:
    """A text that is not blank, or a list of parts; an empty one where something else speaks, or silence has a meaning."""
    content, calls = message.get("content"), message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(_is_call(call) for call in calls)):
        raise row.error(f"message {number} must have tool_calls that are a list of {{function: {{name, arguments}}}}")
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        return
    spoken = bool(calls) or any(message.get(name) for name in _REASONING)
    silent = message["role"] not in ("user", "assistant") or spoken
    text = "" if content is None and spoken else content
    if not isinstance(text, str) or not (silent or text.strip()):
        raise row.error(f"message {number} must be {{role, content}} with a text that is not empty")


def _is_call(call: Any) -> bool:
    return isinstance(call, dict) and isinstance(call.get("function", call), dict)


def variables_of(row: Row) -> dict[str, Any]:
    """The row's `tools`, `documents` and `chat_template_kwargs`, for the template; each may be a JSON text as well.

    Raises:
        DataError: for tools or documents that are no list of objects, or other variables that are no object.
    """
    kinds = {"tools": list, "documents": list, "chat_template_kwargs": dict}
    found = {name: _parsed(row, name, kind) for name, kind in kinds.items() if row.values.get(name) is not None}
    return {**found.pop("chat_template_kwargs", {}), **found}


def _parsed(row: Row, name: str, kind: type) -> Any:
    value = row.values[name]
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise row.error(f"{name!r} is a text that is not JSON ({error})") from error
    if not isinstance(value, kind) or (kind is list and not all(isinstance(entry, dict) for entry in value)):
        wanted = "a list of objects" if kind is list else "an object of variables"
        raise row.error(f"{name!r} must be {wanted} for the chat template, got {value!r:.60}")
    return value
