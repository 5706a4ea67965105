"""Time to switch an adapter in a fused weight: overwriting SHiRA's entries against merging and unmerging LoRA.

    python experiments/benchmarks/switch_time.py [--sizes 512,1024,2048,4096] [--density D] [--repeats N] [--out DIR]

The claim (SHiRA's paper, appendix C): a scatter is 5 to 16 times faster than fusing LoRA, on a CPU, for weights up to
4096 x 4096. Every program is jitted and overwrites its weight in place (donated); all are compiled first and then run
interleaved, so that a noisy machine bends them alike. Medians, and ratios of neighbours in time, go to DIR.

load    the adapter into a base: `saved = w[index]; w[index] = packed`, or `w + s * a @ b`.
switch  one adapter for another: `w[index0] = saved`, then load, or `w - s * a0 @ b0 + s * a1 @ b1`.

LoRA is tried with as many values as SHiRA has, and with the rank 64.
"""

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import jlora
from jlora.compose.switch import _read, _write

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAPER = (5, 16)


@dataclass(frozen=True)
class Settings:
    sizes: tuple[int, ...] = (512, 1024, 2048, 4096)
    density: float = 0.01
    rank: int = 64
    repeats: int = 25


def shira_programs(size: int, density: float):
    """{name: (program of a weight, k)}: the programs take a weight and give it back with something that is ready at the end."""
    base = {"w": jax.random.normal(jax.random.key(0), (size, size)) / size**0.5}
    packs = []
    for seed in (1, 2):
        adapted = jlora.adapterize(base, {"w": jlora.SHiRA("random", density=density)}, jax.random.key(seed))
        noise = jax.tree.map(lambda leaf: 0.01 * jnp.ones_like(leaf), adapted.params)
        packs.append(jlora.pack(adapted.replace(params=noise)))
    first, second = packs

    def load(w):
        before = _read({"w": w}, first)
        return _write({"w": w}, first)["w"], before

    def switch(w):
        restored = _write({"w": w}, first)
        before = _read(restored, second)
        return _write(restored, second)["w"], before

    def called(w):
        changed, before = jlora.switch({"w": w}, second, first)
        return changed["w"], before

    return {"shira load": load, "shira switch": switch, "jlora.switch": called}


def lora_programs(size: int, rank: int, name: str):
    keys = jax.random.split(jax.random.key(3), 4)
    a0, a1 = (jax.random.normal(key, (size, rank)) / 100 for key in keys[:2])
    b0, b1 = (jax.random.normal(key, (rank, size)) / 100 for key in keys[2:])
    load = jax.jit(lambda w, a, b: w + 2.0 * (a @ b), donate_argnums=0)
    switch = jax.jit(lambda w, a0, b0, a1, b1: w - 2.0 * (a0 @ b0) + 2.0 * (a1 @ b1), donate_argnums=0)
    return {
        f"{name} load": lambda w: (load(w, a0, b0), None),
        f"{name} switch": lambda w: (switch(w, a0, b0, a1, b1), None),
    }


def measure(size: int, s: Settings) -> dict[str, list[float]]:
    """Seconds of every program, run by run."""
    equal = max(1, round(s.density * size / 2))
    programs = shira_programs(size, s.density) | lora_programs(size, equal, "lora equal")
    programs |= lora_programs(size, min(s.rank, size), f"lora {s.rank}")
    w = jax.random.normal(jax.random.key(9), (size, size))
    times: dict[str, list[float]] = {name: [] for name in programs}
    for repeat in range(s.repeats + 2):  # the first two compile and warm up
        for name, program in programs.items():
            start = time.perf_counter()
            w, _ = jax.block_until_ready(program(w))
            if repeat >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def summary(size: int, times: dict[str, list[float]], s: Settings) -> dict:
    """Medians in milliseconds, and how many times longer LoRA takes."""

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))

    ratios = {}
    for event in ("load", "switch"):
        for name in ("lora equal", f"lora {s.rank}"):
            ratios[f"{name} {event}"] = ratio(f"{name} {event}", f"shira {event}")
    return {
        "size": size,
        "entries": round(s.density * size * size),
        "equal_rank": max(1, round(s.density * size / 2)),
        "milliseconds": {name: 1e3 * statistics.median(each) for name, each in times.items()},
        "ratios": ratios,
    }


