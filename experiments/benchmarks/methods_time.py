"""One optimizer step of every method beside the least that any adapter method can cost.

    taskset -c 0 python experiments/benchmarks/methods_time.py [--shape llama|minilm|scanned] [--only lora,oft,...] ...

Each method as `jlora finetune --method NAME --rank R` makes it, on all kernels of the shape (see step_time.py). All are
compiled first and then run in turns. Printed, and written to results/ as JSON and Markdown: the median ratio of a step's
time to the bound's, and what XLA says of flops, bytes moved and temporary memory, which no noise reaches. On one core
(`taskset`) the time is the process's own, which others on the machine don't lengthen. Methods that start from data, or that
take no matrix, are left out, and named.

Wanted: at most 1.15 of the bound for methods that give factors (`Method.form` is `Factors`), at most 1.5 for all others:
those that form their weight (the bound has two products of each matrix, these have three), and those that act or have
another form, which are to cost no more than forming the weight would.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import step_time
import variants
from problems import SHAPES, Settings, problem, settings_for

import jlora
from jlora.core.products.low_rank import Factors
from jlora.disk import catalog

#: Times the bound: of methods that give factors, and of all others.
FACTORED, OTHERS = 1.15, 1.5


def methods(rank: int, only: tuple[str, ...]) -> tuple[dict[str, jlora.Method], list[str]]:
    """The methods by their names in the training job, and the names of those that can't be measured so.

    Raises:
        ValueError: for a name that is no method's.
    """
    recipes = catalog.recipes()
    if unknown := sorted(set(only) - set(recipes)):
        raise ValueError(f"no method has the name {unknown[0]!r}; there are {', '.join(recipes)}")
    found, left = {}, []
    for name in only or tuple(recipes):
        recipe = recipes[name]
        method = recipe.make(rank if "rank" in (recipe.takes or ()) else None, 1000)
        if method.matrix and not method.needs and not recipe.asks and not method.measured:
            found[name] = method
        else:
            left.append(name)
    return found, left


def measure(s: Settings, found: dict[str, jlora.Method], left: list[str]) -> dict[str, dict[str, Any]]:
    """The rows of the table; methods that can't adapt the shape are added to `left`."""
    p = problem(s)
    ways = {"bound": variants.bound(p)}
    for name, method in list(found.items()):
        try:
            ways[name] = variants.lifted(p, variants.adapt(p, method))
        except ValueError as error:  # sizes that don't divide
            left.append(f"{name} ({error})")
            del found[name]
    compiled = step_time.compile_all(ways)
    times = step_time.interleave(step_time.timers(ways, compiled), s.repeats)
    rows: dict[str, dict[str, Any]] = {}
    for name, (program, *_) in compiled.items():
        cost, memory = program.cost_analysis(), program.memory_analysis()
        rows[name] = step_time.timing(name, times) | {
            "gflop": cost["flops"] / 1e9,
            "gb_moved": cost["bytes accessed"] / 1e9,
            "temp_mb": memory.temp_size_in_bytes / 1e6,
        }
        if name in found:
            wanted = FACTORED if found[name].form is Factors else OTHERS
            rows[name] |= {"method": str(found[name]), "wanted": wanted, "met": rows[name]["ratio"] <= wanted}
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The table for a page."""
    m, s = result["machine"], result["settings"]
    lines = [
        f"Shape {s['shape']!r}, {s['batch']} x {s['length']} tokens; jax {m['jax']} on {m['cores']} core(s) of {m['device']}, "
        f"{s['repeats']} repeats. Left out: {', '.join(result['left_out']) or 'none'}.",
        "",
        "| | method | x bound | wanted | GFLOP | GB moved | temp MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        wanted = f"{row['wanted']}{'' if row['met'] else ', MISSED'}" if "wanted" in row else ""
        numbers = f"{row['gflop']:.1f} | {row['gb_moved']:.2f} | {row['temp_mb']:.0f}"
        lines.append(f"| {name} | `{row.get('method', '')}` | {row['ratio']:.2f} | {wanted} | {numbers} |")
    return "\n".join(lines).replace("``", "") + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama")
    parser.add_argument("--only", default="", help="names of --method, with commas between; by default all")
    for each in fields(Settings)[1:]:
        parser.add_argument(f"--{each.name}", type=type(each.default))
    arguments = vars(parser.parse_args())
    only = tuple(filter(None, arguments.pop("only").split(",")))
    s = settings_for(arguments.pop("shape"), **arguments)
    found, left = methods(s.rank, only)
    result = {"settings": asdict(s), "machine": step_time.machine(), "left_out": left, "rows": measure(s, found, left)}
    step_time.RESULTS.mkdir(exist_ok=True)
    stem = step_time.RESULTS / f"methods_time_{s.shape}"
    Path(f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    Path(f"{stem}.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
