"""Files that came to harm: does jlora refuse each in one sentence that names it, or read what was written?

    python experiments/damaged_files/run.py --count 300 --seed 0

For everything that jlora reads, `count` copies have one accident each: bits, bytes or pieces lost, or a value of a JSON file
that no program wrote. "Refused": the error that the documentation names, with the path. "Equal": what was written is read.
"Other values": a file of Hugging Face or a run's settings whose damage left another valid one, which no reader could know,
since these carry no checksum. "Wrong": any other error, a message without the path, a word on standard error, another value in
a file with checksums, or more than 20 seconds. The table goes to results.md, what was wrong to the terminal.
"""

import argparse
import platform
from collections import Counter
from pathlib import Path

import readers


def table(count: int, seed: int, names: list[str]) -> str:
    """The counts as a Markdown table; what was wrong is printed."""
    lines = ["| what | " + " | ".join(readers.OUTCOMES) + " |", "|---|" + "---|" * len(readers.OUTCOMES)]
    for name in names:
        counts: Counter[str] = Counter()
        for trial in readers.trials(name, count, seed):
            counts[trial.outcome] += 1
            if trial.outcome == "wrong":
                print(f"{name}: {trial.words}", flush=True)
        lines.append(f"| {name} | " + " | ".join(str(counts[outcome]) for outcome in readers.OUTCOMES) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="accidents to each (300)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(readers.READERS), nargs="+", default=list(readers.READERS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.md")
    arguments = parser.parse_args()
    found = table(arguments.count, arguments.seed, arguments.only)
    about = f"{arguments.count} accidents each, seed {arguments.seed}, Python {platform.python_version()}"
    arguments.out.write_text(f"What came of damaged files ({about}).\n\n{found}")


if __name__ == "__main__":
    main()
