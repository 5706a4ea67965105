"""Is SHiRA as good as LoRA of equal size, and do two SHiRA adapters added to one base lose less of what they learned?

    python experiments/shira/run.py [--data FOLDER] [--steps N] [--seeds N] [--full]

The claims (Bhardwaj et al. 2024, arXiv:2406.13175): training 1 to 2 % of the weights' entries scores above LoRA on single
tasks; and where adapters of several tasks are added to one base, sparse ones lose less (concept loss). The time to switch
adapters is measured by experiments/benchmarks/switch_time.py.

Two adapters, one for SST-2 and one for BANKING77, each with its own head, are trained alone; then both updates are added to
the base, and each task is judged with its own head. Sizes: SHiRA on 1 and 2 % of every linear layer, LoRA of rank 3 and 5 (1.2
and 2.0 %). Each at its own best rate of four or five, chosen by the final training loss of one seed. Each task is a
case.
"""

import sys
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import study  # noqa: E402
import tasks  # noqa: E402

import jlora  # noqa: E402

METHODS = {
    "LoRA 1 %": jlora.LoRA(3, alpha=6),
    "SHiRA weight 1 %": jlora.SHiRA("weight", density=0.01),
    "SHiRA SNIP 1 %": jlora.SHiRA("snip", density=0.01),
    "LoRA 2 %": jlora.LoRA(5, alpha=10),
    "SHiRA weight 2 %": jlora.SHiRA("weight", density=0.02),
}
TASKS = ("sst2", "banking77")
RATES = {"LoRA": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), "SHiRA": (1e-3, 3e-3, 1e-2, 3e-2)}


def plan(results, options):
    def fixed(method, seed):
        return {"method": method, "seed": seed, "steps": options.steps, "batch": options.batch}

    chosen = [
        {"stage": "choose", "task": task, "rate": rate, **fixed(method, study.CHOOSE)}
        for method in METHODS
        for task in TASKS
        for rate in RATES[method.split()[0]]
    ]
    if len(results) < len(chosen):
        return chosen
    best = {m: {t: study.best_rate(results, method=m, task=t) for t in TASKS} for m in METHODS}
    return chosen + [
        {"stage": "run", "rates": best[method], **fixed(method, seed)}
        for seed in range(options.seeds)
        for method in METHODS
    ]


def train(name, cell, rate, options):
    """The adapted model of a task."""
    task, method, seed = tasks.load(name, options.data), METHODS[cell["method"]], cell["seed"]
    prepared = None
    if method.needs:
        calibration = [tasks.rows(task.train, each) for each in tasks.batches(task, seed, 4, cell["batch"])]
        prepared = jlora.prepare(
            task.params(seed),
            task.spec(method),
            lambda params, batch: task.loss(task.apply(params, batch["inputs"]), batch["targets"]),
            calibration,
            jax.random.key(seed),
            task.sites,
        )
    settings = {"rate": rate, "steps": cell["steps"], "seed": seed, "batch": cell["batch"]}
    return study.fit(task, method, prepared=prepared, **settings)


def run(cell, options):
    if cell["stage"] == "choose":
        return {"losses": train(cell["task"], cell, cell["rate"], options)[1]}
    single, merged, found = {}, {}, {}
    for name in TASKS:
        adapted, losses, _ = train(name, cell, cell["rates"][name], options)
        merged[name] = jlora.merge(adapted)
        single[name] = study.judge(tasks.load(name, options.data), merged[name], options.judged)
        found[f"{name}_losses"] = losses
    base = tasks.load(TASKS[0], options.data).params(0)["backbone"]
    updates = [jax.tree.map(lambda new, old: new - old, merged[name]["backbone"], base) for name in TASKS]
    both = jax.tree.map(lambda old, *each: old + sum(each), base, *updates)
    fused = {
        name: study.judge(tasks.load(name, options.data), {**merged[name], "backbone": both}, options.judged)
        for name in TASKS
    }
    return {**found, "single": single, "fused": fused, "overlap": overlap(*updates)}


