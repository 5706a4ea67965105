"""The memory of the host that a run takes at most, with its rows in memory and streamed from the disk.

    python experiments/benchmarks/stream_memory.py [--megabytes 20 40 160] [--most 40] [--write FILE]

Each run is `jlora finetune` of the shipped model in a process of its own, five steps on a file of JSON lines that is made here,
of random words (20 to 200 a row; the shipped tokenizer makes a token of 1.7 characters). Files of more than `--most` megabytes
are not read into memory. Measured is `ru_maxrss` of the process. The first line is of a file of 0.1 megabytes: what a run takes
that has nearly no data.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

RUN = ["--steps", "5", "--batch", "4", "--max-validation-rows", "16", "--sample-tokens", "0", "--progress", "none"]


def write(path: Path, size: float):
    """A file of so many bytes, and how many rows it has."""
    rng, written, rows = random.Random(0), 0, 0
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(3000)]
    with open(path, "w") as file:
        while written < size:
            written += file.write(json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(20, 200)))}) + "\n")
            rows += 1
    return rows


def peak(data: Path, out: Path, flag: str) -> float:
    """The memory of a run, in MB."""
    command = [
        sys.executable,
        "-m",
        "jlora.training.cli",
        "finetune",
        "--data",
        str(data),
        "--out",
        str(out),
        flag,
        *RUN,
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024 / 1e6


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--megabytes", type=float, nargs="+", default=[20, 40, 160])
    arguments.add_argument("--most", type=float, default=40, help="largest file to read into memory")
    arguments.add_argument("--write", type=Path, help="file for the table")
    given = arguments.parse_args()
    lines = ["| file, MB | rows | in memory, MB | streamed, MB |", "|---|---|---|---|"]
    print("\n".join(lines), flush=True)
    for size in (0.1, *given.megabytes):
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "rows.jsonl"
            rows = write(data, size * 1e6)
            streamed = f"{peak(data, Path(folder) / 'streamed', '--stream'):,.0f}"
            here = f"{peak(data, Path(folder) / 'here', '--no-stream'):,.0f}" if size <= given.most else "-"
        lines.append(f"| {size:g} | {rows:,} | {here} | {streamed} |")
        print(lines[-1], flush=True)
    if given.write:
        given.write.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
