"""With few examples, does Deep LoRA overfit less than LoRA, and does it need no tuning of its rank?

    python experiments/deep_lora/run.py [--data FOLDER] [--steps N] [--seeds N] [--tasks NAME ...] [--full]

The claims (Yaras et al. 2024, arXiv:2406.04112): fine-tuned on 16, 64, 256 or 1024 examples, Deep LoRA scores above LoRA, most
where examples are fewest, because its updates find a low rank of their own; and its score hardly depends on the rank given.

The free part of STS-B (similarity, by Pearson's correlation; it has 1,000 training pairs) and RTE (entailment, accuracy).
Depth 3, narrow, as in the authors' few-shot scripts. Each method at its own best rate of three, chosen on one seed with 64
examples by the score on 256 other training rows. A task is one case, the mean over its sizes; tasks on which LoRA does not
learn to be better than the commonest label, or than no correlation, are shown and not counted.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import study  # noqa: E402
import tasks  # noqa: E402

import jlora  # noqa: E402

METHODS = ("LoRA", "DeepLoRA")
RATES = {"LoRA": (5e-4, 2e-3, 8e-3), "DeepLoRA": (5e-4, 2e-3, 8e-3)}
MIDDLE = 64  # examples with which rates are chosen and ranks compared


def method_of(name, rank):
    return jlora.LoRA(rank, alpha=rank) if name == "LoRA" else jlora.DeepLoRA(rank)


def plan(results, options):
    def fixed(task):
        return {"task": task, "steps": options.steps, "batch": options.batch}

    chosen = [
        {
            "stage": "choose",
            **fixed(t),
            "method": m,
            "rank": options.rank,
            "examples": MIDDLE,
            "rate": rate,
            "seed": 100,
        }
        for t in options.tasks
        for m in METHODS
        for rate in RATES[m]
    ]
    if len(results) < len(chosen):
        return chosen
    best = {(t, m): best_rate(results, t, m) for t in options.tasks for m in METHODS}
    cases = dict.fromkeys([(n, options.rank) for n in options.examples] + [(MIDDLE, r) for r in options.ranks])
    return chosen + [
        {"stage": "run", **fixed(t), "method": m, "rank": r, "examples": n, "rate": best[t, m], "seed": seed}
        for seed in range(options.seeds)
        for t in options.tasks
        for n, r in cases
        for m in METHODS
    ]


def best_rate(results, task, method):
    found = study.select(results, stage="choose", task=task, method=method)
    return max(found, key=lambda r: r["score"] if np.isfinite(r["score"]) else -np.inf)["settings"]["rate"]


def run(cell, options):
    task = tasks.load(cell["task"], options.data)
    order = np.random.default_rng(cell["seed"]).permutation(len(task.train["targets"]))
    among, others = order[: cell["examples"]], order[-256:]
    settings = {name: cell[name] for name in ("rate", "steps", "seed", "batch")}
    adapted, losses, _ = study.fit(task, method_of(cell["method"], cell["rank"]), among=among, **settings)
    if cell["stage"] == "choose":
        return {"losses": losses, "score": study.judge(task, adapted, 256, data=tasks.rows(task.train, others))}
    return {
        "losses": losses,
        "score": study.judge(task, adapted, options.judged),
        "train_score": study.judge(task, adapted, 256, data=tasks.rows(task.train, among)),
    }


def report(results, options):
    lines = [
        f"Claims: Deep LoRA overfits less with few examples, and needs no rank tuning. All linear layers, rank {options.rank}, "
        f"{options.steps} steps of {options.batch} rows, {options.seeds} seeds. Means with 95 % intervals; differences are "
        "paired by seed.",
        "",
        "| task | examples | method | rate | test score | Deep LoRA − LoRA | score on its examples |",
        "|---|---|---|---|---|---|---|",
    ]
    few, rank, rates = [], [], {}
    figure, axes = plt.subplots(1, len(options.tasks), figsize=(4.5 * len(options.tasks), 3.2), squeeze=False)
    for axis, task in zip(axes[0], options.tasks):
        scores = {}
        for number, method in enumerate(METHODS):
            for n in options.examples:
                runs = study.select(results, stage="run", task=task, method=method, rank=options.rank, examples=n)
                scores[method, n] = [r["score"] for r in runs]
                difference = "–"
                if method != "LoRA":
                    difference = study.paired(scores[method, n], scores["LoRA", n])[0]
                rates[task, method] = runs[0]["settings"]["rate"]
                lines.append(
                    f"| {task} | {n} | {method} | {runs[0]['settings']['rate']:g} | {study.shown(scores[method, n])} "
                    f"| {difference} | {study.shown([r['train_score'] for r in runs])} |"
                )
            means, halves = zip(*[study.interval(scores[method, n]) for n in options.examples])
            axis.errorbar(options.examples, means, halves, label=method, color=f"C{number}", marker="o", capsize=3)
        blind = study.blind(tasks.load(task, options.data), options.judged)
        learned = any(study.surely_above(scores["LoRA", n], blind) for n in options.examples)
        mute = "" if learned else f"LoRA is nowhere surely above {blind:.3f}, which the commonest label scores"
        doubted = study.doubts(*(rates[task, m] in (min(RATES[m]), max(RATES[m])) for m in ("DeepLoRA", "LoRA")))
        differences = [np.subtract(scores["DeepLoRA", n], scores["LoRA", n]) for n in options.examples]
        few.append(study.Case(task, study.pooled(differences), mute, doubted))
        axis.set(title=task, xlabel="examples", ylabel="test score", xscale="log")
        axis.grid(alpha=0.3)
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(options.out / "results.png", dpi=120)
    lines += [
        "",
        f"With {MIDDLE} examples, by rank:",
        "",
        "| task | method | " + " | ".join(map(str, options.ranks)) + " | spread |",
    ]
    lines += ["|---" * (3 + len(options.ranks)) + "|"]
    spreads = {}
    for task in options.tasks:
        for method in METHODS:
            at = [
                [
                    r["score"]
                    for r in study.select(results, stage="run", task=task, method=method, rank=rank, examples=MIDDLE)
                ]
                for rank in options.ranks
            ]
            spreads[task, method] = np.ptp(np.array(at), axis=0).tolist()  # of each seed, over ranks
            cells = " | ".join(study.shown(values) for values in at)
            lines.append(f"| {task} | {method} | {cells} | {study.shown(spreads[task, method])} |")
    for case in few:
        calmer = np.subtract(spreads[case.name, "LoRA"], spreads[case.name, "DeepLoRA"]).tolist()
        rank.append(study.Case(case.name, calmer, case.mute, case.doubted))
    claims = {
        "with few examples Deep LoRA is above LoRA": few,
        "its score depends less on the rank, by the spread": rank,
    }
    return [
        *lines,
        "",
        "Spread: the best score less the worst over the ranks, by seed.",
        "",
        *study.table(claims),
        "",
        study.size(options, options.tasks, study.could_see(claims), f"{options.batch} sentences"),
        "",
        f"Verdict: {study.verdict(claims)}",
        "",
        "![scores](results.png)",
    ]


STUDY = study.Study(
    __doc__,
    HERE,
    sizes={
        "steps": 60,
        "batch": 8,
        "rank": 8,
        "seeds": 5,
        "judged": 400,
        "examples": (16, 64, 256, 1024),
        "ranks": (2, 8, 32),
    },
    full={"steps": 3000, "batch": 16, "judged": 10**9},
    plan=plan,
    run=run,
    report=report,
    tasks=("stsb", "rte"),
)

if __name__ == "__main__":
    study.main(STUDY)