def overlap(first, second):
    """The cosine of the two updates over all weights: 0 where they don't disturb each other."""
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (first, second))
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def report(results, options):
    lines = [
        "Claims: SHiRA is above LoRA of equal size, and loses less where two tasks' adapters are added to one base. MiniLM, "
        f"all linear layers, {options.steps} steps of {options.batch} rows, {options.seeds} seeds. Accuracy, means with 95 % "
        "intervals; differences to LoRA of the same size, paired by seed.",
        "",
        "| method | SST-2 | BANKING77 | mean alone | difference | mean of both fused | lost by fusing | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    claims = {}
    figure, axis = plt.subplots(figsize=(7, 3.4))
    for number, method in enumerate(METHODS):
        runs, plain = (study.select(results, stage="run", method=m) for m in (method, f"LoRA {method[-3:]}"))
        alone, fused = ([mean_of(r[when]) for r in runs] for when in ("single", "fused"))
        lost = [a - b for a, b in zip(alone, fused)]
        texts = ["–", "–"]
        if not method.startswith("LoRA"):
            theirs = [mean_of(r["single"]) for r in plain]
            texts[0] = study.paired(alone, theirs)[0]
            texts[1] = study.paired(lost, [a - mean_of(r["fused"]) for a, r in zip(theirs, plain)])[0]
            claims |= claims_of(results, method, f"LoRA {method[-3:]}")
        by_task = " | ".join(study.shown([r["single"][task] for r in runs]) for task in TASKS)
        lines.append(
            f"| {method} | {by_task} | {study.shown(alone)} | {texts[0]} | {study.shown(fused)} | {study.shown(lost)} "
            f"| {texts[1]} |"
        )
        for shift, values, color in ((-0.17, alone, "C0"), (0.17, fused, "C1")):
            mean, half = study.interval(values)
            axis.bar(number + shift, mean, 0.33, yerr=half, color=color, capsize=3)
    axis.set_xticks(range(len(METHODS)), [m.replace(" ", "\n", 1) for m in METHODS], fontsize=8)
    axis.legend(["alone", "both added"], frameon=False)
    axis.set_ylabel("mean accuracy")
    axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(options.out / "results.png", dpi=120)
    return [
        *lines,
        "",
        study.edges(results, TASKS, METHODS),
        "",
        *study.table(claims),
        "",
        study.size(options, TASKS, study.could_see(claims), f"{options.batch} sentences"),
        "",
        f"Verdict: {study.verdict(claims)}",
        "",
        "![accuracy](results.png)",
    ]


def mean_of(scores):
    return float(np.mean(list(scores.values())))


def claims_of(results, method, plain):
    """What the tasks say of a method and LoRA of its size: the score alone, and what is lost where both adapters are added."""
    runs = [study.select(results, stage="run", method=m) for m in (method, plain)]
    alone, kept = [], []
    for task in TASKS:
        doubted = study.doubts(*(study.end(results, method=m, task=task) for m in (method, plain)))
        single = [[r["single"][task] for r in each] for each in runs]
        lost = [[r["single"][task] - r["fused"][task] for r in each] for each in runs]
        alone.append(study.Case(task, np.subtract(*single).tolist(), "", doubted))
        kept.append(study.Case(task, np.subtract(*reversed(lost)).tolist(), "", doubted))
    return {f"{method} is above {plain}": alone, f"{method} loses less than {plain} where two are added": kept}


STUDY = study.Study(
    __doc__,
    HERE,
    sizes={"steps": 100, "batch": 8, "seeds": 5, "judged": 512},
    full={"steps": 3000, "batch": 16, "judged": 10**9},
    plan=plan,
    run=run,
    report=report,
    tasks=(),
)

if __name__ == "__main__":
    study.main(STUDY)
