"""A text continued by the model, before and after training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

import jlora
from jlora import models, paths
from jlora.prompts.prompted import virtual_of
from jlora.training.data.dataset import Data
from jlora.training.data.preferences.pairs import Pair
from jlora.training.model.subject import Subject
from jlora.training.settings.fields import Settings

# Drawn, not the likeliest token each time: small models repeat themselves otherwise. The same key before and after.
_TEMPERATURE = 0.7
_PROMPT_TOKENS = 16


def prompt_tokens(subject: Subject, data: Data, settings: Settings) -> list[int]:
    """The settings' prompt, or the beginning of the first validation example; of a pair the prompt."""
    if settings.prompt is not None:
        return subject.codec.prompt(settings.prompt)
    first = data.validation[0]
    if isinstance(first, Pair):
        return first.prompt.tolist()
    return first.tokens[first.segments == 1][:_PROMPT_TOKENS].tolist()


def runnable(apply: Callable[..., Any], adapted: jlora.Adapted) -> tuple[Callable[..., Any], Any]:
    """A model's function and its params with the adapters: merged, or lifted where no weight, or a decoded one, would stand."""
    coded = any(isinstance(leaf, jlora.Stored) for leaf in paths.leaves(adapted.base))
    if not coded and all(site.method.mergeable for site in adapted.plan.sites):
        return apply, jlora.merge(adapted)
    lifted = jlora.lift(apply)
    return jlora.prompted(lifted) if virtual_of(adapted) else lifted, adapted


def sample(subject: Subject, prompt: list[int], settings: Settings, adapted: jlora.Adapted | None = None) -> str:
    """What the model writes after the prompt.

    Args:
        subject: the model.
        prompt: token ids, at least one.
        settings: seed and number of tokens.
        adapted: its base with adapters; by default the base alone.
    """
    apply = subject.model.apply
    written = models.generate(
        *((apply, subject.params) if adapted is None else runnable(apply, adapted)),
        [prompt],
        max_new_tokens=settings.sample_tokens,
        temperature=_TEMPERATURE,
        eos_id=subject.codec.end,
        key=jax.random.key(settings.seed),
    )
    start = subject.codec.decode(prompt)
    return subject.codec.decode([*prompt, *written[0]]).removeprefix(start)
