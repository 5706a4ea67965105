"""Whether the chosen plan is as fast as the best forced one, over ranks and numbers of tokens.

    python experiments/benchmarks/cost_model.py [--ranks 4,16,64] [--tokens 64,256,1024,4096] [--seconds 20]

One step of the 512-wide Llama of step_time.py, by `lift` with the chosen plan and with each plan forced, interleaved; as
many repeats as fit into the seconds for each pair of rank and tokens, at least four. The smallest times are compared: what
disturbs a step only makes it longer. Target: the chosen plan is within 3 % of the best forced one. Written to
results/cost_model.json, beside what the same machine has measured before.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import step_time
import variants
from problems import problem, settings_for

RESULTS = Path(__file__).parent / "results"


def measure(rank: int, tokens: int, seconds: float) -> dict[str, Any]:
    """Smallest milliseconds of a step by plan, for `tokens` in rows of at most 256."""
    length = min(tokens, 256)
    p = problem(settings_for("llama", rank=rank, batch=tokens // length, length=length))
    adapted = variants.adapt(p, variants.jlora.LoRA(rank, alpha=2 * rank))
    found = {"bound": variants.bound(p), **{plan: variants.lifted(p, adapted, plan) for plan in variants.PLANS}}
    run = step_time.timers(found, step_time.compile_all(found))
    one = sum(timer() for timer in run.values())
    times = step_time.interleave(run, max(4, int(seconds / one) - step_time.WARM_UP))
    least = {name: 1e3 * min(each) for name, each in times.items()}
    forced = min(least[plan] for plan in variants.PLANS[1:])
    return {"rank": rank, "tokens": tokens, **least, "chosen / best forced": least["auto"] / forced}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole_numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser.add_argument("--ranks", type=whole_numbers, default=[4, 16, 64])
    parser.add_argument("--tokens", type=whole_numbers, default=[64, 256, 1024, 4096])
    parser.add_argument("--seconds", type=float, default=20)
    arguments = parser.parse_args()
    path = RESULTS / "cost_model.json"
    RESULTS.mkdir(exist_ok=True)
    machine = step_time.machine()
    rows = rows_of(path, machine)
    for rank, tokens in itertools.product(arguments.ranks, arguments.tokens):
        rows[rank, tokens] = measure(rank, tokens, arguments.seconds)
        print({name: round(value, 3) for name, value in rows[rank, tokens].items()}, flush=True)
        result = {"machine": machine, "rows": [rows[pair] for pair in sorted(rows)]}
        path.write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".md").write_text(markdown(result))
    print(verdict([*rows.values()]))


def markdown(result: dict[str, Any]) -> str:
    """A table for a page."""
    heads = ("rank", "tokens", "bound", *variants.PLANS, "chosen / best forced")
    lines = [f"Milliseconds of a step; jax {result['machine']['jax']} on {result['machine']['cores']} CPU core(s).", ""]
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in result["rows"]:
        cells = (f"{row[head]:.{3 if '/' in head else 0}f}" for head in heads)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", verdict(result["rows"])]) + "\n"


def rows_of(path: Path, machine: dict[str, Any]) -> dict[tuple[int, int], dict[str, Any]]:
    """What the same machine has measured before, by rank and tokens."""
    before = json.loads(path.read_text()) if path.exists() else {}
    same = before.get("machine") == machine
    return {(row["rank"], row["tokens"]): row for row in before["rows"]} if same else {}


def verdict(rows: list[dict[str, Any]]) -> str:
    """The worst pair."""
    worst = max(row["chosen / best forced"] for row in rows)
    return f"worst: {worst:.3f}, wanted at most 1.03: {'met' if worst <= 1.03 else 'MISSED'}"


if __name__ == "__main__":
    main()
