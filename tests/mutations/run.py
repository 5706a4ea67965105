"""Puts the mutations into copies of the repository, one at a time, and runs the tests that should see them.

By hand, from the top of the repository; all of them take about half an hour on two cores:

    python tests/mutations/run.py --jobs 2 --write tests/mutations/RESULTS.md
    python tests/mutations/run.py --only dropout

A mutation is killed where its tests turn red. Exit code 1 if fewer than 95 % of those that can be seen are.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from mutations.catalogue import MUTATIONS
from mutations.mutation import Mutation

TOP = Path(__file__).parents[2]
WANTED = 0.95
WORDS = ("killed", "survived", "equivalent")
PARTS = ("jlora", "tests", "docs", "experiments", "pyproject.toml", "README.md", "CHANGELOG.md")


@dataclass(frozen=True)
class Outcome:
    """What came of a mutation: "killed", "survived" or "equivalent", after so many seconds; the end of pytest's text."""

    mutation: Mutation
    word: str
    seconds: float
    text: str = ""


class Pytest:
    """Runs plain pytest in a copy of the repository; `stop` ends what is running."""

    def __init__(self):
        self.running, self.stopped = set(), False

    def __call__(
        self, top: Path, tests: Sequence[str], *flags: str, limit: float | None = None
    ) -> tuple[bool | None, str]:
        """Whether a test was red, also after `limit` seconds; None where there was nothing to run; and the text."""
        environment = {"JLORA_DATA": str(TOP.parent / "shared" / "data"), **os.environ}
        environment |= {"PYTHONPATH": str(top), "PYTHONDONTWRITEBYTECODE": "1"}
        # A session of its own, so that it ends with all that it started.
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *flags, *tests],
            cwd=top, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        self.running.add(process)
        try:
            if self.stopped:
                _end(process)
            text, _ = process.communicate(timeout=limit)
            return _is_red(process.returncode, text), text
        except subprocess.TimeoutExpired:
            _end(process)
            process.communicate()
            return True, f"ended after {limit:g} s"
        finally:
            self.running.discard(process)

    def stop(self) -> None:
        """Ends all that runs, and all that would still begin."""
        self.stopped = True
        for process in list(self.running):
            _end(process)


