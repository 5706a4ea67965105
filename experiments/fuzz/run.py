"""A fuzz of `jlora.lift`: random functions of random params, adapted by every method, beside the functions of merged params.

    python experiments/fuzz/run.py --count 1000 --seed 0

Prints counts by outcome and by what happens in the programs, and for every fault the smallest program that shows it.
"""

import argparse
import collections
import time
from pathlib import Path

import jax
import programs
import steps
from checks import Outcome, check, shrunk
from programs import Program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="number of programs")
    parser.add_argument("--seed", type=int, default=0, help="number of the first one")
    parser.add_argument(
        "--without", nargs="*", default=[], help="names of steps, nests or ends: no programs that have them"
    )
    parser.add_argument("--out", type=Path, help="where to write the counts as JSON and the faults as text")
    options = parser.parse_args()
    jit = lambda f: jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})  # noqa: E731
    outcomes, start = {}, time.perf_counter()
    faults = []
    for number in range(options.seed, options.seed + options.count):
        program = programs.random_program(number)
        if set(options.without) & set(program.kinds()):
            continue
        outcome = check(program, jit)
        outcomes[number] = (program, outcome)
        if outcome.fault:
            program, outcome = shrunk(program, outcome, jit)
            faults.append(report(number, program, outcome))
            print(faults[-1], flush=True)
        if number % 50 == 49:
            print(number + 1, f"{time.perf_counter() - start:.0f} s", flush=True)
            jax.clear_caches()
    print(table(outcomes))
    if options.out:
        options.out.write_text("\n\n".join(faults) + "\n" + table(outcomes) + "\n")


def report(number: int, program: Program, outcome: Outcome) -> str:
    """A fault as a program that can be read."""
    spec = ", ".join(f"{leaf.name} {leaf.shape} {leaf.dtype} {leaf.entry()!r}" for leaf in program.leaves)
    return f"--- seed {number}: {outcome.kind} {outcome.detail}\n{spec}\n{program.source()}"


def table(outcomes: dict[int, tuple[Program, Outcome]]) -> str:
    """Counts by outcome, and by outcome for each kind of step and each method."""
    kinds = collections.Counter(outcome.kind for _, outcome in outcomes.values())
    columns = [kind for kind, _ in kinds.most_common()]
    rows: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for program, outcome in outcomes.values():
        for name in program.kinds():
            rows[name][outcome.kind] += 1
        for method in {type(leaf.method).__name__ for leaf in program.leaves}:
            rows[method][outcome.kind] += 1
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines.append("| all programs | " + " | ".join(str(kinds[kind]) for kind in columns) + " |")
    methods = sorted(set(rows) - set(steps.kinds()))
    for name in [*steps.STEPS, *steps.NESTS, *steps.USES, *methods]:
        lines.append(f"| {name} | " + " | ".join(str(rows[name][kind] or "") for kind in columns) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
