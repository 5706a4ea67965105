"""How many free directions a task needs: the dimension of a random subspace in which training reaches 90 % of the whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class TaskDimension:
    """The intrinsic dimension of a task.

    Attributes:
        dimension: the least dimension that was tried and reached the wanted score.
        wanted: that score.
        scores: the score of each dimension that was tried.
    """

    dimension: int
    wanted: float
    scores: dict[int, float]


def intrinsic_dimension_90(
    score: Callable[[int], float],
    whole: float,
    *,
    least: int = 10,
    most: int = 1_000_000,
    precision: float = 0.1,
    share: float = 0.9,
    say: Callable[[str], None] | None = None,
) -> TaskDimension:
    """The least dimension of a random subspace at which training reaches 90 % of the score of full fine-tuning.

    By doubling from `least`, then by halving the ratio between the largest dimension that failed and the least that did not.
    Every dimension is tried once. It takes scores to rise with the dimension, as the paper does: a score by luck misleads it,
    so let `score` take the best of some learning rates, or a mean over seeds.

    Args:
        score: trains in a subspace of a dimension, with adapters of `SAID(dimension)`, and gives its score; higher is better.
        whole: the score of full fine-tuning, positive.
        least: where to begin.
        most: where to give up.
        precision: the search ends where the answer is known to this part of itself.
        share: of `whole` that is wanted.
        say: told of every score, for progress.

    Returns:
        The dimension, with all scores.

    Raises:
        ValueError: for an argument out of range, a score that is no number, or if no dimension up to `most` reaches the wanted
            score; the message has the best one.

    Example:
        >>> found = jlora.intrinsic_dimension_90(lambda d: 1 - 5 / d, whole=1.0, precision=0.01)
        >>> found.dimension, found.wanted
        (50, 0.9)

    Reference:
        Aghajanyan et al. 2020, arXiv:2012.13255, after Li et al. 2018, arXiv:1804.08838.
    """
    if not (math.isfinite(whole) and whole > 0 and 0 < share <= 1 and precision > 0 and 1 <= least <= most):
        raise ValueError(
            "wanted whole > 0, 0 < share <= 1, precision > 0 and 1 <= least <= most, got "
            f"whole={whole}, share={share}, precision={precision}, least={least}, most={most}"
        )
    wanted, scores = share * whole, {}

    def reaches(dimension: int) -> bool:
        found = float(score(dimension))
        if not math.isfinite(found):
            raise ValueError(f"the score of dimension {dimension} is {found}, which is no number to go by")
        scores[dimension] = found
        if say is not None:
            say(f"dimension {dimension}: {found:.4g} of {wanted:.4g} wanted")
        return found >= wanted

    below, dimension = 0, least
    while not reaches(dimension):
        if dimension == most:
            best = max(scores, key=lambda each: scores[each])
            raise ValueError(
                f"no dimension up to {most} reaches {wanted:.4g}: the best is {scores[best]:.4g}, at {best}; raise most, or "
                "look whether the learning rate fits"
            )
        below, dimension = dimension, min(2 * dimension, most)
    while below and dimension - below > max(1, precision * dimension):
        middle = max(below + 1, math.isqrt(below * dimension))
        below, dimension = (below, middle) if reaches(middle) else (middle, dimension)
    return TaskDimension(dimension, wanted, scores)
