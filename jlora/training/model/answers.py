"""Answers that the model writes to the prompts of rows, and how they compare with the rows' own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

import jlora
from jlora import models
from jlora.training.data.dataset import Data
from jlora.training.data.encode import Example
from jlora.training.errors import SettingError
from jlora.training.model.losses import with_prompts
from jlora.training.model.subject import Subject
from jlora.training.settings.fields import Settings
from jlora.training.settings.scored import METRICS


class Question(NamedTuple):
    """A prompt and the answer that the data has to it.

    Attributes:
        prompt: token ids up to the answer.
        answer: token ids of the answer, with the token that ends it where there is one.
    """

    prompt: list[int]
    answer: list[int]


def questions(examples: Sequence[Example], begin: int | None) -> Iterator[Question]:
    """The last answer of each row that has a prompt before one; packed rows are taken apart.

    Args:
        examples: rows of a language model.
        begin: the token that begins a text, which alone is no prompt.
    """
    for example in examples:
        for segment in range(1, int(example.segments.max(initial=0)) + 1):
            inside = example.segments == segment
            tokens, targets, learned = example.tokens[inside], example.targets[inside], example.weights[inside] > 0
            if not learned.any():
                continue
            end = len(learned) - int(np.argmax(learned[::-1]))
            start = end - int(np.argmin(np.append(learned[:end][::-1], False)))
            prompt = tokens[: start + 1].tolist()
            if start > 0 or (prompt and prompt[0] != begin and not learned.all()):
                yield Question(prompt, targets[start:end].tolist())


def check_metric(settings: Settings) -> None:
    """What the metric needs is installed.

    Raises:
        SettingError: with the extra to install.
    """
    if settings.metric == "rouge_l" and importlib.util.find_spec("rouge_score") is None:
        raise SettingError("metric", "rouge_l needs the package rouge-score: pip install 'jlora[rouge]'")


def make_written(
    subject: Subject, data: Data, settings: Settings
) -> Callable[[jlora.Adapted], dict[str, float]] | None:
    """A function of adapters that gives the metrics of what the model writes; None where `--metric` is of the loss.

    Answers are the likeliest token each time, a little longer than the longest of the data's.

    Raises:
        SettingError: where no row of the validation has a prompt and an answer.
    """
    if not METRICS[settings.metric].written:
        return None
    asked = [each for each, _ in zip(questions(data.validation, subject.codec.begin), range(settings.metric_rows))]
    if not asked:
        raise SettingError(
            "metric", f"{settings.metric} compares answers, but no row of the validation has a prompt and an answer"
        )
    codec, apply = subject.codec, with_prompts(jlora.lift(subject.model.apply))
    wanted = [codec.decode(each.answer).strip() for each in asked]
    longest = max(len(each.answer) for each in asked)

    def written(adapted: jlora.Adapted) -> dict[str, float]:
        given = [each.prompt for each in asked]
        found = models.generate(apply, adapted, given, max_new_tokens=longest + 1, eos_id=codec.end)
        texts = [codec.decode(tokens).strip() for tokens in found]
        scores = {"exact_match": exact_match(texts, wanted)}
        return scores | ({"rouge_l": rouge_l(texts, wanted)} if settings.metric == "rouge_l" else {})

    return written


def exact_match(texts: Sequence[str], wanted: Sequence[str]) -> float:
    """The share of texts that are those wanted, to the letter."""
    return sum(text == right for text, right in zip(texts, wanted, strict=True)) / len(wanted)


def rouge_l(texts: Sequence[str], wanted: Sequence[str]) -> float:
    """The mean F-measure of ROUGE-L, by the package rouge-score, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer  # pyright: ignore[reportMissingImports]

    scorer: Any = RougeScorer(["rougeL"])
    return sum(scorer.score(right, text)["rougeL"].fmeasure for text, right in zip(texts, wanted)) / len(wanted)
