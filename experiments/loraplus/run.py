"""Does LoRA+ reach LoRA's final loss in about half the steps?

    python experiments/loraplus/run.py [--data FOLDER] [--steps N] [--seeds N] [--tasks NAME ...] [--full]

The claim (Hayou et al. 2024, arXiv:2402.12354): with a learning rate for B that is lambda times A's, training is up to twice
as fast as LoRA's, at the same cost.

LoRA (lambda 1) and LoRA+ with lambda 4, 8, 16, 32, each at its own best base rate of three, chosen by the final training loss
of one seed, then run over other seeds. Measured: the step at which the training loss (mean of ten steps) first is where
LoRA's run with the same seed ends. The lambda of a task that is judged is the one with the lowest loss on the seed that chose.
Nothing follows where LoRA itself gets there only in its last tenth, when its rate goes to zero: then the time to that loss is
the length of the run for any method.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import study  # noqa: E402
import tasks  # noqa: E402

import jlora  # noqa: E402

RATIOS = (1.0, 4.0, 8.0, 16.0, 32.0)
RATES = {"sst2": 2e-3, "shakespeare": 1e-2}  # the middle of LoRA's grid; factors of two around it


def rates(task, ratio):
    """Three base rates: around LoRA's own, and lower by the root of lambda, since B's is lambda times higher."""
    middle = RATES[task] / ratio**0.5
    return [round(factor * middle, 7) for factor in (0.5, 1.0, 2.0)]


def plan(results, options):
    return study.best_of_rates(
        results, options, [{"ratio": r} for r in RATIOS], lambda task, v: rates(task, v["ratio"])
    )


def run(cell, options):
    task = tasks.load(cell["task"], options.data)
    method = jlora.LoRA(cell["rank"], alpha=cell["rank"])
    settings = {name: cell[name] for name in ("rate", "steps", "seed", "batch", "ratio")}
    adapted, losses, _ = study.fit(task, method, **settings)
    return {"losses": losses, "score": study.judge(task, adapted, options.judged)}


def report(results, options):
    lines = [
        f"Claim: LoRA+ reaches LoRA's final loss in about half the steps. Rank {options.rank}, alpha equal to the rank, all "
        f"linear layers, {options.steps} steps of {options.batch} rows, {options.seeds} seeds; the best base rate of three "
        "for each lambda, chosen on another seed. Means with 95 % intervals. Sentences come in half as many rows.",
        "",
        "| task | lambda | base rate | final loss | steps to LoRA's final loss | share of LoRA's steps | test score |",
        "|---|---|---|---|---|---|---|",
    ]
    cases = []
    figure, axes = plt.subplots(1, len(options.tasks), figsize=(4.5 * len(options.tasks), 3.2), squeeze=False)
    for axis, task in zip(axes[0], options.tasks):
        runs = {ratio: study.select(results, stage="run", task=task, ratio=ratio) for ratio in RATIOS}
        targets = [study.smooth(r["losses"])[-1] for r in runs[1.0]]
        taken = {r: [study.crossing(x, goal) for x, goal in zip(runs[r], targets)] for r in RATIOS}
        for number, ratio in enumerate(RATIOS):
            share = [ours / theirs for ours, theirs in zip(taken[ratio], taken[1.0])]
            if ratio == best_ratio(results, task):
                doubted = study.doubts(*(study.end(results, task=task, ratio=r) for r in (ratio, 1.0)))
                saved = [1 - each for each in share]
                cases.append(study.Case(f"{task}, lambda {ratio:g}", saved, study.late(runs[1.0], targets), doubted))
            curves = [study.smooth(r["losses"]) for r in runs[ratio]]
            study.spread(axis, curves, f"λ = {ratio:g}", f"C{number}")
            lines.append(
                f"| {task} | {ratio:g} | {runs[ratio][0]['settings']['rate']:g} "
                f"| {study.shown([c[-1] for c in curves], 4)} | {study.shown(taken[ratio], 1)} "
                f"| {'–' if ratio == 1 else study.shown(share, 2)} | {study.shown([r['score'] for r in runs[ratio]])} |"
            )
        axis.set(title=task, xlabel="step", ylabel="training loss")
        axis.grid(alpha=0.3)
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(options.out / "results.png", dpi=120)
    claims = {"LoRA+ saves a share of LoRA's steps (of about 0.5)": cases}
    return [
        *lines,
        "",
        "A run that never reaches LoRA's final loss counts one step more than there are. Scores: accuracy, or minus the loss "
        "in nats a token for text.",
        "",
        study.edge_note(results, options.tasks, ratio=1.0),
        "",
        *study.table(claims, 2),
        "",
        study.size(options, options.tasks, study.could_see(claims, 2)),
        "",
        f"Verdict: {study.verdict(claims)}",
        "",
        "![training loss](results.png)",
    ]


def best_ratio(results, task):
    """The lambda, above 1, of the run with the lowest loss on the seed that chose."""
    found = [r for r in study.select(results, stage="choose", task=task) if r["settings"]["ratio"] > 1]
    return min(found, key=lambda r: study.final_loss(r))["settings"]["ratio"]


STUDY = study.Study(
    __doc__,
    HERE,
    sizes={"steps": 100, "batch": 16, "rank": 8, "seeds": 5, "judged": 256},
    full={"steps": 10000, "batch": 16, "rank": 8, "judged": 10**9},
    plan=plan,
    run=run,
    report=report,
    tasks=("shakespeare", "sst2"),
)

if __name__ == "__main__":
    study.main(STUDY)
