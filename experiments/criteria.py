"""What a study will count as what, written beside its results before the first run, and what its plan must keep to.

The rules in words are in experiments/README.md. A study that has criteria is refused where its plan breaks one of them, and
where results exist that were made under other criteria, or under none.
"""

import dataclasses
import datetime
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]

#: Seeds that decide a difference, and seeds that choose a learning rate: at least.
DECIDING, CHOOSING = 10, 3
#: The first of the seeds that choose a rate; none of them is reported.
FIRST_CHOOSING = 100
#: How papers compare, and what each method can do: the baseline's best rate for all, and each method's own.
READINGS = ("shared", "tuned")


@dataclass(frozen=True)
class Criterion:
    """One claim, and what will be held against it.

    Attributes:
        claim: the claim, in words.
        paper: where it is made, with the number that is claimed.
        difference: what is measured for each seed, with its unit; above zero is the claimed side.
        effect: the paper's number in that unit, above zero.
        tasks: where it is tried; the pooled test is over all of them.
        seeds: of the runs that are reported.
        kind: "level" (how good at the end) or "faster" (runs of a quarter, half and all of the steps, each with full decay).
        rates: "chosen" (by seeds that are not reported, in both readings), or "measured", where rates are what the claim is
            about.
        small: the size of a small machine: fewer seeds are allowed, and nothing but a direction follows.

    Raises:
        ValueError: for what the rules don't allow.
    """

    claim: str
    paper: str
    difference: str
    effect: float
    tasks: tuple[str, ...]
    seeds: int
    kind: str = "level"
    rates: str = "chosen"
    small: bool = False

    def __post_init__(self) -> None:
        if not self.effect > 0:
            raise ValueError(f"{self.claim!r}: the paper's effect is above zero on the claimed side, got {self.effect}")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"{self.claim!r}: wanted one task at least, each once; got {self.tasks}")
        if self.seeds < (least := 2 if self.small else DECIDING):
            raise ValueError(f"{self.claim!r}: wanted {least} seeds at least, got {self.seeds}")
        for name, known in (("kind", ("level", "faster")), ("rates", ("chosen", "measured"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{self.claim!r}: {name} must be one of {known}, got {getattr(self, name)!r}")


def horizons(steps: int) -> tuple[int, ...]:
    """A quarter, half and all of the steps: separate runs, each of which decays to zero, tell who is faster."""
    if steps < 4:
        raise ValueError(f"a quarter of the steps must be one at least, got {steps} steps")
    return steps // 4, steps // 2, steps


def register(path: Path, criteria: Iterable[Criterion], runs: int) -> None:
    """Writes criteria down before the first run; refuses where others are written, or none before runs that exist.

    Args:
        path: of the file.
        criteria: of the study as it is now.
        runs: number of results that exist.

    Raises:
        ValueError: in one sentence, what differs.
    """
    now = json.loads(json.dumps([dataclasses.asdict(each) for each in criteria]))
    if not path.exists():
        if runs:
            raise ValueError(
                f"{path} is missing and {runs} runs are done: a criterion that comes after results is none"
            )
        date = datetime.date.today().isoformat()
        path.write_text(json.dumps({"registered": date, "criteria": now}, indent=2) + "\n")
        return
    written = json.loads(path.read_text())["criteria"]
    if len(written) != len(now):
        raise ValueError(f"{path} has {len(written)} criteria, the study now has {len(now)}; choose another --out")
    for before, after in zip(written, now):
        for name in before.keys() | after.keys():
            if before.get(name) != after.get(name):
                raise ValueError(
                    f"{path} says {name} {before.get(name)!r}, the study now says {after.get(name)!r}; a criterion "
                    "doesn't change once it is written: choose another --out"
                )


def broken(criterion: Criterion, planned: list[Record]) -> list[str]:
    """The rules that the runs of a finished plan don't keep, in sentences.

    Args:
        criterion: of the study.
        planned: settings: "stage" ("choose" or "run"), "task" and "seed"; with chosen rates "rate" and "reading"; for "faster"
            "steps".
    """
    runs = [each for each in planned if each["stage"] == "run"]
    chosen = [each for each in planned if each["stage"] == "choose"]
    found = []
    if (tasks := {each["task"] for each in runs}) != set(criterion.tasks):
        found.append(f"the runs are on {sorted(tasks)}, the criterion says {sorted(criterion.tasks)}")
    found += _few(runs, criterion.seeds, "a reported setting")
    if criterion.rates == "chosen":
        found += _few(chosen, CHOOSING, "a rate that is tried")
        if both := {each["seed"] for each in chosen} & {each["seed"] for each in runs}:
            found.append(f"seeds {sorted(both)} choose a rate and are reported")
        for task in criterion.tasks:
            readings = {each.get("reading") for each in runs if each["task"] == task}
            if not chosen or readings != set(READINGS):
                found.append(f"on {task} the readings are {sorted(map(str, readings))}, wanted {list(READINGS)}")
    if criterion.kind == "faster":
        for task in criterion.tasks:
            steps = {each["steps"] for each in runs if each["task"] == task}
            if not steps or steps != set(horizons(max(steps))):
                found.append(f"on {task} runs have {sorted(steps)} steps, wanted a quarter, half and all")
    return found


def _few(settings: list[Record], least: int, what: str) -> list[str]:
    """A sentence about each setting that has fewer seeds than wanted."""
    seeds: dict[str, set[int]] = {}
    for each in settings:
        rest = {name: value for name, value in each.items() if name != "seed"}
        seeds.setdefault(json.dumps(rest, sort_keys=True), set()).add(each["seed"])
    return [f"{what} has {len(each)} seeds, wanted {least}: {key}" for key, each in seeds.items() if len(each) < least]
