"""A fuzz of `jlora.lift`: random functions of random params, adapted by methods that can be merged, beside the functions of
merged params.

    python experiments/fuzz/run.py --count 1000 --seed 0

A program's number is all that it is made from (`programs.py`): weights pass through random steps (`steps.py`) inside random
loops, branches and transformations, and end in products, lookups, convolutions and other uses. For each, values and gradients
of the lifted function are compared with those of the function of merged params, LoRA's merge with one by numpy, and `sites`
and `lift(strict=True)` must not crash (`checks.py`). Every fault is shown as the smallest program that still has it, and
the counts are written to results.md, as far as they are, after every 25 programs.
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

#: The programs are tiny: what they cost is their compilation.
COMPILER = {"xla_backend_optimization_level": 0}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="number of programs")
    parser.add_argument("--seed", type=int, default=0, help="number of the first one")
    parser.add_argument("--without", nargs="*", default=[], help="steps, nests or ends: no programs that have them")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the results")
    options = parser.parse_args()
    found: list[tuple[Program, Outcome]] = []
    faults: list[str] = []
    start = time.perf_counter()
    for number in range(options.seed, options.seed + options.count):
        program = programs.random_program(number)
        if not set(options.without) & set(program.kinds()):
            found.append((program, tried(number, program, faults)))
        if (number + 1 - options.seed) % 25 == 0 or number + 1 == options.seed + options.count:
            written(options, found, faults)
            print(
                f"{number + 1 - options.seed} programs, {len(faults)} faults, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
            jax.clear_caches()
    print(table(found))


def tried(number: int, program: Program, faults: list[str]) -> Outcome:
    """What came of a program; a fault is added to the list, made small."""

    def jit(function):
        return jax.jit(function, compiler_options=COMPILER)

    outcome = check(program, jit)
    if outcome.fault:
        program, outcome = shrunk(program, outcome, jit)
        faults.append(report(number, program, outcome))
        print(faults[-1], flush=True)
    return outcome


def report(number: int, program: Program, outcome: Outcome) -> str:
    """A fault as a program that can be read."""
    spec = "\n".join(f"# {leaf.name} {leaf.shape} {leaf.dtype}: {leaf.entry()!r}" for leaf in program.leaves)
    return f"# seed {number}: {outcome.kind} {outcome.detail}\n{spec}\n{program.source()}"


def written(options: argparse.Namespace, found: list[tuple[Program, Outcome]], faults: list[str]) -> None:
    """Writes results.md."""
    without = f", without {', '.join(options.without)}" if options.without else ""
    lines = [
        "# A fuzz of the lift",
        "",
        f"{len(found)} random programs from seed {options.seed} on{without}, JAX {jax.__version__}: {len(faults)} faults.",
        "The rows count programs with a step, nest, end or method, by what came of them. A program has several.",
        'An "equal" one is equal in values and gradients; in one with "no effect" the adapters have none. "Not a program" is',
        "one that JAX refuses without jlora.",
        "",
        table(found),
        *(f"\n```python\n{fault}```" for fault in faults),
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.md").write_text("\n".join(lines) + "\n")


def table(found: list[tuple[Program, Outcome]]) -> str:
    """Counts by outcome: of all programs, and of those with each kind of step and each method."""
    totals = collections.Counter(outcome.kind for _, outcome in found)
    columns = [kind for kind, _ in totals.most_common()]
    rows: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for program, outcome in found:
        for name in {*program.kinds(), *(type(leaf.method).__name__ for leaf in program.leaves)}:
            rows[name][outcome.kind] += 1
    names = [*steps.kinds(), *sorted(set(rows) - set(steps.kinds()))]
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name, counts in [("all", totals), *((name, rows[name]) for name in names)]:
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(str(counts[kind] or "") for kind in columns) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
