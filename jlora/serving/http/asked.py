"""What a call to `/v1/completions` or `/v1/chat/completions` asks for: every field of its body used, or refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jlora.serving.http.body import Body, shown
from jlora.serving.http.refusals import bad
from jlora.serving.http.shelf import Entry
from jlora.serving.http.voice import Voice
from jlora.serving.request import TOP

_TOKENS = 16  # what OpenAI's completions write where nothing is said
_STOPS, _LONGEST_STOP = 16, 1000
_IGNORED = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier")
_ABSENT = {
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
}
_ABSENT_COMPLETION = {"best_of": (1,), "echo": (False,), "suffix": ("",)}
_ABSENT_CHAT = {
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
}
_ROLES = 40


@dataclass(frozen=True)
class Limits:
    """What a call may ask for.

    Attributes:
        length: tokens of a prompt and its answer together.
        choices: answers to one call, prompts times `n`; more are more calls, between which others get their turn.
    """

    length: int
    choices: int = 64


@dataclass(frozen=True)
class Asked:
    """What a call asks for.

    Attributes:
        entry: whose answer it wants.
        chat: whether it is a chat.
        prompts: the ids of each prompt.
        n: answers to each.
        max_new_tokens: tokens of an answer, at most, for each prompt.
        temperature, top_k, top_p: how tokens are drawn.
        seed: of the first answer, the next ones have those that follow; None for any.
        stop: texts that end an answer.
        logprobs: likeliest tokens to tell at each place; None where no probabilities are asked for.
        stream: whether the answer is told while it is written.
        usage: whether its last piece tells the numbers of tokens.
    """

    entry: Entry
    chat: bool
    prompts: tuple[list[int], ...]
    n: int
    max_new_tokens: tuple[int, ...]
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None
    stop: tuple[str, ...]
    logprobs: int | None
    stream: bool
    usage: bool


def completion(body: Body, entry: Entry, voice: Voice, limits: Limits) -> Asked:
    """A call that goes on with texts.

    Args:
        body: the call, without `model`.
        entry: what `model` names.
        voice: the model's words.
        limits: what it may ask for.

    Raises:
        Refused: for a field that is wrong, unknown, or of something that isn't there.
    """
    body.without(_ABSENT | _ABSENT_COMPLETION)
    prompts = tuple(_ids(each, voice) for each in _prompts(body.take("prompt"), limits.choices))
    wanted = body.whole("max_tokens", None, 1)
    logprobs = body.whole("logprobs", None, 0, TOP)
    return _common(body, entry, voice, limits, prompts, wanted, chat=False, logprobs=logprobs)


def chat(body: Body, entry: Entry, voice: Voice, limits: Limits) -> Asked:
    """A call that answers a chat; arguments and errors as for `completion`."""
    body.without(_ABSENT | _ABSENT_CHAT)
    messages = _messages(body.take("messages"))
    if entry.chat is None:
        raise bad(
            "model",
            f"{entry.name!r} has no chat template that is run here: ask /v1/completions, or start the server with "
            "--chat-template, or with --trust-templates for one in an adapter's folder",
            "no_chat_template",
        )
    try:
        prompt = entry.chat(messages)
    except ValueError as error:
        raise bad("messages", f"can't be written as a chat: {error}") from error
    first, second = body.whole("max_completion_tokens", None, 1), body.whole("max_tokens", None, 1)
    if first is not None and second is not None and first != second:
        raise bad("max_tokens", "and max_completion_tokens are one thing: give one of them")
    wanted = first if first is not None else second
    asked, top = body.flag("logprobs"), body.whole("top_logprobs", None, 0, TOP)
    if top is not None and not asked:
        raise bad("top_logprobs", "needs logprobs to be true")
    return _common(body, entry, voice, limits, (prompt,), wanted, chat=True, logprobs=(top or 0) if asked else None)


def _common(
    body: Body,
    entry: Entry,
    voice: Voice,
    limits: Limits,
    prompts: tuple[list[int], ...],
    wanted: int | None,
    chat: bool,
    logprobs: int | None,
) -> Asked:
    n = body.whole("n", 1, 1, limits.choices)
    if n * len(prompts) > limits.choices:
        raise bad("n", f"and prompt ask for {n * len(prompts)} answers, at most {limits.choices} are given at once")
    seed = body.whole("seed", None, 0, 2**32 - n * len(prompts))
    stream = body.flag("stream")
    options = body.table("stream_options")
    usage = options.flag("include_usage")
    options.ignored("include_obfuscation")
    options.done()
    if usage and not stream:
        raise bad("stream_options", "needs stream to be true")
    found = Asked(
        entry=entry,
        chat=chat,
        prompts=prompts,
        n=n,
        max_new_tokens=tuple(_room(prompt, wanted, limits.length - entry.virtual, chat) for prompt in prompts),
        temperature=body.number("temperature", voice.temperature, lambda value: value >= 0, "a number, 0 or more"),
        top_k=_top_k(body, voice),
        top_p=body.number("top_p", voice.top_p, lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
        seed=seed,
        stop=(*voice.stop, *_stop(body.take("stop", []))),
        logprobs=logprobs,
        stream=stream,
        usage=usage,
    )
    body.ignored(*_IGNORED)
    body.done()
    return found


def _top_k(body: Body, voice: Voice) -> int | None:
    """vLLM's field; -1 and 0 are all tokens."""
    found = body.whole("top_k", voice.top_k, -1)
    return None if found is None or found <= 0 else min(found, voice.tokens)


