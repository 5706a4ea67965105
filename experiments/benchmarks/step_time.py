"""One optimizer step of LoRA beside the least that any adapter method can cost.

    python experiments/benchmarks/step_time.py [--shape llama|minilm|scanned|gpu] [--rank R] [--batch B] [--length L] ...
    python experiments/benchmarks/step_time.py --torch-python PYTHON      torch and PEFT too, with the Python that has them

All variants are compiled first and then run in turns, in a new order each time, so that a noisy machine bends them alike.
Printed, and written to results/ as JSON and as a plot: the median time of a step, its ratio to the bound (the median of the
turns' ratios), and what XLA says of flops, bytes and memory, which no noise reaches; then what a whole run holds beyond its
base (run_memory.py).

bound     only the input embedding's scale is trained: the whole forward pass, the whole backward pass to the inputs, and
          no weight gradient. No adapter method can beat it.
jlora     LoRA by `lift` with the plans it chooses, and with each plan forced; DoRA.
naive     `x @ w + s * ((x @ a) @ b)` in every Dense, by plain automatic differentiation.
qwix      the same kernels adapted by qwix, where it is installed.
full      every leaf trained.
torch     its own bound, and PEFT's LoRA and DoRA, on shapes "llama" and "gpu".

Shapes: (a) "llama", six layers of width 512, 4 x 256 tokens; (b) "minilm", the real all-MiniLM-L6-v2 at 32 x 128 (from
JLORA_DATA); (c) "scanned", (a) as a scanned and rematerialised stack; "gpu", layers of a 7B model in bfloat16, with 4,096
tokens or with `--batch 4` 16,384.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import jax
import run_memory
import variants
from problems import SHAPES, Settings, as_text, problem, settings_for

RESULTS = Path(__file__).parent / "results"
WARM_UP = 2
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def clock() -> float:
    """Seconds. On a CPU with one core (`taskset`) they are this process's own, which others on the machine don't lengthen."""
    alone = CORES == 1 and jax.default_backend() == "cpu"
    return time.process_time() if alone else time.perf_counter()


def compile_all(found: dict[str, variants.Variant]) -> dict[str, tuple[Any, float, float]]:
    """{name: (program, seconds of tracing, seconds of compiling)}, none helped by what another has traced."""
    next(iter(found.values())).step.lower(*next(iter(found.values())).arguments)  # imports and the like, once
    compiled = {}
    for name, each in found.items():
        jax.clear_caches()
        start = time.perf_counter()
        lowered = each.step.lower(*each.arguments)
        traced = time.perf_counter()
        compiled[name] = (lowered.compile(), traced - start, time.perf_counter() - traced)
    return compiled


def timers(found: dict[str, variants.Variant], compiled: dict[str, Any]) -> dict[str, Callable[[], float]]:
    """{name: runs one step and gives its seconds}"""
    state = {name: (each.trained, each.state) for name, each in found.items()}

    def timer(name: str) -> Callable[[], float]:
        each, program = found[name], compiled[name][0]

        def run() -> float:
            start = clock()
            trained, opt, loss = program(each.base, *state[name], each.batch)
            jax.block_until_ready((trained, loss))
            seconds = clock() - start
            state[name] = trained, opt
            return seconds

        return run

    return {name: timer(name) for name in found}


@contextlib.contextmanager
def torch_timers(python: str | None, s: Settings) -> Iterator[tuple[dict[str, Callable[[], float]], dict[str, Any]]]:
    """The timers of torch's variants, which run in a process of their own, and its versions."""
    if python is None:
        yield {}, {}
        return
    script = str(Path(__file__).with_name("torch_step.py"))
    with subprocess.Popen(
        [python, script, json.dumps(asdict(s))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout

        def ask(name: str) -> float:
            process.stdin.write(name + "\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        head = process.stdout.readline()
        if not head:
            raise SystemExit(f"{python} {script} has ended with an error: does that Python have torch and peft?")
        about = json.loads(head)
        yield {name: (lambda name=name: ask(name)) for name in about.pop("variants")}, about
        process.stdin.close()


def interleave(run: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every variant's steps: in each turn one step of each, in an order of its own.

    In a fixed order a variant would always meet the memory as the same other left it, which is worth several per cent.
    """
    order, times = random.Random(0), {name: [] for name in run}
    for repeat in range(repeats + WARM_UP):
        for name in order.sample(list(run), len(run)):
            seconds = run[name]()
            if repeat >= WARM_UP:
                times[name].append(seconds)
    return times


def timing(name: str, times: dict[str, list[float]]) -> dict[str, float]:
    """Median and ratio to the bound of the same library."""
    own = "torch bound" if name.startswith(("torch", "PEFT")) else "bound"
    pairs = [a / b for a, b in zip(times[name], times[own])]
    return {"milliseconds": 1e3 * statistics.median(times[name]), "ratio": statistics.median(pairs)}


def measure(s: Settings, torch_python: str | None = None) -> dict[str, Any]:
    """The rows of the table, and what they are to be held against."""
    p = problem(s)
    found = variants.all_variants(p, s.rank)
    compiled = compile_all(found)
    with torch_timers(torch_python, s) as (torch, about):
        times = interleave({**timers(found, compiled), **torch}, s.repeats)
    rows = {name: timing(name, times) for name in times}
    for name, (program, trace, compile_) in compiled.items():
        cost, memory = program.cost_analysis(), program.memory_analysis()
        trained = sum(x.nbytes for x in jax.tree.leaves((found[name].trained, found[name].state)))
        rows[name] |= {
            "gflop": cost["flops"] / 1e9,
            "gb_moved": cost["bytes accessed"] / 1e9,
            "temp_mb": memory.temp_size_in_bytes / 1e6,
            "trained_and_state_mb": trained / 1e6,
            "trace_s": trace,
            "compile_s": compile_,
        }
    limits = {} if s.shape == "scanned" else {"distinct_inputs_mb": variants.distinct_inputs_bytes(p, lora(p, s)) / 1e6}
    return {"rows": rows, "torch": about, **limits}


def lora(p: Any, s: Settings) -> Any:
    return variants.adapt(p, variants.jlora.LoRA(s.rank))


def depth(s: Settings) -> dict[str, dict[str, float]]:
    """Seconds of tracing and of compiling a scanned stack, and one four times as deep."""
    found = {}
    for layers in (s.layers, 4 * s.layers):
        p = problem(replace(s, layers=layers, shape="scanned"))
        adapted = lora(p, s)
        timed = compile_all({"jlora": variants.lifted(p, adapted), "naive": variants.naive(p, adapted)})
        found[f"{layers} layers"] = {name: trace + compile_ for name, (_, trace, compile_) in timed.items()}
    return found


def verdicts(s: Settings, result: dict[str, Any]) -> list[str]:
    """The targets, each with its number and whether it is met."""
    rows = result["rows"]
    auto, base, naive = rows["jlora auto"], rows["bound"], rows["naive"]
    checks = [("time / bound", auto["ratio"], 1.08)]
    if "distinct_inputs_mb" in result:
        checks.append(("temp MB", auto["temp_mb"], 1.05 * (base["temp_mb"] + result["distinct_inputs_mb"])))
    least = min(rows[f"jlora {plan}"]["gflop"] for plan in variants.PLANS)
    checks.append(("flops / the least of the plans", auto["gflop"] / least, 1.02))
    seconds = [row["trace_s"] + row["compile_s"] for row in (auto, naive)]
    checks.append(("trace and compile / naive's", seconds[0] / seconds[1], 1.3))
    checks.append(("DoRA's time / LoRA's", rows["jlora DoRA"]["milliseconds"] / auto["milliseconds"], 1.15))
    if "PEFT LoRA" in rows:
        checks.append(("ms, PEFT's being the limit", auto["milliseconds"], rows["PEFT LoRA"]["milliseconds"]))
    return [
        f"{what}: {got:.3f}, wanted at most {limit:.3f}: {'met' if got <= limit else 'MISSED'}"
        for what, got, limit in checks
    ]


def show(result: dict[str, Any]) -> str:
    """The table of the steps as text."""
    columns = list(result["rows"]["bound"])
    lines = [f"{'':16}" + "".join(f"{column:>{max(len(column), 8) + 2}}" for column in columns)]
    for name, row in result["rows"].items():
        cells = (f"{row[c]:.3f}" if c in row else "-" for c in columns)
        lines.append(f"{name:16}" + "".join(f"{cell:>{max(len(c), 8) + 2}}" for cell, c in zip(cells, columns)))
    return "\n".join(lines)


HEADS = {
    "milliseconds": "ms",
    "ratio": "x bound",
    "gflop": "GFLOP",
    "gb_moved": "GB moved",
    "temp_mb": "temp MB",
    "trained_and_state_mb": "trained and state MB",
    "trace_s": "trace s",
    "compile_s": "compile s",
}


def markdown(result: dict[str, Any]) -> str:
    """The same for a page, with the targets and the memory of a run."""
    m, s = result["machine"], result["settings"]
    lines = [
        f"{s['batch']} x {s['length']} tokens, rank {s['rank']}, {s['dtype']}; jax {m['jax']} on {m['cores']} core(s) of "
        f"{m['device']}, {s['repeats']} repeats."
        if m["platform"] == "cpu"
        else f"{s['batch']} x {s['length']} tokens, rank {s['rank']}, {s['dtype']}; jax {m['jax']} on {m['device']}.",
        "",
        "| | " + " | ".join(HEADS.values()) + " |",
        "|---" * (len(HEADS) + 1) + "|",
    ]
    for name, row in result["rows"].items():
        cells = (f"{row[c]:.{0 if c == 'milliseconds' else 2}f}" if c in row else "-" for c in HEADS)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- {line}" for line in result["targets"]), ""]
    lines += [f"| beyond the base of {result['run']['base_mb']:.1f} MB | left MB | at most MB |", "|---|---|---|"]
    for name, row in result["run"].items():
        if isinstance(row, dict):
            peak = "-" if row["peak_mb"] is None else f"{row['peak_mb']:.1f}"
            lines.append(f"| {name} | {row['left_mb']:.1f} | {peak} |")
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of time and of temp memory."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rows = result["rows"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 0.4 * len(rows) + 1.5), sharey=True, layout="constrained")
    names = list(rows)[::-1]
    for axes, column, label in ((left, "ratio", "time of a step / its library's bound"), (right, "temp_mb", "temp MB")):
        values = [rows[name].get(column, 0.0) for name in names]
        color = ["tab:orange" if name.startswith("jlora") else "tab:gray" for name in names]
        bars = axes.barh(names, values, color=color)
        axes.bar_label(bars, [f"{v:.2f}" if column == "ratio" else f"{v:.0f}" if v else "" for v in values], padding=3)
        axes.set_xlabel(label)
        axes.margins(x=0.15)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def machine() -> dict[str, Any]:
    device = jax.devices()[0]
    about = {"jax": jax.__version__, "device": device.device_kind, "platform": device.platform}
    return about | {
        "cores": CORES,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama")
    for each in fields(Settings)[1:]:
        parser.add_argument(f"--{each.name}", type=type(each.default))
    parser.add_argument("--torch-python", help="a Python with torch, transformers and peft, to be measured beside")
    arguments = vars(parser.parse_args())
    torch_python = arguments.pop("torch_python")
    s = settings_for(arguments.pop("shape"), **arguments)
    if torch_python and CORES == 1:
        parser.error("with one core the clock is the process's own, and torch has another: run it on two or more")
    if torch_python and s.shape not in ("llama", "gpu"):
        parser.error(f"torch_step.py has no shape {s.shape!r}: leave out --torch-python, or take llama or gpu")
    result = {"settings": asdict(s), "machine": machine(), **measure(s, torch_python)}
    result["targets"] = verdicts(s, result)
    result["run"] = run_memory.measure(s)
    if s.shape == "scanned":
        result["depth"] = depth(s)
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"step_time_{s.shape}{as_text(s)}"
    Path(f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    Path(f"{stem}.md").write_text(markdown(result))
    plot(result, Path(f"{stem}.png"))
    print(show(result), *result["targets"], run_memory.show(result["run"]), result.get("depth", ""), sep="\n")


if __name__ == "__main__":
    main()
