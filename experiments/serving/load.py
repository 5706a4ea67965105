"""A load on the serving engine, in one process: throughput by the number of adapters, first tokens, faults, memory.

    python experiments/serving/load.py
    python experiments/serving/load.py --adapters 5 100 --rounds 2 --requests 32 --endless 500 --out /tmp/results.md

Measures that are compared are taken by turns, in one run, and compared as ratios: other work on the machine then hits all of
them. Beside the clock stand the processor's seconds, which other work hits less. What comes out is written to a file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import jax
import step
import work

from jlora import models
from jlora.serving import Engine

PROMPT, TOKENS = (16, 48), 32


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=models.STORIES260K, help="directory of a model")
    parser.add_argument("--adapters", type=int, nargs="+", default=[5, 100, 1000, 2000], help="numbers of adapters")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--slots", type=int, default=32, help="adapters on the device beside those in rows")
    parser.add_argument("--requests", type=int, default=128, help="requests of a round")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--endless", type=int, default=10_000, help="requests of the trial of memory")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.md", help="file of the results")
    parser.add_argument("--without-steps", action="store_true", help="leave out the decoding steps of a random model")
    options = parser.parse_args()
    model, params = models.load(options.model)
    store = work.filled(model, params, max(options.adapters), options.rank, options.slots)
    engine = Engine(
        model, params, rows=options.rows, length=128, chunk=32, adapters=store, queue=max(options.requests, 1000)
    )
    engine.start()
    work.together(engine, load(options, 0, min(options.adapters), model))
    before = engine.state()
    lines = [*head(options, params), *throughput(options, engine, model), *one_at_a_time(options, engine, model)]
    lines += [*first_tokens(options, engine, model), *alone(options, engine, model), *endless(options, engine, model)]
    after = engine.state()
    lines += [
        f"In all {after.swaps - before.swaps:,} adapters were written into rows, {after.loads - before.loads:,} moved to the "
        f"device, and {after.programs - before.programs} programs compiled after the start.",
        "",
    ]
    engine.close()
    lines += [] if options.without_steps else steps()
    options.out.write_text("\n".join(lines).rstrip() + "\n", "utf-8")
    print("\n".join(lines))


def load(options: argparse.Namespace, seed: int, names: int, model, count: int | None = None) -> list[work.Asked]:
    """The requests of a round."""
    count = options.requests if count is None else count
    return work.requests(seed, count, names, model.config.vocab_size, PROMPT, TOKENS)


def head(options: argparse.Namespace, params) -> list[str]:
    """What was measured, and where."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return [
        "# Serving many adapters",
        "",
        f"Written by `experiments/serving/load.py`. A Llama of {size:,} parameters, JAX {jax.__version__} on "
        f"{jax.default_backend()}, {os.cpu_count()} cores at a load of {os.getloadavg()[0]:.1f} (other work ran beside it, so "
        f"times are compared by turns). Adapters: LoRA of rank {options.rank} at q, k, v and o. {options.rows} rows, "
        f"{options.slots} slots; prompts of {PROMPT[0]} to {PROMPT[1] - 1} tokens, {TOKENS} tokens each, greedy.",
        "",
    ]


def throughput(options: argparse.Namespace, engine: Engine, model) -> list[str]:
    """Rounds with each number of adapters by turns; each against the first number in the same turn."""
    found: dict[int, list[tuple[float, float, int]]] = {count: [] for count in options.adapters}
    for turn in range(options.rounds):
        order = options.adapters[turn % len(found) :] + options.adapters[: turn % len(found)]
        for count in order:
            loads, cpu = engine.state().loads, time.process_time()
            took = work.together(engine, load(options, turn, count, model))
            found[count].append((took, time.process_time() - cpu, engine.state().loads - loads))
    lines = [
        "## Throughput",
        "",
        f"{options.requests} requests at once, each with an adapter drawn from so many; {options.rounds} rounds by turns. "
        "Other work makes a round slower and never faster, so the fastest rounds are compared, and the rounds of the least "
        "processor time: what the first line took, over what this line took.",
        "",
        "| adapters | tokens a second, fastest | median | by the fastest | by processor time | moved to the device, a round |",
        "|---|---|---|---|---|---|",
    ]
    first = found[options.adapters[0]]
    for count, rounds in found.items():
        clock, cpu = (min(each[n] for each in first) / min(each[n] for each in rounds) for n in (0, 1))
        fastest, median = (
            options.requests * TOKENS / way(took for took, _, _ in rounds) for way in (min, statistics.median)
        )
        lines.append(f"| {count:,} | {fastest:,.0f} | {median:,.0f} | {clock:.3f} | {cpu:.3f} | {rounds[-1][2]} |")
    return [*lines, ""]


