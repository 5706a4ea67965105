"""How far a run of a stack ends from the same run alone, for every method: which are chaotic.

    python experiments/benchmarks/runs_alone.py [--steps 100] [--methods lora,dora]

Each method as `jlora finetune --method NAME --rank 4` makes it, on a small network, with three runs of other starts, data,
rates and decays; AdamW. Two programs for each method: all steps of the stack, all steps of a run alone. The difference is the
largest of all trained values, over the largest value of its array. Written to results/runs_alone.json, beside what was
measured before of other methods.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jlora
from jlora.optimize.events import events_of
from jlora.training.settings.defaults import resolve
from jlora.training.settings.fields import Settings
from jlora.training.settings.named import named
from jlora.training.settings.told import method_names

RESULTS = Path(__file__).parent / "results"
WIDTH, ROWS, RUNS = 32, 32, 3
RATES, DECAYS = jnp.array([1e-3, 3e-3, 1e-2]), jnp.array([0.0, 0.1, 0.01])


def normal(seed: int, *shape: int) -> jax.Array:
    """Normal numbers."""
    return jax.random.normal(jax.random.key(seed), shape)


BASE = {
    f"layer_{n}": {"kernel": normal(n, WIDTH, WIDTH) / WIDTH**0.5, "bias": normal(9 + n, WIDTH) / 9} for n in range(2)
}


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean squared error of two layers."""
    for n in range(2):
        x = jnp.tanh(x @ params[f"layer_{n}"]["kernel"] + params[f"layer_{n}"]["bias"])
    return jnp.mean((x - y) ** 2)


def difference(name: str, steps: int) -> float:
    """The largest difference of a method's runs."""
    method = named(resolve(Settings(model="DIR", data="FILE", method=name, rank=_rank(name), steps=steps)))
    adapters = [jlora.adapterize(BASE, {".*kernel": method}, key=jax.random.key(n)) for n in range(RUNS)]
    if events_of(adapters[0]):
        raise ValueError("does something between steps")
    data = normal(30, RUNS, steps, ROWS, WIDTH), jnp.tanh(normal(31, RUNS, steps, ROWS, WIDTH))

    def trained(adapted: jlora.Adapted, x: jax.Array, y: jax.Array, rate: jax.Array, decay: jax.Array) -> Any:
        tx = jlora.optimizer(adapted, optax.adamw, rate, weight_decay=decay)
        lifted = jlora.lift(loss, unread="allow")

        def step(carry: Any, batch: Any) -> tuple[Any, None]:
            params, state = carry
            gradients = jax.grad(lambda p: lifted(adapted.replace(params=p), *batch))(params)
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (adapted.params, tx.init(adapted.params)), (x, y))[0][0]

    stacked = jlora.stack(adapters)
    together = stacked.replace(params=jax.jit(jlora.each_run(trained))(stacked, *data, RATES, DECAYS))
    one, worst = jax.jit(trained), 0.0
    for n, adapted in enumerate(adapters):
        alone = one(adapted, data[0][n], data[1][n], RATES[n], DECAYS[n])
        for a, b in zip(jax.tree.leaves(together.run(n).params), jax.tree.leaves(alone), strict=True):
            # What is no number stays none.
            worst = jnp.maximum(worst, jnp.max(jnp.abs(a - b)) / (jnp.max(jnp.abs(b)) + 1e-30))
    return float(worst)


def _rank(name: str) -> int | None:
    try:
        Settings(model="DIR", data="FILE", method=name, rank=4)
    except ValueError:
        return None  # it has no rank
    return 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--methods", default=",".join(method_names()))
    arguments = parser.parse_args()
    path = RESULTS / "runs_alone.json"
    RESULTS.mkdir(exist_ok=True)
    found = _before(path, arguments.steps)
    for name in arguments.methods.split(","):
        try:
            found[name] = difference(name, arguments.steps)
            print(f"{name}: {found[name]:.1e}", flush=True)
        except (ValueError, TypeError, KeyError) as error:
            print(f"{name}: left out, {' '.join(str(error).split())}", flush=True)
        path.write_text(json.dumps({"steps": arguments.steps, "jax": jax.__version__, "found": found}, indent=1) + "\n")
        rows = sorted(found.items(), key=lambda item: item[1])
        lines = [
            f"{arguments.steps} steps, {RUNS} runs, width {WIDTH}; jax {jax.__version__}, CPU.",
            "",
            "| method | largest difference |",
            "|---|---|",
            *(f"| {name} | {value:.1e} |" for name, value in rows),
        ]
        path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _before(path: Path, steps: int) -> dict[str, float]:
    """What has been measured before, of other methods."""
    before = json.loads(path.read_text()) if path.exists() else {}
    return before["found"] if (before.get("steps"), before.get("jax")) == (steps, jax.__version__) else {}


if __name__ == "__main__":
    main()
