"""Chat messages as text, and which part of the text are the assistant's answers.

Three templates: `model`, the Jinja template of the model's own `tokenizer_config.json`; `chatml`, for models whose
vocabulary has `<|im_start|>` and `<|im_end|>`; and `plain`, which needs no special tokens:

    User: What is LoRA?
    Assistant: A low-rank update.

`auto` takes the first of the three that the model has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Message = Mapping[str, Any]
Segments = list[tuple[str, bool]]
"""Pieces of text in order, each with whether the loss is taken on it."""
Template = Callable[[Sequence[Message]], Segments]

ROLES = ("system", "user", "assistant")


def template(name: str, directory: str | Path, vocabulary: Mapping[str, int]) -> Template:
    """The template of that name for a model's directory.

    Args:
        name: `auto`, `model`, `chatml` or `plain`.
        directory: the model's directory, whose `tokenizer_config.json` may hold a template.
        vocabulary: token to id.

    Raises:
        ValueError: if the model has not what the template needs.
    """
    config = _tokenizer_config(directory)
    own, chatml = config.get("chat_template"), {"<|im_start|>", "<|im_end|>"} <= set(vocabulary)
    if name == "auto":
        name = "model" if own else "chatml" if chatml else "plain"
    if name == "model":
        if not isinstance(own, str):
            raise ValueError(f"{directory}/tokenizer_config.json has no chat_template; use --chat-template plain")
        return _model_template(own, config)
    if name == "chatml" and not chatml:
        raise ValueError(f"the tokenizer of {directory} lacks <|im_start|> and <|im_end|>; use --chat-template plain")
    return _chatml if name == "chatml" else _plain


def _tokenizer_config(directory: str | Path) -> dict[str, Any]:
    path = Path(directory) / "tokenizer_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _plain(messages: Sequence[Message]) -> Segments:
    segments: Segments = []
    for message in messages:
        name = message["role"].capitalize()
        if message["role"] == "assistant":
            segments += [(f"{name}:", False), (f" {message['content']}\n", True)]
        else:
            segments.append((f"{name}: {message['content']}\n", False))
    return segments


def _chatml(messages: Sequence[Message]) -> Segments:
    segments: Segments = []
    for message in messages:
        answer = message["role"] == "assistant"
        segments += [
            (f"<|im_start|>{message['role']}\n", False),
            (f"{message['content']}<|im_end|>", answer),
            ("\n", False),
        ]
    return segments


def _model_template(source: str, config: Mapping[str, Any]) -> Template:
    """The model's own Jinja template, in a sandbox; answers are found as what each one adds to the rendered text."""
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ValueError("the model's chat template needs jinja2: install it, or use --chat-template plain") from error

    def refuse(message: str):
        raise ValueError(f"the model's chat template refuses the messages: {message}")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    compiled = environment.from_string(source)
    names = {key: _content(config.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}

    def render(messages: Sequence[Message], prompt: bool) -> str:
        return compiled.render(messages=list(messages), add_generation_prompt=prompt, **names)

    def segments(messages: Sequence[Message]) -> Segments:
        found: Segments = []
        done = ""
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before, after = render(messages[:index], True), render(messages[: index + 1], False)
                if not (before.startswith(done) and after.startswith(before)):
                    raise ValueError("the model's chat template rewrites earlier messages; use --chat-template plain")
                found += [(before[len(done) :], False), (after[len(before) :], True)]
                done = after
        return found

    return segments


def _content(token: Any) -> str:
    """The text of a special token, which a config writes as a string or as a table."""
    return token.get("content", "") if isinstance(token, Mapping) else token or ""
