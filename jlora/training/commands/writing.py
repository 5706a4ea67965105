"""Texts written by a run's model: prompts and chats as tokens, tokens as text, and where a text ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

import jlora
from jlora import models
from jlora.models.chat_files import read_chat_templates
from jlora.models.generation_config import GenerationConfig
from jlora.serving.text import Text, whole_text
from jlora.training.commands.runs import Run
from jlora.training.data import chat
from jlora.training.data.layouts import normal
from jlora.training.data.rows import Row, read_rows
from jlora.training.errors import SettingError
from jlora.training.model.losses import with_prompts

# Where neither the user nor the model's files say anything: small models repeat themselves where nothing is drawn.
_TEMPERATURE = 0.7
# Prompts of chats grow by every turn: few lengths, so few programs.
_CHAT_WIDTH = 256


@dataclasses.dataclass(frozen=True)
class Way:
    """How texts are written.

    Attributes:
        tokens: at most.
        temperature: 0 takes the likeliest token.
        top_k: None for all.
        top_p: None for all.
        ends: tokens that end a text.
        stop: texts that end it, and are left out of it.
        seed: of the drawing.
    """

    tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    ends: tuple[int, ...]
    stop: tuple[str, ...]
    seed: int

    def options(self) -> dict[str, Any]:
        """The arguments of `models.generate`."""
        names = ("temperature", "top_k", "top_p")
        return {name: getattr(self, name) for name in names} | {
            "max_new_tokens": self.tokens,
            "eos_id": self.ends,
            "key": jax.random.key(self.seed),
        }


def way_of(run: Run, given: Mapping[str, Any]) -> tuple[Way, list[str]]:
    """How a run's model writes, and notes on it: what the user gave, over the model's `generation_config.json`.

    Args:
        run: the run.
        given: `tokens`, `temperature`, `top_k`, `top_p`, `stop` and `seed`; None where the user gave none.
    """
    config, codec = models.read_generation_config(run.directory), run.subject.codec
    named = run.subject.config.get("eos_token_id")
    ends = dict.fromkeys([codec.end, *config.ends, *(named if isinstance(named, list) else [named])])
    drawn = _drawn(config, given)
    found = {"tokens": given["tokens"], "seed": given["seed"], "stop": (*config.stop, *(given["stop"] or ()))}
    notes = [f"generation_config.json has {each}, which is not followed" for each in config.unknown]
    return Way(**found, **drawn, ends=tuple(end for end in ends if end is not None)), notes


def _drawn(config: GenerationConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Temperature, top_k and top_p; those of the model are left where the user says how to draw."""
    names = ("temperature", "top_k", "top_p")
    own = {name: getattr(config, name) for name in names}
    if own["temperature"] is None:
        own["temperature"] = _TEMPERATURE
    return own | {name: given[name] for name in names if given[name] is not None}


@dataclasses.dataclass
class Writer:
    """Writes with a model, and with the adapters of runs on it by name.

    Attributes:
        run: a run, or a base alone.
        way: how texts are written.
        adapters: adapters by name; None for the base alone.
        current: the name of those in use.
    """

    run: Run
    way: Way
    adapters: dict[str, jlora.Adapted | None]
    current: str

    def __post_init__(self):
        apply = self.run.subject.model.apply
        # One function for all adapters: those of equal form share their programs, and none is merged into a copy of the base.
        self._plain, self._lifted = apply, with_prompts(jlora.lift(apply))

    def _runnable(self) -> tuple[Callable[..., Any], Any]:
        adapted = self.adapters[self.current]
        return (self._plain, self.run.subject.params) if adapted is None else (self._lifted, adapted)

    def pieces(self, prompt: Sequence[int], width: int = 32) -> Iterator[str]:
        """The text after a prompt in pieces, as soon as they are written."""
        way = self.way
        text = Text(self.run.subject.codec.decode, prompt, way.stop)
        for token in models.stream(*self._runnable(), prompt, width_step=width, **way.options()):
            if piece := text.add(token):
                yield piece
            if text.stopped:
                return
        if rest := text.end():
            yield rest

    def texts(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """The texts after some prompts, written together."""
        written = models.generate(*self._runnable(), prompts, **self.way.options())
        decode, stop = self.run.subject.codec.decode, self.way.stop
        return [whole_text(decode, prompt, tokens, stop) for prompt, tokens in zip(prompts, written)]

    def reply(self, messages: Sequence[dict[str, Any]], template: chat.Template) -> Iterator[str]:
        """The assistant's next message in pieces."""
        return self.pieces(chat_tokens(self.run, messages, template), _CHAT_WIDTH)


def template_of(run: Run) -> chat.Template | None:
    """How chats with the model are written: as the run wrote them, or as the model has it; None where neither has chats."""
    if run.template is not None:
        return run.template
    if run.adapted is not None or not read_chat_templates(run.directory):
        return None
    return chat.template("model", run.directory, run.subject.codec.tokenizer.get_vocab())


def needed_template(run: Run) -> chat.Template:
    """`template_of`, where there must be one: for a run that was trained on other rows, as `--chat-template` chooses.

    Raises:
        ValueError: if its template is damaged.
    """
    vocabulary = run.subject.codec.tokenizer.get_vocab()
    return template_of(run) or chat.template(run.settings.chat_template, run.directory, vocabulary)


def chat_tokens(run: Run, messages: Sequence[dict[str, Any]], template: chat.Template) -> list[int]:
    """The token ids of a chat up to the header that asks for an answer."""
    codec, text = run.subject.codec, template.render(messages, prompt=True)
    # The text of a model's own template is all that it reads.
    return codec.tokenizer.encode(text, add_special_tokens=False).ids if template.whole else codec.prompt(text)


def prompt_tokens(run: Run, prompt: str | Sequence[dict[str, Any]], as_chat: bool | None) -> list[int]:
    """The token ids of a prompt: of a text, or of a chat.

    Args:
        run: the run.
        prompt: a text, or messages.
        as_chat: whether a text is what a user says; None where the run was trained on chats, or the base alone has a template.

    Raises:
        SettingError: if there is nothing to begin with.
    """
    template = template_of(run)
    if not isinstance(prompt, str):
        return chat_tokens(run, prompt, needed_template(run))
    if as_chat or (as_chat is None and template is not None and prompt):
        return chat_tokens(run, [{"role": "user", "content": prompt}], needed_template(run))
    found = run.subject.codec.prompt(prompt)
    if not found:
        raise SettingError("--prompt", "must not be empty: the model has no token to begin with")
    return found


def read_prompts(path: str, format: str | None) -> list[str | list[dict[str, Any]]]:
    """The prompts of a file: a line each of a text file; in others what stands before the answer of each row.

    Raises:
        DataError: a ValueError, for a row without a prompt.
        OSError: if the file can't be read.
    """
    if path.endswith((".txt", ".md")):
        with open(path, encoding="utf-8") as file:
            return [line.rstrip("\r\n") for line in file if line.strip()]
    return [_prompt(row) for row in read_rows(path, format)]


def _prompt(row: Row) -> str | list[dict[str, Any]]:
    values = row.values
    if "messages" in values or "conversations" in values:
        messages = normal(row, "text").values["messages"]
        return messages[:-1] if messages and messages[-1].get("role") == "assistant" else messages
    if "instruction" in values:
        extra = [values["input"]] if isinstance(values.get("input"), str) and values["input"].strip() else []
        return [{"role": "user", "content": "\n\n".join([row.text("instruction"), *extra])}]
    if isinstance(values.get("prompt"), list):
        return values["prompt"]
    return row.text("prompt" if "prompt" in values else "text")