def one_at_a_time(options: argparse.Namespace, engine: Engine, model) -> list[str]:
    """All requests together, and those of one adapter at a time."""
    count, names = options.requests // 4, min(100, max(options.adapters))
    ratios = []
    for turn in range(3):
        alone = work.by_adapter(engine, load(options, turn, names, model, count))
        ratios.append(alone / work.together(engine, load(options, turn, names, model, count)))
    return [
        "## Against one adapter at a time",
        "",
        f"{count} requests with {names} adapters: all together take {statistics.median(ratios):.1f} times fewer seconds than "
        f"where only requests of one adapter run at a time ({', '.join(f'{each:.1f}' for each in ratios)}).",
        "",
    ]


def first_tokens(options: argparse.Namespace, engine: Engine, model) -> list[str]:
    """Time to the first token where requests arrive at random, at half of the throughput."""
    names = max(options.adapters)
    took = work.together(engine, load(options, 99, names, model))
    rate = options.requests / took / 2
    times = sorted(
        each.first - each.sent for each in work.arriving(engine, load(options, 98, names, model), rate, seed=0)
    )
    median, late = times[len(times) // 2], times[int(0.95 * len(times))]
    return [
        "## Time to the first token",
        "",
        f"{len(times)} requests arrive at random, {rate:.2g} a second, half of what the engine can do, each with one of "
        f"{names:,} adapters: the first token comes after {1000 * median:.0f} ms (median; 95 % within {1000 * late:.0f} ms).",
        "",
    ]


def alone(options: argparse.Namespace, engine: Engine, model) -> list[str]:
    """Requests among others, and each by itself."""
    names = max(options.adapters)
    crowded, single = (load(options, 97, names, model) for _ in range(2))
    work.together(engine, crowded)
    for each in single:
        work.together(engine, [each])
    wrong = sum(one.ids != other.ids for one, other in zip(crowded, single))
    return [
        "## Rows",
        "",
        f"{len(single)} requests with {names:,} adapters, all at once and each by itself: {wrong} texts differ.",
        "",
    ]


def endless(options: argparse.Namespace, engine: Engine, model) -> list[str]:
    """Many short requests, and the memory of the process after each tenth of them."""
    part, names = options.endless // 10, max(options.adapters)
    if not part:
        return []
    used, arrays = [], []
    for turn in range(10):
        for start in range(0, part, 500):
            count = min(500, part - start)
            asked = load(options, 1000 + 100 * turn + start, names, model, count)
            for each in asked:
                each.count = 2
            work.together(engine, asked)
        used.append(work.memory())
        arrays.append(len(jax.live_arrays()))
    return [
        "## Memory",
        "",
        f"{10 * part:,} requests of 2 tokens. MiB of the process after each tenth of them: "
        f"{', '.join(f'{each:,.0f}' for each in used)}. Arrays of JAX: {arrays[0]} after the first, {arrays[-1]} after the "
        "last.",
        "",
    ]


def steps() -> list[str]:
    """Decoding steps beside their bounds."""
    lines = [
        "## A decoding step",
        "",
        "A Llama of width 512 with 6 layers and random values. The time of a step whose rows have an adapter each, over that "
        "of the base alone, by turns; and the same of the bytes that have to be read: parameters, cache and adapters, once "
        "each.",
        "",
        "| rows | adapters | time | bytes | time over bytes |",
        "|---|---|---|---|---|",
    ]
    for rows, rank in ((16, 8), (64, 4), (64, 8)):
        found = step.step(rows, rank, ".*/(q|k|v|o)_proj/kernel")
        lines.append(
            f"| {rows} | rank {rank} at q, k, v, o: {found['adapters']:.0f} MiB on {found['base']:.0f} | {found['time']:.2f} | "
            f"{found['bytes']:.2f} | {found['time'] / found['bytes']:.2f} |"
        )
    return lines


if __name__ == "__main__":
    main()