def _room(prompt: Sequence[int], wanted: int | None, length: int, chat: bool) -> int:
    """The tokens that an answer may have."""
    free = length - len(prompt)
    if free < (wanted or 1):
        raise bad(
            "messages" if chat else "prompt",
            f"has {len(prompt):,} tokens; with {f'the {wanted:,} of max_tokens' if wanted else 'one of an answer'} that is "
            f"more than the {length:,} that this server has room for",
            "context_length_exceeded",
        )
    if wanted is not None:
        return wanted
    return free if chat else min(free, _TOKENS)


def _prompts(value: Any, most: int) -> list[Any]:
    """A text, ids, or lists of either, as a list of prompts."""
    several = isinstance(value, list) and value and not all(type(each) is int for each in value)
    found = value if several else [value]
    if len(found) > most:
        raise bad("prompt", f"has {len(found):,} prompts, at most {most} are answered at once")
    return found


def _ids(prompt: Any, voice: Voice) -> list[int]:
    if isinstance(prompt, str):
        found = voice.prompt(prompt)
        if not found:
            raise bad("prompt", "must not be empty: the model has no token to begin with")
        return found
    if not isinstance(prompt, list) or not prompt or not all(type(each) is int for each in prompt):
        raise bad("prompt", f"must be a text, token ids, or a list of either, got {shown(prompt)}")
    if wrong := [each for each in prompt if not 0 <= each < voice.tokens]:
        raise bad("prompt", f"has the token {shown(wrong[0])}: the model's are 0 to {voice.tokens - 1}")
    return prompt


def _stop(value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    right = isinstance(found, list) and len(found) <= _STOPS
    if not right or not all(isinstance(each, str) and 0 < len(each) <= _LONGEST_STOP for each in found):
        raise bad("stop", f"must be a text or up to {_STOPS}, of 1 to {_LONGEST_STOP} characters, got {shown(value)}")
    return tuple(found)


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise bad("messages", f"must be a list of messages, got {shown(value)}")
    return [_message(message, f"messages[{place}]") for place, message in enumerate(value)]


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad(where, f"must be an object with role and content, got {shown(value)}")
    fields = Body(value, f"{where}.")
    role, content, name = fields.text("role"), fields.take("content"), fields.text("name", None)
    # As a client has them that gives an answer back.
    fields.without({"refusal": (), "audio": (), "tool_calls": ([],), "function_call": (), "annotations": ([],)})
    fields.done()
    if not 0 < len(role) <= _ROLES:
        raise bad(f"{where}.role", f"must be a role such as user, got {shown(role)}")
    found = {"role": role, "content": _content(content, f"{where}.content")}
    return found if name is None else found | {"name": name}


def _content(value: Any, where: str) -> str:
    """A text, or parts that are texts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise bad(where, f"must be a text or a list of parts, got {shown(value)}")
    for part in value:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise bad(where, f"may have parts of type text alone, got {shown(part)}")
        if set(part) != {"type", "text"}:
            raise bad(where, f"has a part with more than type and text: {shown(part)}")
    return "".join(part["text"] for part in value)
