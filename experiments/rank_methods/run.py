"""At three equal budgets of ranks, which way of giving them out is best?

    python experiments/rank_methods/run.py [--data FOLDER] [--steps N] [--seeds N] [--tasks NAME ...] [--full]

The claims, each of its own paper: AdaLoRA (arXiv:2303.10512), ElaLoRA (2504.00254), SoRA (2311.11696), PRILoRA (2401.11316),
ALoRA (2403.16187), GeLoRA (2412.09250) and BeamLoRA (2502.13604) score above LoRA with the same number of ranks.

SST-2, RTE and CoLA with MiniLM. A budget is the mean number of ranks a matrix, at the end for methods that take ranks away;
all meet it exactly (SoRA by its `target`, GeLoRA by its `budget`). PRILoRA sets half of its `a` to zero besides. Each method at
its own best rate of a grid, chosen at the middle budget by the final training loss of one seed, then run over other seeds.
Tasks on which LoRA does not learn to be better than the commonest label are shown, and not counted. A task is one case: the
mean over its budgets.
"""

import functools
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import study  # noqa: E402
import tasks  # noqa: E402

import jlora  # noqa: E402

METHODS = ("LoRA", "AdaLoRA", "ElaLoRA", "SoRA", "PRILoRA", "ALoRA", "GeLoRA", "BeamLoRA")
RATES = {"sst2": (3e-4, 1e-3, 3e-3, 1e-2), "rte": (1e-3, 3e-3, 1e-2), "cola": (1e-3, 3e-3)}


