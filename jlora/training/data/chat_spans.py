"""Which part of a rendered chat the assistant wrote, for templates that do not say so by `{% generation %}`.

An answer begins where the rendering of the messages before it, with the header that asks for an answer, ends; and it ends
where the rendering up to and with it ends. Most often both are beginnings of the whole text. Where they are not, since the
template writes a message otherwise once more follow (Qwen3 leaves the reasoning of earlier turns out), the place is found by
a mark in the last message of the shorter chat: what follows the mark is the same in the shorter text and in the whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jlora.training.data.chat_environment import Spans

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], bool], str]
"""Messages, and whether the header of an answer follows them, to text."""

# Lower case and digits, which no filter rewrites; its beginning is not its end, so that it stands where it was put.
_MARK = "q0jloramark0z"
# What templates set between messages: texts that first differ inside such a tag count as different from its start on.
_TAG = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")


class Unclear(ValueError):
    """It can't be told where an answer begins or ends."""


def answer_spans(render: Render, messages: Sequence[Message]) -> Spans:
    """Start and end, in characters of `render(messages, False)`, of each of the assistant's messages.

    From behind the header to behind what ends the turn: what the model writes when it is asked.

    Raises:
        Unclear: if that can't be told, with the reason.
    """
    whole = render(messages, False)
    spans: Spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            start = _start(render, whole, messages, index)
            end = _border(render, whole, messages, index + 1, False)[0]
            if not (spans[-1][1] if spans else 0) <= start < end:
                raise Unclear(f"it does not write message {index + 1} between those before and after it")
            spans.append((start, end))
    return spans


def _start(render: Render, whole: str, messages: Sequence[Message], index: int) -> int:
    if index == 0:
        return _first_start(render, whole, messages)
    start, complete = _border(render, whole, messages, index, True)
    # A header of which nothing stands in the whole text is not this answer's.
    if not complete and start <= _border(render, whole, messages, index, False)[0]:
        raise Unclear(f"it asks for message {index + 1} by a header that it does not write before the message")
    return start


def _border(render: Render, whole: str, messages: Sequence[Message], count: int, prompt: bool) -> tuple[int, bool]:
    """Where the first `count` messages (and the header of an answer) end in the whole, and whether all of it is there."""
    before, after = messages[: count - 1], messages[count:]
    short = _attempt(render, messages[:count], prompt)
    if short is not None and whole.startswith(short):
        return len(short), True
    for marked, last in _marked(messages[count - 1]):
        at = _mark_in(whole, _attempt(render, [*before, marked, *after], False) or "")
        _, found, tail = (_attempt(render, [*before, marked], prompt) or "").rpartition(_MARK)
        if at is not None and found:
            length = _shared(tail, whole[at:])
            # A part of the tail is enough where it is all the template's own.
            if length == len(tail) or (length and last):
                return at + length, length == len(tail)
    raise Unclear(f"it writes message {count} otherwise when others follow it")


def _attempt(render: Render, messages: Sequence[Message], prompt: bool) -> str | None:
    """The rendering, or None where the template refuses a chat that ends here."""
    try:
        return render(messages, prompt)
    except ValueError:
        return None


def _mark_in(whole: str, marked: str) -> int | None:
    """Where the (last) mark stands, if the marked text is the whole text but for the marks."""
    before, found, _ = marked.rpartition(_MARK)
    same = found and marked.replace(_MARK, "") == whole
    return len(before.replace(_MARK, "")) if same else None


def _marked(message: Message) -> Iterator[tuple[Message, bool]]:
    """The message with a mark in its text, and whether the mark is the last of it.

    In one place after another, since a template may look at the text's ends.
    """
    content = message.get("content")
    if isinstance(content, str):
        yield from (({**message, "content": text}, last) for text, last in _marked_text(content))
    elif content and isinstance(content[-1].get("text"), str):
        *parts, part = content
        for text, last in _marked_text(part["text"]):
            yield {**message, "content": [*parts, {**part, "text": text}]}, last
    for call in (message.get("tool_calls") or ())[-1:]:
        function = call.get("function", call)
        named = {**function, "name": f"{function.get('name', '')}{_MARK}"}
        call = {**call, "function": named} if "function" in call else named
        yield {**message, "tool_calls": [*message["tool_calls"][:-1], call]}, False


def _marked_text(text: str) -> Iterator[tuple[str, bool]]:
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    for at in (end, start, (start + end) // 2):
        yield text[:at] + _MARK + text[at:], at == end


def _shared(tail: str, rest: str) -> int:
    """How much of the tail the rest begins with, without the first part of a tag that the rest does not hold."""
    length = next((i for i, (a, b) in enumerate(zip(tail, rest)) if a != b), min(len(tail), len(rest)))
    torn = next((tag for tag in _TAG.finditer(tail) if tag.start() < length < tag.end()), None)
    return torn.start() if torn else length


def _first_start(render: Render, whole: str, messages: Sequence[Message]) -> int:
    """Where a first message by the assistant begins: there is none before it, so the header is that of a second one."""
    bare, asked = (_attempt(render, messages[:1], prompt) for prompt in (False, True))
    header = asked[len(bare) :] if asked and bare and asked.startswith(bare) else ""
    if not header or header not in whole:
        raise Unclear("the chat begins with an answer, and it does not say by what header an answer begins")
    return whole.index(header) + len(header)
