"""What follows from differences by seed: intervals, what a study could have seen, and verdicts that treat both sides alike.

A claim is tried in cases, one for each task, since budgets or sizes on one task share its data and are no further witnesses.
It is

- "reproduced" where the 95 % interval of the difference lies on the claimed side in every case that can speak,
- "reproduced in part" where it does so in two at least, and on the other side in none,
- "contradicted" and "contradicted in part" by the same rule for the other side,
- "inconclusive" otherwise, and always where fewer than two cases can speak.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

#: Cases on a side from which a verdict may follow.
LEAST = 2


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and the half width of its 95 % interval by Student's t; nan for one value."""
    values = [float(value) for value in values]
    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(half)


def shown(values: list[float], digits: int = 3) -> str:
    """ "mean ± half width" """
    mean, half = interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def paired(ours: list[float], theirs: list[float], digits: int = 3) -> tuple[str, float, float]:
    """The mean difference over seeds with its interval as text, and both ends of the interval."""
    mean, half = interval([a - b for a, b in zip(ours, theirs, strict=True)])
    return f"{mean:+.{digits}f} ± {half:.{digits}f}", mean - half, mean + half


def surely_above(values: list[float], than: float) -> bool:
    """Whether the 95 % interval of the mean lies above a number."""
    mean, half = interval(values)
    return mean - half > than


def visible(values: list[float]) -> float:
    """The size of a true difference that about 8 of 10 such studies would see: whose 95 % interval would not hold zero.

    From the spread over seeds, `(t(0.975) + t(0.8)) * deviation / sqrt(seeds)`; nan for one value.
    """
    if len(values) < 2:
        return float("nan")
    quantiles = stats.t.ppf(0.975, len(values) - 1) + stats.t.ppf(0.8, len(values) - 1)
    return float(quantiles * np.std(values, ddof=1) / np.sqrt(len(values)))


@dataclass(frozen=True)
class Case:
    """One place where a claim is tried.

    Attributes:
        name: the task.
        differences: one for each seed; above zero is the claimed side.
        mute: why nothing follows from the numbers here, if so.
        doubted: sides, "above" and "below", that a better choice of a learning rate could undo; see `doubts`.
    """

    name: str
    differences: list[float]
    mute: str = ""
    doubted: tuple[str, ...] = ()

    @property
    def side(self) -> str:
        """On which side the interval lies: "above", "below", or "neither"."""
        mean, half = interval(self.differences)
        found = "above" if mean - half > 0 else "below" if mean + half < 0 else "neither"
        return "neither" if found in self.doubted else found

    @property
    def stands(self) -> str:
        """Where the interval lies, or why that does not count, in words."""
        if self.mute:
            return f"not counted: {self.mute}"
        if Case(self.name, self.differences).side != self.side:
            return "in doubt: a best rate lies at an end of its grid"
        return {"above": "on the claimed side", "below": "on the other side", "neither": "on neither side"}[self.side]


def doubts(ours_at_end: object, theirs_at_end: object) -> tuple[str, ...]:
    """The sides that are in doubt where a best rate is at an end of its grid: a wider grid could favour that method alone."""
    return (("below",) if ours_at_end else ()) + (("above",) if theirs_at_end else ())


def pooled(differences: list[list[float]]) -> list[float]:
    """The mean over settings of one task, such as budgets, for each seed."""
    return np.mean(np.array(differences), axis=0).tolist()


def word(cases: list[Case]) -> str:
    """The verdict in a word or three."""
    sides = [case.side for case in cases if not case.mute]
    if len(sides) < LEAST:
        return "inconclusive"
    for side, other, name in (("above", "below", "reproduced"), ("below", "above", "contradicted")):
        if sides.count(side) >= LEAST and not sides.count(other):
            return name if sides.count(side) == len(sides) else f"{name} in part"
    return "inconclusive"


def table(claims: dict[str, list[Case]], digits: int = 3) -> list[str]:
    """A line for every case of every claim."""
    lines = ["| claim | verdict | where | difference | it lies | would have been seen |", "|---|---|---|---|---|---|"]
    for claim, cases in claims.items():
        for number, case in enumerate(cases):
            mean, half = interval(case.differences)
            head = f"{claim} | {word(cases)}" if number == 0 else " | "
            seen = "–" if case.mute else f"{visible(case.differences):.{digits}f}"
            lines.append(f"| {head} | {case.name} | {mean:+z.{digits}f} ± {half:.{digits}f} | {case.stands} | {seen} |")
    return [*lines, "", NOTE]


NOTE = (
    "Differences are positive on the claimed side. The last column: a true difference of this size would have been told from "
    "zero in about 8 of 10 such studies."
)


def verdict(claims: dict[str, list[Case]]) -> str:
    """The claims by their verdicts: "reproduced: a; b. Inconclusive: c."."""
    by_word: dict[str, list[str]] = {}
    for claim, cases in claims.items():
        by_word.setdefault(word(cases), []).append(claim)
    return " ".join(f"{found}: {'; '.join(names)}." for found, names in sorted(by_word.items(), reverse=True))


def could_see(claims: dict[str, list[Case]], digits: int = 3) -> str:
    """For every task that counts, the smallest differences that would have been seen, over all claims."""
    sizes: dict[str, list[float]] = {}
    for case in (case for cases in claims.values() for case in cases if not case.mute):
        sizes.setdefault(case.name, []).append(visible(case.differences))
    if not sizes:
        return "Nothing would have been seen: no task counts."
    told = []
    for name, found in sizes.items():
        ends = dict.fromkeys(f"{end:.{digits}f}" for end in (min(found), max(found)))
        told.append(f"{' to '.join(ends)} on {name}")
    return f"Differences that would have been seen: {', '.join(told)}."