def verdict(rows: list[dict]) -> str:
    """How LoRA's times over SHiRA's lie to the paper's range, size by size."""
    least, most = PAPER
    spans = {row["size"]: (min(row["ratios"].values()), max(row["ratios"].values())) for row in rows}
    reached = [size for size, (low, _) in spans.items() if low >= least]
    word = "Reproduced" if len(reached) == len(rows) else "Reproduced in part" if reached else "Not reproduced"
    text = "; ".join(f"{size}: {low:.1f} to {high:.1f}" for size, (low, high) in spans.items())
    where = f"at the sizes {', '.join(map(str, reached))}" if reached else "at no size"
    slower = [size for size, (low, _) in spans.items() if low <= 1]
    faster = f"not always at {', '.join(map(str, slower))}" if slower else "always"
    return (
        f"**{word}.** The paper says {least} to {most} times. LoRA's time over SHiRA's by the side of the weight: {text}. At "
        f"least {least} for both ranks and both events: {where}. Overwriting was the faster one: {faster}."
    )


def page(rows: list[dict], s: Settings, machine: dict) -> str:
    """The results: the table first, which the docs show, then the verdict."""

    def cell(row: dict, name: str) -> str:
        ratio = row["ratios"].get(name)
        return f"{row['milliseconds'][name]:.3g}" + (f" ({ratio:.1f})" if ratio else "")

    names = list(rows[0]["milliseconds"])
    lines = [f"| size, equal rank | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for row in rows:
        cells = " | ".join(cell(row, name) for name in names)
        lines.append(f"| {row['size']}, {row['equal_rank']} | {cells} |")
    lines += ["", verdict(rows), ""]
    lines += [
        f"SHiRA with {100 * s.density:g} % of the entries, float32; medians of {s.repeats} interleaved runs in milliseconds;",
        "in brackets LoRA's time over SHiRA's. `jlora.switch` is the switch through the public function, with its checks.",
        "",
        "![ratios](switch_time.png)",
        "",
        f"Machine: {machine['device']}, {machine['cores']} cores, JAX {machine['jax']}.",
    ]
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    sizes = np.array([row["size"] for row in rows])
    for name in rows[0]["ratios"]:
        axes.plot(sizes, [row["ratios"][name] for row in rows], marker="o", label=name)
    axes.axhspan(*PAPER, alpha=0.15, color="gray", label="the paper")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="side of the weight", ylabel="LoRA's time / SHiRA's")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xticks([], minor=True)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Settings()
    parser.add_argument("--sizes", default=",".join(map(str, default.sizes)))
    parser.add_argument("--density", type=float, default=default.density)
    parser.add_argument("--rank", type=int, default=default.rank)
    parser.add_argument("--repeats", type=int, default=default.repeats)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args(arguments)
    settings = Settings(tuple(int(size) for size in given.sizes.split(",")), given.density, given.rank, given.repeats)
    rows = [summary(size, measure(size, settings), settings) for size in settings.sizes]
    machine = {"jax": jax.__version__, "device": str(jax.devices()[0].device_kind), "cores": os.cpu_count()}
    result = {"settings": asdict(settings), "machine": {**machine, "platform": platform.platform()}, "rows": rows}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "switch_time.json").write_text(json.dumps(result, indent=1) + "\n")
    (given.out / "switch_time.md").write_text(page(rows, settings, machine))
    draw(rows, given.out / "switch_time.png")
    print(page(rows, settings, machine))


if __name__ == "__main__":
    main()
