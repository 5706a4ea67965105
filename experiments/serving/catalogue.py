"""What an adapter costs that is registered, and what one costs that is moved: counted, not timed.

    python experiments/serving/catalogue.py

The engine's turns are made here, one after the other in one thread, on requests that have all come before: so the calls of
Python's functions are the same numbers in every run. Each catalogue answers the same requests twice: with five adapters of it,
and with adapters drawn from all of it.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
from pathlib import Path

import work

from jlora import models
from jlora.serving import Engine

PROMPT, TOKENS, ROWS = (16, 48), 32, 16


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="+", default=[5, 100, 1000, 2000], help="sizes of the catalogue")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "catalogue.md", help="file of the results")
    options = parser.parse_args()
    model, params = models.load(models.STORIES260K)
    lines = [
        "# What a registered adapter costs",
        "",
        f"Written by `experiments/serving/catalogue.py`: calls of Python's functions from submitting {options.requests} "
        f"requests of {TOKENS} tokens to their ends, on {ROWS} rows with 32 slots on the device.",
        "",
        "| adapters registered | of which are asked for | calls | turns | moved to the device | calls for a moved one |",
        "|---|---|---|---|---|---|",
    ]
    for count in options.adapters:
        store = work.filled(model, params, count, 8, 32)
        engine = Engine(model, params, rows=ROWS, length=128, chunk=32, adapters=store, queue=options.requests)
        engine._loop.warm()
        first = None
        for names in sorted({min(5, count), count}):
            turns(engine, model, options.requests, names, cProfile.Profile())  # what is done once, such as JAX's caches
            turns(engine, model, options.requests, 1, cProfile.Profile())  # so that each begins with the same slots
            loads, profile = engine.state().loads, cProfile.Profile()
            number = turns(engine, model, options.requests, names, profile)
            calls, moved = pstats.Stats(profile).total_calls, engine.state().loads - loads  # type: ignore[attr-defined]
            first = first or (calls, moved)
            each = f"{(calls - first[0]) / (moved - first[1]):.0f}" if moved > first[1] else ""
            lines.append(f"| {count:,} | {names:,} | {calls:,} | {number} | {moved} | {each} |")
        engine.close()
    options.out.write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


def turns(engine: Engine, model, requests: int, names: int, profile: cProfile.Profile) -> int:
    """Answers the requests, and says in how many turns."""
    load, number = work.requests(0, requests, names, model.config.vocab_size, PROMPT, TOKENS), 0
    profile.enable()
    for asked in load:
        engine.submit(asked.prompt, adapter=asked.adapter, max_new_tokens=asked.count, listen=lambda told: None)
    while engine._loop.busy or engine._waiting:
        engine._drop_cancelled()
        engine._loop.tick(engine._take, engine._coming)
        number += 1
    profile.disable()
    return number


if __name__ == "__main__":
    main()