def _is_red(code: int, text: str) -> bool | None:
    """What an exit code says: 1 of a test that failed, 2 and 4 also of a file that can't be imported."""
    if code in (0, 1):
        return code == 1
    return True if "ERROR collecting" in text else None


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def copies(number: int) -> Iterator[queue.Queue[Path]]:
    """Copies of the repository, which are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="jlora_mutations_") as folder:
        free: queue.Queue[Path] = queue.Queue()
        for n in range(number):
            top = Path(folder) / str(n)
            top.mkdir()
            for part in PARTS:
                if (TOP / part).is_dir():
                    shutil.copytree(TOP / part, top / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
                else:
                    shutil.copy2(TOP / part, top / part)
            free.put(top)
        yield free


def tried(mutation: Mutation, free: queue.Queue[Path], pytest: Pytest, limit: float) -> Outcome:
    """A mutation in one of the copies, which is as it was afterwards.

    Raises:
        ValueError: where its text does not stand there once, or its tests are none.
    """
    top, start = free.get(), time.monotonic()
    file = top / mutation.file
    before = file.read_text(encoding="utf-8")
    try:
        file.write_text(mutation.applied(before), encoding="utf-8")
        red, text = pytest(top, mutation.tests, "-x", limit=limit)
    finally:
        file.write_text(before, encoding="utf-8")
        free.put(top)
    if red is None and not pytest.stopped:
        raise ValueError(f"{mutation.name!r}: pytest could not run {' '.join(mutation.tests)}\n{text[-2000:]}")
    word = "killed" if red else "equivalent" if mutation.equivalent else "survived"
    return Outcome(mutation, word, time.monotonic() - start, text[-2000:])


def check_original(chosen: Sequence[Mutation], free: queue.Queue[Path], pytest: Pytest) -> None:
    """The tests are green without any mutation.

    Raises:
        ValueError: where they are not: then red would say nothing.
    """
    top = free.get()
    red, text = pytest(top, sorted({test for mutation in chosen for test in mutation.tests}))
    free.put(top)
    if red is not False and not pytest.stopped:
        raise ValueError(f"the tests are red without any mutation; mend them first\n{text[-4000:]}")


def run(chosen: Sequence[Mutation], jobs: int, limit: float, original: bool) -> list[Outcome]:
    """What came of some mutations, with a line for each as it comes."""
    pytest, outcomes = Pytest(), []
    with copies(jobs) as free, ThreadPoolExecutor(jobs) as pool:
        try:
            if original:
                print("the named tests without any mutation ...", flush=True)
                check_original(chosen, free, pytest)
            waiting = [pool.submit(tried, mutation, free, pytest, limit) for mutation in chosen]
            for number, done in enumerate(as_completed(waiting), 1):
                outcome = done.result()
                outcomes.append(outcome)
                words = f"{number}/{len(chosen)} {outcome.word:<10} {outcome.seconds:5.1f} s"
                print(f"{words}  {outcome.mutation.file}: {outcome.mutation.name}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            pytest.stop()
            raise
    return sorted(outcomes, key=lambda outcome: chosen.index(outcome.mutation))


def share(outcomes: Sequence[Outcome]) -> float:
    """The killed of those that can be."""
    matter = [outcome for outcome in outcomes if outcome.word != "equivalent"]
    return sum(outcome.word == "killed" for outcome in matter) / max(len(matter), 1)


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes in Markdown, by part of the package; then all that was not killed."""
    rows = ["| part | mutations | killed | survived | equivalent |", "|---|---|---|---|---|"]
    parts = sorted({_part(outcome) for outcome in outcomes})
    for part in [*parts, "all"]:
        words = [outcome.word for outcome in outcomes if part in ("all", _part(outcome))]
        rows.append(f"| {part} | {len(words)} | " + " | ".join(str(words.count(w)) for w in WORDS) + " |")
    rows += ["", f"{100 * share(outcomes):.1f} % of those that can be seen are killed."]
    left = [outcome for outcome in outcomes if outcome.word != "killed"]
    if left:
        rows += ["", "| not killed | file | why |", "|---|---|---|"]
        rows += [f"| {o.mutation.name} | `{o.mutation.file}` | {o.mutation.equivalent or 'survived'} |" for o in left]
    return "\n".join(rows)


def page(outcomes: Sequence[Outcome]) -> str:
    """The table with what it is of."""
    about = (
        f"What `python tests/mutations/run.py` found on JAX {version('jax')}: small faults, put into the code one at a "
        "time, and whether the tests that are named beside each turn red. Equivalent ones change nothing that a test "
        "could see."
    )
    return f"# Mutations\n\n{textwrap.fill(about, 125)}\n\n{table(outcomes)}\n"


def _part(outcome: Outcome) -> str:
    return f"`{Path(outcome.mutation.file).parent}/`"


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="mutations whose name or file this is found in")
    parser.add_argument("--list", action="store_true", help="print the mutations, and run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time, each in a copy of its own (1)")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a run counts as red (600)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="a Markdown page for the table")
    parser.add_argument("--no-original", action="store_true", help="don't run the tests without any mutation first")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    given = parsed(arguments)
    chosen = [m for m in MUTATIONS if re.search(given.only, f"{m.file}: {m.name}")]
    if not chosen:
        print(f"no mutation is named like {given.only!r}; --list shows them", file=sys.stderr)
        return 2
    if given.list:
        print("\n".join(f"{m.file}: {m.name}" for m in chosen))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    outcomes = run(chosen, max(given.jobs, 1), given.limit, not given.no_original)
    text = table(outcomes)
    print(f"\n{text}")
    if given.write is not None:
        given.write.write_text(page(outcomes), encoding="utf-8")
    return 0 if share(outcomes) >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
