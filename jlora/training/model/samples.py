"""Texts continued by the model, before and after training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

import jlora
from jlora import models, paths
from jlora.training.data.dataset import Data
from jlora.training.model.answers import questions
from jlora.training.model.losses import with_prompts
from jlora.training.model.subject import Subject
from jlora.training.settings.fields import Settings

# Drawn, not the likeliest token each time: small models repeat themselves otherwise. The same key before and after.
_TEMPERATURE = 0.7
_PROMPT_TOKENS = 16
# More would hold up the run, and the report.
_SAMPLES, _LONGEST_PROMPT = 3, 256


class Prompt(NamedTuple):
    """What a sample continues.

    Attributes:
        tokens: its token ids, at least one.
        wanted: the answer that the data has to it; None where it has none.
    """

    tokens: list[int]
    wanted: str | None


def prompts(subject: Subject, data: Data, settings: Settings) -> list[Prompt]:
    """The settings' prompt; or the prompts of some validation rows that have an answer; or the beginnings of some rows."""
    codec = subject.codec
    if settings.prompt is not None:
        return [Prompt(codec.prompt(settings.prompt), None)]
    if settings.task == "preference":
        return [Prompt(pair.prompt.tolist(), None) for pair in data.validation[:_SAMPLES]]
    asked = (each for each in questions(data.validation, codec.begin) if len(each.prompt) <= _LONGEST_PROMPT)
    found = [Prompt(each.prompt, codec.decode(each.answer).strip()) for each in itertools.islice(asked, _SAMPLES)]
    starts = (row.tokens[row.segments == 1][:_PROMPT_TOKENS].tolist() for row in data.validation[:_SAMPLES])
    return found or [Prompt(tokens, None) for tokens in starts]


def runnable(apply: Callable[..., Any], adapted: jlora.Adapted) -> tuple[Callable[..., Any], Any]:
    """A model's function and its params with the adapters: merged, or lifted where no weight, or a decoded one, would stand."""
    coded = any(isinstance(leaf, jlora.Stored) for leaf in paths.leaves(adapted.base))
    if not coded and all(site.method.mergeable for site in adapted.plan.sites):
        return apply, jlora.merge(adapted)
    return with_prompts(jlora.lift(apply)), adapted


def samples(
    subject: Subject, asked: Sequence[Prompt], settings: Settings, adapted: jlora.Adapted | None = None
) -> list[str]:
    """What the model writes after each prompt.

    Args:
        subject: the model.
        asked: the prompts.
        settings: seed and number of tokens.
        adapted: its base with adapters; by default the base alone.
    """
    apply, codec = subject.model.apply, subject.codec
    written = models.generate(
        *((apply, subject.params) if adapted is None else runnable(apply, adapted)),
        [each.tokens for each in asked],
        max_new_tokens=settings.sample_tokens,
        temperature=_TEMPERATURE,
        eos_id=codec.end,
        key=jax.random.key(settings.seed),
    )
    starts = [codec.decode(each.tokens) for each in asked]
    whole = [codec.decode([*each.tokens, *tokens]) for each, tokens in zip(asked, written)]
    return [text.removeprefix(start) for text, start in zip(whole, starts)]
