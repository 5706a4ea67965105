"""Chat messages as text, and which part of the text are the assistant's answers.

Templates are Jinja, rendered as transformers renders them (`jlora.training.data.chat_environment`):

- `model`: the model's own, from `chat_template.jinja`, `additional_chat_templates/` or `tokenizer_config.json`; of several,
  the one called `tool_use` for rows with `tools`, otherwise the one called `default`;
- a file ending in `.jinja`, which takes its place;
- `chatml`, for models whose vocabulary has `<|im_start|>` and `<|im_end|>`;
- `plain`, which needs no special tokens:

      User: What is LoRA?
      Assistant: A low-rank update.

`auto` is the model's own, and where it has none, `chatml` or `plain`, of which `Template.notes` tell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jlora.models.chat_files import (
    CONFIG,
    DEFAULT,
    FILE,
    ChatSource,
    read_chat_template,
    read_chat_templates,
    special_tokens,
)
from jlora.training.data.chat_environment import ChatJinja, Spans
from jlora.training.data.chat_spans import Message, Unclear, answer_spans

Segments = list[tuple[str, bool]]
"""Pieces of text in order, each with whether the loss is taken on it."""

# Messages of other roles are read where the template names them.
ROLES = ("system", "user", "assistant", "tool")
_CHOICE = (
    "{directory} has no chat template: chats are written as {chosen!r} (--chat-template), and that template is left beside "
    "what is trained, as chat_template.jinja, since the model must be served with it"
)
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_PLAIN = (
    "{% for message in messages %}{{ message.role | capitalize + ':' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ ' ' + message.content + '\\n' }}{% endgeneration %}"
    "{% else %}{{ ' ' + message.content + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_BUILT_IN = {"chatml": _CHATML, "plain": _PLAIN}


@dataclasses.dataclass(frozen=True, eq=False)
class Template:
    """How chats become text.

    Attributes:
        name: `model`, `chatml`, `plain` or the file.
        sources: its Jinja texts by name: one called `default`, perhaps `tool_use` and others.
        tokens: the model's special tokens, which the texts see as variables.
        choice: what a user must know of the choice, or nothing.
        gaps: the chats (their messages) of which the text does not hold what the system or the user said.
    """

    name: str
    sources: Mapping[str, ChatJinja]
    tokens: Mapping[str, str]
    choice: str = ""
    gaps: list[Sequence[Message]] = dataclasses.field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What a user must know, each in one sentence."""
        gaps = (
            "the chat template leaves a message of the system or the user out of the text that is trained on, in "
            f"{len(self.gaps):,} of the chats"
        )
        return [note for note, holds in ((self.choice, self.choice), (gaps, self.gaps)) if holds]

    @property
    def whole(self) -> bool:
        """Whether the text is all that the model reads, so that the model's begin token is not put before it."""
        return self.name not in _BUILT_IN

    def render(self, messages: Sequence[Message], prompt: bool = False, **more: Any) -> str:
        """The text of a chat.

        Args:
            messages: `{role, content}` and what else the template reads, such as `tool_calls` and `reasoning_content`.
            prompt: whether the header that asks for an answer follows.
            more: further variables of the template; `tools` and `documents` for two.

        Raises:
            ValueError: if the template refuses the messages or fails on them.
        """
        return self._rendered(messages, prompt, more)[0]

    def __call__(self, messages: Sequence[Message], **more: Any) -> Segments:
        """The text of a chat in pieces, each with whether the assistant wrote it; arguments as for `render`.

        Raises:
            ValueError: as `render`, and if it can't be told which part the assistant wrote.
        """
        jinja = self._chosen(more)
        text, spans = self._checked(messages, more)
        if jinja.marks and not spans:
            raise ValueError(
                f"the chat template ({jinja.source.place}) marks no text of this chat by {{% generation %}}"
            )
        return _segments(text, spans if jinja.marks else self._found(messages, more))

    def checked(self, messages: Sequence[Message], **more: Any) -> str:
        """The text of a chat that has a place for what the row holds of tools; arguments as for `render`.

        Raises:
            ValueError: as `render`, and if the template has no place for tools.
        """
        return self._checked(messages, more)[0]

    def _checked(self, messages: Sequence[Message], more: Mapping[str, Any]) -> tuple[str, Spans]:
        _check_place(self._chosen(more).source, messages, more)
        text, spans = self._rendered(messages, False, more)
        if any(_is_gone(message, text) for message in messages):
            self.gaps.append(messages)
        return text, spans

    def _found(self, messages: Sequence[Message], more: Mapping[str, Any]) -> Spans:
        try:
            return answer_spans(lambda part, prompt: self._rendered(part, prompt, more)[0], messages)
        except Unclear as error:
            raise ValueError(
                f"the chat template ({self._chosen(more).source.place}) does not tell which text is the assistant's: {error}; "
                "give one with {% generation %} blocks around the answers (--chat-template FILE.jinja), or use "
                "--chat-template plain"
            ) from error

    def _rendered(self, messages: Sequence[Message], prompt: bool, more: Mapping[str, Any]) -> tuple[str, Spans]:
        jinja = self._chosen(more)
        variables = {"tools": None, "documents": None, **self.tokens, **more}
        return jinja.render({**variables, "messages": [_message(m) for m in messages], "add_generation_prompt": prompt})

    def _chosen(self, more: Mapping[str, Any]) -> ChatJinja:
        wanted = "tool_use" if more.get("tools") is not None and "tool_use" in self.sources else DEFAULT
        if wanted not in self.sources:
            raise ValueError(
                f"the model has the chat templates {', '.join(sorted(self.sources))} but none called {DEFAULT}: give one of "
                "them as a file (--chat-template FILE.jinja)"
            )
        return self.sources[wanted]

    def knows(self, role: str) -> bool:
        """Whether messages may have that role."""
        return role in ROLES or any(f"{q}{role}{q}" in text for text in self.texts().values() for q in "'\"")

    def at(self, now: datetime) -> Template:
        """The same template at another time, where it writes the time; else this one."""
        if not any("strftime_now" in text for text in self.texts().values()):
            return self
        sources = {name: ChatJinja(jinja.source, now) for name, jinja in self.sources.items()}
        return dataclasses.replace(self, sources=sources)

    def texts(self) -> dict[str, str]:
        """The Jinja texts by name, for `jlora.models.chat_files.write_chat_templates`."""
        return {name: jinja.source.text for name, jinja in self.sources.items()}


