"""Jinja as transformers sets it up for chat templates: the same text for the same messages.

Templates come from whoever made the model, so they run in a sandbox that lets them change nothing and reach no internals.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from jlora.models.chat_files import ChatSource

Spans = list[tuple[int, int]]
"""Where pieces of a text begin and end, in characters."""


class Generation(Extension):
    """The block `{% generation %} … {% endgeneration %}`, with which a template marks what the assistant writes.

    Attributes:
        present: whether the template has such a block.
        pieces: what the template has written so far.
        written: start and text of each block.
    """

    tags = {"generation"}  # noqa: RUF012  (as its base class has it)

    def __init__(self, environment):
        super().__init__(environment)
        self.present = False
        self.pieces: list[str] = []
        self.written: list[tuple[int, str]] = []

    def parse(self, parser: Parser) -> nodes.Node:
        """The block as a call of `_note` with its content."""
        self.present = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller) -> str:
        text = caller()
        self.written.append((sum(map(len, self.pieces)), text))
        return text


class ChatJinja:
    """One compiled chat template.

    Attributes:
        source: where it comes from, and its text.
        marks: whether it marks the assistant's text by `{% generation %}`.
    """

    def __init__(self, source: ChatSource, now: datetime):
        """Compiles a template, whose `strftime_now` writes the time `now`.

        Raises:
            ValueError: if the text is no Jinja template, naming its file and line.
        """
        environment = _environment(now)
        try:
            self._template = environment.from_string(source.text)
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            raise ValueError(
                f"{source.place}: the chat template is not valid Jinja, line {line}: {error.message}"
            ) from error
        self._generation: Any = environment.extensions[Generation.identifier]
        self.source, self.marks = source, self._generation.present

    def render(self, variables: Mapping[str, Any]) -> tuple[str, Spans]:
        """The text, and where its `{% generation %}` blocks stand.

        Raises:
            ValueError: if the template refuses the messages, fails on them, or keeps a block's text back.
        """
        pieces = self._generation.pieces = []
        written = self._generation.written = []
        try:
            for piece in self._template.generate(**variables):
                pieces.append(piece)
        except _Refusal as error:
            raise ValueError(f"the chat template ({self.source.place}) refuses the messages: {error}") from error
        except Exception as error:
            raise ValueError(
                f"the chat template ({self.source.place}) fails on this chat: {type(error).__name__}: {error}"
            ) from error
        text = "".join(pieces)
        spans = [(start, start + len(block)) for start, block in written]
        apart = all(before[1] <= after[0] for before, after in pairwise(spans))
        if not apart or not all(text.startswith(block, start) for start, block in written):
            raise ValueError(
                f"the chat template ({self.source.place}) has a {{% generation %}} block inside a macro, a set block or "
                "another one, so that it can't be told where its text ends up; move the block out of it"
            )
        return text, spans


class _Refusal(TemplateError):
    """What a template raises by `raise_exception`."""


def _environment(now: datetime) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _refuse, "strftime_now": now.strftime, "dict": _Dict(), "namespace": _Namespace,
    }  # fmt: skip
    return environment


def _refuse(message: Any) -> None:
    raise _Refusal(str(message))


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON as it is: Jinja's own filter writes `<` and others as escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Dict:
    """`dict` for templates: the class itself would let them reach its internals."""

    def __call__(self, *args: Any, **entries: Any) -> dict:
        return dict(*args, **entries)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` for templates, without names that begin with an underscore."""

    def __init__(*args: Any, **entries: Any):
        self, *rest = args  # so that templates may give an entry the name `self`
        values = dict(*rest, **entries)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a chat template must not store {name!r} in a namespace")
