"""Examples of preferences: two rows of tokens that a step sees together."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np

from jlora.training.data.encode import Example, language_example


@dataclasses.dataclass(frozen=True)
class Pair:
    """A prompt with two answers, each a row that predicts the answer.

    Attributes:
        first: the prompt with the better answer; with an answer by itself, where there is no other.
        second: the prompt with the worse answer; with the answer of another prompt, where `first` is an answer by itself.
        desirable: for an answer by itself 1 or 0, whether it is good; -1 for pairs.
    """

    first: Example
    second: Example
    desirable: int = -1

    def __len__(self) -> int:
        return max(len(self.first), len(self.second))

    @property
    def cut(self) -> bool:
        """Whether an answer was longer and its end is left out."""
        return self.first.cut or self.second.cut

    @property
    def prompt(self) -> np.ndarray:
        """The tokens before the answer."""
        return self.first.tokens[: 1 + int(np.argmax(self.first.weights))]


def mismatched(pairs: Sequence[Pair], max_length: int) -> list[Pair]:
    """Answers by themselves, each with its prompt and the answer to the last other prompt before it as the second row.

    Of these rows a batch estimates how far the model is from its base. The first ones take those of the last.
    """
    found = others([pair.prompt.tobytes() for pair in pairs])
    return [beside(pair, pairs[other], max_length) for pair, other in zip(pairs, found)]


def one_prompt(pairs: Sequence[Pair]) -> bool:
    """Whether all have the same prompt, so that none stands beside the answer to another."""
    return all(np.array_equal(pair.prompt, pairs[0].prompt) for pair in pairs)


def others(prompts: Sequence[Hashable]) -> list[int]:
    """For each of the prompts in a row the number of the last other one before it; the first ones take those of the last."""
    other = [index - 1 for index in range(len(prompts))]
    for number in range(2 * len(prompts)):  # twice, since what comes before the first are the last
        index = number % len(prompts)
        if prompts[index - 1] == prompts[index]:
            other[index] = other[index - 1]
    return other


def beside(pair: Pair, other: Pair, max_length: int) -> Pair:
    """An answer with its prompt, and that prompt with the answer of another."""
    return dataclasses.replace(pair, second=_joined(pair, other, max_length))


def _joined(pair: Pair, other: Pair, max_length: int) -> Example:
    answer = other.first.targets[other.first.weights > 0]
    tokens = np.concatenate([pair.prompt, answer])[: max_length + 1]
    return language_example(tokens, np.arange(len(tokens)) >= len(pair.prompt))
