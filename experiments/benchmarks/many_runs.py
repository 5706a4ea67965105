"""What a step of many runs costs against one of a single run, at the same number of tokens in all.

    python experiments/benchmarks/many_runs.py [--widths 1024,2048] [--runs 1,16,64] [--tokens 4096] [--layers 4] [--repeats 9]

A residual network of square kernels, each with LoRA of rank 8; a step of AdamW by `jlora.each_run`, each run with its own
rate and its own part of the tokens. The steps are interleaved in an order that changes, and the ratio is the median of those to
one run's step of the same turn. Wanted: at most 1.10. Written to results/many_runs.json, beside what the same machine has
measured before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import step_time

import jlora

RESULTS = Path(__file__).parent / "results"
WANTED = 1.10


def network(width: int, layers: int) -> tuple[dict[str, Any], Callable[[Any, jax.Array], jax.Array]]:
    """Params and loss of the network."""
    keys = jax.random.split(jax.random.key(0), layers)
    base = {f"layer_{n}": {"kernel": jax.random.normal(key, (width, width)) / width**0.5} for n, key in enumerate(keys)}

    def loss(params: Any, x: jax.Array) -> jax.Array:
        for n in range(layers):
            x = x + jax.nn.silu(x @ params[f"layer_{n}"]["kernel"])
        return jnp.mean(x**2)

    return base, loss


def program(base: Any, loss: Any, runs: int, tokens: int) -> tuple[Any, tuple[Any, ...]]:
    """The compiled step of some runs that share the tokens, and its arguments."""
    lifted = jlora.lift(loss)
    adapters = [jlora.adapterize(base, {".*": jlora.LoRA(rank=8)}, key=jax.random.key(n)) for n in range(runs)]
    stacked, width = jlora.stack(adapters), next(iter(base.values()))["kernel"].shape[0]
    x = jax.random.normal(jax.random.key(1), (runs, tokens // runs, width))
    rates = jnp.linspace(1e-4, 1e-3, runs)

    def optimizer(adapted: jlora.Adapted, rate: jax.Array) -> optax.GradientTransformation:
        return jlora.optimizer(adapted, optax.adamw, rate)

    def step(adapted: jlora.Adapted, state: Any, x: jax.Array, rate: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(lambda p: lifted(adapted.replace(params=p), x))(adapted.params)
        updates, state = optimizer(adapted, rate).update(gradients, state, adapted.params)
        return optax.apply_updates(adapted.params, updates), state, value

    state = jax.jit(jlora.each_run(lambda adapted, rate: optimizer(adapted, rate).init(adapted.params)))(stacked, rates)
    arguments = (stacked, state, x, rates)
    one = lambda adapted, state, x, rate: step(adapted, state, x, rate)  # noqa: E731
    if runs == 1:  # as somebody writes it who trains one
        arguments = jax.tree.map(lambda leaf: leaf[0], (state, x, rates))
        arguments = (stacked.run(0), *arguments)
        return jax.jit(one).lower(*arguments).compile(), arguments
    return jax.jit(jlora.each_run(one)).lower(*arguments).compile(), arguments


def measure(width: int, counts: list[int], tokens: int, layers: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each number of runs."""
    base, loss = network(width, layers)
    made = {runs: program(base, loss, runs, tokens) for runs in counts}
    times: dict[int, list[float]] = {runs: [] for runs in counts}
    for turn in range(repeats + 1):
        for runs in counts if turn % 2 else counts[::-1]:
            compiled, arguments = made[runs]
            since = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            if turn:
                times[runs].append(time.perf_counter() - since)
    rows = []
    for runs in counts:
        cost, memory = made[runs][0].cost_analysis(), made[runs][0].memory_analysis()
        rows.append(
            {
                "width": width,
                "tokens": tokens,
                "layers": layers,
                "runs": runs,
                "ms": 1e3 * statistics.median(times[runs]),
                "x one": statistics.median(a / b for a, b in zip(times[runs], times[counts[0]])),
                "GFLOP": cost["flops"] / 1e9,
                "GB moved": cost["bytes accessed"] / 1e9,
                "temp MB": memory.temp_size_in_bytes / 1e6,
            }
        )
    return rows


def markdown(result: dict[str, Any]) -> str:
    """A table for a page."""
    machine, heads = result["machine"], ("width", "runs", "ms", "x one", "GFLOP", "GB moved", "temp MB")
    first = result["rows"][0]
    lines = [
        f"{first['tokens']:,} tokens in all, {first['layers']} layers, rank 8, float32, AdamW; jax {machine['jax']} on "
        f"{machine['cores']} CPU core(s).",
        "",
        "| " + " | ".join(heads) + " |",
        "|---" * len(heads) + "|",
    ]
    places = {"width": 0, "runs": 0, "ms": 0, "x one": 2, "GFLOP": 1, "GB moved": 2, "temp MB": 0}
    lines += ["| " + " | ".join(f"{row[head]:.{places[head]}f}" for head in heads) + " |" for row in result["rows"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole_numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser.add_argument("--widths", type=whole_numbers, default=[1024, 2048])
    parser.add_argument("--runs", type=whole_numbers, default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    rows = []
    for width in arguments.widths:
        rows += measure(width, arguments.runs, arguments.tokens, arguments.layers, arguments.repeats)
        print(*rows[-len(arguments.runs) :], sep="\n", flush=True)
    result = {"machine": step_time.machine(), "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "many_runs.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "many_runs.md").write_text(markdown(result))
    worst = max(row["x one"] for row in rows)
    print(f"worst: {worst:.2f}, wanted at most {WANTED}: {'met' if worst <= WANTED else 'MISSED'}")


if __name__ == "__main__":
    main()