def method_of(name, budget, steps, task):
    """The method with `budget` ranks a matrix; they move between a tenth and seven tenths of the run. PRILoRA prunes on."""
    phases = {"steps": steps, "start_steps": steps // 10, "final_steps": steps * 3 // 10}
    interval = max(1, steps // 20)
    if name == "LoRA":
        return jlora.LoRA(budget, alpha=16)
    if name == "AdaLoRA":
        return jlora.AdaLoRA(rank=budget * 3 // 2, target=budget, alpha=16, interval=interval, **phases)
    if name == "ElaLoRA":
        return jlora.ElaLoRA(rank=budget, alpha=16, interval=interval, **phases)
    if name == "SoRA":
        return jlora.SoRA(rank=budget * 3 // 2, target=budget, alpha=16, l1=1e-3, **phases)
    if name == "PRILoRA":
        return jlora.PRILoRA(first=budget // 2, last=budget + budget // 2, alpha=16, every=max(1, steps // 4))
    if name == "ALoRA":
        return jlora.ALoRA(rank=budget, alpha=16, interval=max(1, steps // 3), **phases)
    if name == "BeamLoRA":
        return jlora.BeamLoRA(rank=budget, alpha=16, steps=steps, final_steps=steps // 3, interval=max(2, steps // 4))
    return jlora.GeLoRA(jlora.gelora_ranks(dimensions_of(task), budget=budget), alpha=16)


@functools.cache
def dimensions_of(task):
    """The dimensions of 256 training rows' hidden states, for GeLoRA."""
    batches = (tasks.rows(task.train, np.arange(start, start + 64))["inputs"] for start in range(0, 256, 64))
    return jlora.intrinsic_dimensions(task.apply, task.params(0), [jlora.ALL_LINEAR], batches, count=256)


def plan(results, options):
    middle = options.budgets[len(options.budgets) // 2]
    variants = [{"method": name} for name in METHODS]
    cells = study.best_of_rates(results, options, variants, lambda task, _: RATES[task], extra={"budget": middle})
    runs = [cell for cell in cells if cell["stage"] == "run"]
    return cells + [{**cell, "budget": budget} for budget in options.budgets if budget != middle for cell in runs]


def run(cell, options):
    task = tasks.load(cell["task"], options.data)
    method = method_of(cell["method"], cell["budget"], cell["steps"], task)
    settings = {name: cell[name] for name in ("rate", "steps", "seed", "batch")}
    adapted, losses, _ = study.fit(task, method, **settings)
    if cell["stage"] == "choose":
        return {"losses": losses}
    return {"losses": losses, **study.tested(task, adapted, options.judged), "ranks": study.ranks(adapted)}


def report(results, options):
    lines = [
        f"Claims: each method is above LoRA with as many ranks. All linear layers, alpha 16, {options.steps} steps of "
        f"{options.batch // 2} rows, {options.seeds} seeds, {options.judged} test rows at most. Scores: accuracy, on CoLA "
        "Matthews' correlation. Means with 95 % intervals; differences to LoRA, of scores and of the test loss, are paired by "
        "seed. Pairs of RTE are cut at 64 tokens.",
    ]
    found = {method: [] for method in METHODS[1:]}
    for task in options.tasks:
        blind = study.blind(tasks.load(task, options.data), options.judged)
        learned = any(study.surely_above(scores_of(results, task, "LoRA", b), blind) for b in options.budgets)
        lines += [
            "",
            f"{task}; the commonest label scores {blind:.3f}"
            + (":" if learned else ", and LoRA no better: nothing was learned, so the task is not counted."),
            "",
            f"| {task} | ranks a matrix | rate | score | difference | test loss | difference |",
            "|---|---|---|---|---|---|---|",
        ]
        for method in METHODS:
            for budget in options.budgets:
                lines.append(row(results, task, method, budget))
        for method in METHODS[1:]:
            found[method].append(case(results, task, method, options.budgets, learned))
    claims = {f"{method} is above LoRA": cases for method, cases in found.items()}
    draw_scores(results, options)
    draw_ranks(results, options)
    return [
        *lines,
        "",
        study.edges(results, options.tasks, METHODS),
        "",
        *study.table(claims),
        "",
        study.size(options, options.tasks, study.could_see(claims)),
        "",
        f"Verdict: {study.verdict(claims)}",
        "",
        "![scores](results.png)",
        "",
        "Ranks of each kernel (down) in each layer (across) at the end, mean over seeds, at the middle budget:",
        "",
        "![ranks](ranks.png)",
    ]


def case(results, task, method, budgets, learned):
    """The differences of the scores by seed, over all budgets."""
    runs = [[scores_of(results, task, m, b) for m in (method, "LoRA")] for b in budgets]
    differences = study.pooled([np.subtract(ours, theirs) for ours, theirs in runs])
    doubted = study.doubts(*(study.end(results, task=task, method=m) for m in (method, "LoRA")))
    return study.Case(task, differences, "" if learned else "nothing was learned", doubted)


def scores_of(results, task, method, budget):
    return [r["score"] for r in study.select(results, stage="run", task=task, method=method, budget=budget)]


def row(results, task, method, budget):
    """A row of the table."""
    ours, theirs = (study.select(results, stage="run", task=task, method=m, budget=budget) for m in (method, "LoRA"))
    cells = [method, str(budget), f"{ours[0]['settings']['rate']:g}"]
    for name in ("score", "loss"):
        values, others = ([r[name] for r in runs] for runs in (ours, theirs))
        cells += [study.shown(values), "–" if method == "LoRA" else study.paired(values, others)[0]]
    return f"| {' | '.join(cells)} |"


def draw_scores(results, options):
    figure, axes = plt.subplots(1, len(options.tasks), figsize=(4.5 * len(options.tasks), 3.4), squeeze=False)
    for axis, task in zip(axes[0], options.tasks):
        for number, method in enumerate(METHODS):
            runs = [study.select(results, stage="run", task=task, method=method, budget=b) for b in options.budgets]
            means, halves = zip(*(study.interval([r["score"] for r in each]) for each in runs))
            places = np.arange(len(means)) + 0.09 * (number - len(METHODS) / 2)
            axis.errorbar(places, means, halves, label=method, marker="o", capsize=2, linestyle="none")
        axis.set_xticks(range(len(options.budgets)), [str(b) for b in options.budgets])
        axis.set(title=task, xlabel="ranks a matrix", ylabel="test score")
        axis.grid(alpha=0.3)
    axes[0][-1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(options.out / "results.png", dpi=120)


def draw_ranks(results, options):
    middle = options.budgets[len(options.budgets) // 2]
    size = (1.9 * len(METHODS) + 1, 1.9 * len(options.tasks) + 0.4)
    figure, axes = plt.subplots(len(options.tasks), len(METHODS), figsize=size, squeeze=False, layout="constrained")
    for row, task in zip(axes, options.tasks):
        for axis, method in zip(row, METHODS):
            runs = study.select(results, stage="run", task=task, method=method, budget=middle)
            kernels = list(runs[0]["ranks"])
            table = np.mean([[r["ranks"][kernel] for kernel in kernels] for r in runs], axis=0)
            image = axis.imshow(table, vmin=0, vmax=2 * middle, aspect="auto")
            axis.set_title(f"{method}, {task}", fontsize=8)
            axis.set_xticks(range(table.shape[1]), [str(n) for n in range(table.shape[1])], fontsize=6)
            names = (
                ["/".join(kernel.split("/")[-3:-1]) for kernel in kernels] if axis is row[0] else [""] * len(kernels)
            )
            axis.set_yticks(range(len(kernels)), names, fontsize=6)
    figure.colorbar(image, ax=axes, label="ranks", shrink=0.6)
    figure.savefig(options.out / "ranks.png", dpi=120)


STUDY = study.Study(
    __doc__,
    HERE,
    sizes={"steps": 60, "batch": 16, "seeds": 5, "judged": 512, "budgets": (2, 4, 8)},
    full={"steps": 5000, "batch": 64, "judged": 10**9},
    plan=plan,
    run=run,
    report=report,
    tasks=("sst2", "rte", "cola"),
)

if __name__ == "__main__":
    study.main(STUDY)
