"""One verdict from all tasks of a claim: a pooled mean, its interval, and what it says of zero and of the paper's effect."""

from dataclasses import dataclass

import numpy as np
from criteria import Criterion
from scipy import stats
from verdicts import Case


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks with its standard error and the degrees of freedom of Student's t."""

    mean: float
    error: float
    freedom: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval."""
        half = stats.t.ppf(0.975, self.freedom) * self.error
        return float(self.mean - half), float(self.mean + half)

    @property
    def p(self) -> float:
        """Of the two-sided test against zero."""
        return float(2 * stats.t.sf(abs(self.mean) / self.error, self.freedom)) if self.error else float(not self.mean)

    @property
    def visible(self) -> float:
        """The smallest true effect that 8 of 10 such studies would tell from zero."""
        return float((stats.t.ppf(0.975, self.freedom) + stats.t.ppf(0.8, self.freedom)) * self.error)


def pool(differences: list[list[float]]) -> Estimate:
    """The mean of the tasks' means, each task counting alike, from paired differences by seed.

    Error `sqrt(Σ s_k² / n_k) / tasks`, degrees of freedom by Welch and Satterthwaite: spreads differ between tasks. It
    speaks of these tasks, not of others that might have been drawn. Not finite differences make everything nan: a run that
    diverged must be given a number by the study.

    Raises:
        ValueError: for no task, or a task with one seed.
    """
    if not differences or min(map(len, differences)) < 2:
        raise ValueError(f"wanted a task at least and two seeds of each, got {[len(each) for each in differences]}")
    shares = np.array([np.var(each, ddof=1) / len(each) for each in differences])
    mean = float(np.mean([np.mean(each) for each in differences]))
    if not shares.any():  # no spread at all: any of the degrees of freedom gives an interval of no width
        return Estimate(mean, 0.0, float(sum(len(each) - 1 for each in differences)))
    freedom = shares.sum() ** 2 / sum(s**2 / (len(each) - 1) for s, each in zip(shares, differences))
    return Estimate(mean, float(np.sqrt(shares.sum()) / len(shares)), float(freedom))


def word(estimate: Estimate, effect: float, doubted: tuple[str, ...] = ()) -> str:
    """The verdict: where the interval lies, seen from zero and from the paper's effect.

    - "reproduced": above zero, and it holds the paper's effect or lies above it.
    - "reproduced, but smaller": above zero, and below the paper's effect.
    - "not of this size": below the paper's effect, and not surely above zero.
    - "contradicted": below zero.
    - "inconclusive": it holds both zero and the paper's effect, or lies on a side that is in doubt.

    Args:
        estimate: of the difference.
        effect: the paper's.
        doubted: "above" where a wider grid could lower the difference, "below" where one could raise it; see
            `verdicts.doubts`.
    """
    low, high = estimate.interval
    if high < 0:
        return "inconclusive" if "below" in doubted else "contradicted"
    smaller = high < effect and "below" not in doubted  # what could gain by a wider grid is not surely smaller
    if low > 0 and "above" not in doubted:
        return "reproduced, but smaller" if smaller else "reproduced"
    return "not of this size" if smaller else "inconclusive"


def rule(criterion: Criterion, cases: list[Case], digits: int = 3) -> list[str]:
    """The lines of a report that say what follows for a criterion: a table, one line of the size, and one of the verdict.

    Raises:
        ValueError: where the cases are not those of the criterion: another task, or other than its number of seeds.
    """
    if sorted(case.name for case in cases) != sorted(criterion.tasks):
        raise ValueError(f"the criterion is about {criterion.tasks}, the cases are {[case.name for case in cases]}")
    for case in cases:
        if len(case.differences) != criterion.seeds:
            raise ValueError(f"{case.name} has {len(case.differences)} seeds, the criterion says {criterion.seeds}")
    lines = ["| where | difference | 95 % interval | would have been seen |", "|---|---|---|---|"]
    for case in cases:
        told = _told(pool([case.differences]), digits)
        lines.append(
            f"| {case.name} | {told} |" if not case.mute else f"| {case.name} | not counted: {case.mute} | – | – |"
        )
    counted = [case for case in cases if not case.mute]
    ours, found = "nothing counts", "inconclusive"
    if counted:
        estimate = pool([case.differences for case in counted])
        lines.append(f"| all tasks, pooled | {_told(estimate, digits)} |")
        low, high = estimate.interval
        ours = (
            f"{estimate.mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f}), p = {estimate.p:.2g} against zero; "
            f"{estimate.visible:.{digits}f} would have been seen; {len(counted)} of {len(cases)} tasks, {criterion.seeds} seeds"
        )
        found = word(estimate, criterion.effect, tuple({side for case in counted for side in case.doubted}))
        if criterion.small:
            side = "above zero" if low > 0 else "below zero" if high < 0 else "not told from zero"
            found = f"inconclusive (small: {side})"
    at_ends = [case.name for case in counted if case.doubted]
    doubt = (f"In doubt: a best rate lies at an end of its grid on {', '.join(at_ends)}.",) if at_ends else ()
    told = (
        f"Difference: {criterion.difference}. Above zero is the claimed side.",
        f"Paper: {criterion.effect:+g} ({criterion.paper}).",
        f"Ours: {ours}.",
        *doubt,
        f"Verdict: {found}: {criterion.claim}.",
    )
    return [*lines, *(line for each in told for line in ("", each))]


def _told(estimate: Estimate, digits: int) -> str:
    low, high = estimate.interval
    return f"{estimate.mean:+.{digits}f} | {low:+.{digits}f} to {high:+.{digits}f} | {estimate.visible:.{digits}f}"
