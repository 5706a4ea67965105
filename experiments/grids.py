"""Which learning rates are tried: grids that grow until the best rate lies inside, and the plan of a comparison."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from criteria import CHOOSING, FIRST_CHOOSING, READINGS, Criterion, horizons

Record = dict[str, Any]

#: Rates by which a grid may grow, over both ends.
MOST = 4


def best(losses: dict[float, float]) -> float:
    """The rate with the lowest loss; of equal ones, and where all diverged, the lowest rate."""
    return min(losses, key=lambda rate: (losses[rate] if np.isfinite(losses[rate]) else np.inf, rate))


def inside(losses: dict[float, float]) -> bool:
    """Whether the best rate has tried rates on both sides, and is one that did not diverge."""
    found = best(losses)
    return min(losses) < found < max(losses) and bool(np.isfinite(losses[found]))


def grown(losses: dict[float, float], start: Iterable[float], most: int = MOST) -> float | None:
    """The next rate to try: beyond the end where the best one lies, as far as that end's last two rates are apart.

    Args:
        losses: for every rate tried, the mean loss over the seeds that choose.
        start: the grid at the beginning, two rates at least.
        most: rates by which the grid may grow.

    Returns:
        A rate, or None: the best lies inside, or the grid has grown by `most`.

    Raises:
        ValueError: for a grid of fewer than two rates, or rates that are not positive.
    """
    start, rates = sorted(start), sorted(losses)
    if len(start) < 2 or start[0] <= 0:
        raise ValueError(f"a grid that can grow has two positive rates at least, got {start}")
    if inside(losses) or len(rates) - len(start) >= most:
        return None
    lowest = best(losses) == rates[0]
    end, next_to = (rates[0], rates[1]) if lowest else (rates[-1], rates[-2])
    return float(f"{end * end / next_to:.6g}")


def plan(
    results: list[Record],
    criterion: Criterion,
    variants: list[Record],
    start: Callable[[str, Record], Iterable[float]],
    fixed: Callable[[str], Record],
    steps: int,
    most: int = MOST,
) -> list[Record]:
    """The runs of a comparison by the rules, as far as they can be known; asked again when these are done.

    Rates are chosen by the mean of "train_loss", the loss on fixed rows of the training data, over seeds that are not
    reported, for each number of steps by itself. Then every variant runs over the seeds in both readings: "shared", at the
    best rate of the first variant, the baseline, and "tuned", at its own. For the baseline both are the same: "shared".

    Args:
        results: as `study.Study.plan` gets them.
        criterion: of the study.
        variants: settings in which the methods differ, the baseline first.
        start: the grid of a variant on a task; it grows by itself.
        fixed: further settings of all runs on a task.
        steps: of the longest run.
        most: rates by which a grid may grow.
    """
    lengths = horizons(steps) if criterion.kind == "faster" else (steps,)
    asked = [{"task": task, **fixed(task), "steps": length} for task in criterion.tasks for length in lengths]
    places = [(place, variant) for place in asked for variant in variants]
    chosen, tables, waiting = [], {}, False
    for number, (place, variant) in enumerate(places):
        rates, table = list(start(place["task"], variant)), None
        while (table := losses(results, {**place, **variant}, rates)) is not None:
            if (more := grown(table, list(start(place["task"], variant)), most)) is None:
                break
            rates.append(more)
        waiting |= table is None
        tables[number] = table
        chosen += [
            {"stage": "choose", **place, **variant, "rate": rate, "seed": FIRST_CHOOSING + seed}
            for rate in rates
            for seed in range(CHOOSING)
        ]
    if waiting:
        return chosen
    runs = []
    for number, (place, variant) in enumerate(places):
        baseline = number - number % len(variants)
        # The baseline's two readings are the same runs.
        for reading, by in zip(READINGS, (baseline, number) if number != baseline else (baseline,)):
            rate = best(tables[by])
            runs += [
                {"stage": "run", **place, **variant, "reading": reading, "rate": rate, "seed": seed}
                for seed in range(criterion.seeds)
            ]
    return chosen + runs


def losses(results: list[Record], settings: Record, rates: Iterable[float]) -> dict[float, float] | None:
    """For each rate the mean training loss of the runs that choose with these settings; None where one is not done yet."""
    table = {}
    for rate in rates:
        wanted = {"stage": "choose", **settings, "rate": rate}
        found = {
            each["settings"]["seed"]: each["train_loss"]
            for each in results
            if {name: value for name, value in each["settings"].items() if name != "seed"} == wanted
        }
        if len(found) < CHOOSING:
            return None
        table[rate] = float(np.mean(list(found.values())))
    return table


def ends(criterion: Criterion, results: list[Record]) -> list[str]:
    """For every setting whose best rate lies at an end of its grid, or diverged, a sentence: the grid's limit was reached."""
    tables: dict[tuple[Any, ...], dict[float, list[float]]] = {}
    for each in results:
        settings = each["settings"]
        if settings["stage"] == "choose" and settings["task"] in criterion.tasks:
            key = tuple(sorted((n, v) for n, v in settings.items() if n not in ("rate", "seed", "stage")))
            tables.setdefault(key, {}).setdefault(settings["rate"], []).append(each["train_loss"])
    told = []
    for key, table in tables.items():
        means = {rate: float(np.mean(found)) for rate, found in table.items()}
        if not inside(means):
            place = ", ".join(f"{name} {value}" for name, value in key)
            told.append(f"at an end of its grid, {best(means):g} of {min(means):g} to {max(means):g}: {place}")
    return told