def _check_place(source: ChatSource, messages: Sequence[Message], more: Mapping[str, Any]) -> None:
    """What the row holds of tools has a place in the text: templates pass over what they don't know."""
    held = {"tools": bool(more.get("tools")), "tool_calls": any(message.get("tool_calls") for message in messages)}
    for name, present in held.items():
        if present and name not in source.text:
            raise ValueError(
                f"there are {name}, but the chat template ({source.place}) has no place for them: leave them out, or give a "
                "template that reads them (--chat-template FILE.jinja)"
            )


def _is_gone(message: Message, text: str) -> bool:
    content = message.get("content")
    return message["role"] in ("system", "user") and isinstance(content, str) and content.strip() not in text


def _message(message: Message) -> dict[str, Any]:
    """The message as transformers hands it on: without nulls, and with its reasoning under each of two names."""
    given = {name: value for name, value in message.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((given[name] for name in names if name in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _segments(text: str, spans: Spans) -> Segments:
    segments: Segments = []
    done = 0
    for start, end in spans:
        segments += [(text[done:start], False), (text[start:end], True)]
        done = end
    return [segment for segment in [*segments, (text[done:], False)] if segment[0]]


def template(name: str, directory: str | Path, vocabulary: Mapping[str, int], now: datetime | None = None) -> Template:
    """The template of that name for a model's directory.

    Args:
        name: `auto`, `model`, `chatml`, `plain`, or a file ending in `.jinja`.
        directory: the model's directory.
        vocabulary: token to id.
        now: the time that templates may write; the present by default.

    Raises:
        ValueError: if the model has not what the template needs, or a template is damaged, naming its file.
        OSError: if the file cannot be read.
    """
    own = read_chat_templates(directory) if name in ("auto", "model") else {}
    fallback = "chatml" if {"<|im_start|>", "<|im_end|>"} <= set(vocabulary) else "plain"
    chosen = ("model" if own else fallback) if name == "auto" else name
    if chosen == "model" and not own:
        raise ValueError(
            f"{directory} has no chat template (no {FILE}, and no chat_template in {CONFIG}); use --chat-template plain"
        )
    if chosen == "chatml" and fallback != chosen:
        raise ValueError(f"the tokenizer of {directory} lacks <|im_start|> and <|im_end|>; use --chat-template plain")
    choice = _CHOICE.format(directory=directory, chosen=chosen) if name == "auto" and not own else ""
    return _compiled(chosen, own or {DEFAULT: _given(chosen)}, directory, now or datetime.now(), choice)


def _compiled(
    name: str, sources: Mapping[str, ChatSource], directory: str | Path, now: datetime, choice: str = ""
) -> Template:
    jinjas = {key: ChatJinja(source, now) for key, source in sources.items()}
    return Template(name, jinjas, special_tokens(directory), choice)


def _given(name: str) -> ChatSource:
    return ChatSource(_BUILT_IN[name], name) if name in _BUILT_IN else read_chat_template(name)


def is_built_in(text: str) -> bool:
    """Whether a template's text is one of jlora's own."""
    return text in _BUILT_IN.values()


def stored(out: str | Path, directory: str | Path) -> Template | None:
    """The template that a run was trained with, from its folder; None if it read no chats.

    Args:
        out: the run's folder.
        directory: the model's, for its special tokens.

    Raises:
        ValueError: if it is damaged.
    """
    sources = read_chat_templates(out)
    built_in = (name for name in _BUILT_IN if DEFAULT in sources and _BUILT_IN[name] == sources[DEFAULT].text)
    return _compiled(next(built_in, "model"), sources, directory, datetime.now()) if sources else None
