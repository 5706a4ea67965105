"""Do OLoRA and PiSSA converge faster than LoRA?

    python experiments/olora/run.py [--data FOLDER] [--steps N] [--seeds N] [--tasks NAME ...] [--full]

The claim (Büyükakyüz 2024, arXiv:2406.01775; Meng et al. 2024, arXiv:2404.02948): factors that start from the weight, by QR or
SVD, converge faster than LoRA's, to as good an end or a better one.

The same rank, alpha and rows for each; every method at its own best learning rate of a grid, chosen by the final training
loss of one seed, then run over other seeds. Measured: the step at which the training loss (mean of ten steps) first is where
LoRA's run with the same seed ends, the loss at the end, and the score on the test set. A method is called faster where it
needs fewer steps, and slower where it needs more, beyond the 95 % interval; but nothing follows where LoRA itself gets there
only in its last tenth, when its rate goes to zero: then a slower method can't be seen, and a faster one hardly.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import study  # noqa: E402
import tasks  # noqa: E402

import jlora  # noqa: E402

METHODS = {"LoRA": "kaiming", "OLoRA": "olora", "PiSSA": "pissa"}
RATES = {"sst2": (5e-4, 1e-3, 2e-3, 4e-3), "banking77": (1e-3, 2e-3, 4e-3, 8e-3)}
RATES |= {"shakespeare": (2e-3, 5e-3, 1e-2, 2e-2), "e2e": (2e-3, 5e-3, 1e-2, 2e-2)}


def plan(results, options):
    return study.best_of_rates(results, options, [{"method": m} for m in METHODS], lambda task, _: RATES[task])


def run(cell, options):
    task = tasks.load(cell["task"], options.data)
    method = jlora.LoRA(cell["rank"], alpha=cell["rank"], init=METHODS[cell["method"]])
    adapted, losses, _ = study.fit(
        task, method, rate=cell["rate"], steps=cell["steps"], seed=cell["seed"], batch=cell["batch"]
    )
    return {"losses": losses, "score": study.judge(task, adapted, options.judged)}


def report(results, options):
    lines = [
        f"Claim: OLoRA and PiSSA converge faster than LoRA. Rank {options.rank}, alpha equal to the rank, all linear layers, "
        f"{options.steps} steps of {options.batch} rows, {options.seeds} seeds; best rate of four for each method, chosen on "
        "another seed. Means with 95 % intervals; differences are paired by seed. Sentences come in half as many rows.",
        "",
        "| task | method | rate | final loss | difference | steps to LoRA's final loss | difference | test score |",
        "|---|---|---|---|---|---|---|---|",
    ]
    speed, ends = ({m: [] for m in METHODS if m != "LoRA"} for _ in range(2))
    figure, axes = plt.subplots(1, len(options.tasks), figsize=(4 * len(options.tasks), 3.2), squeeze=False)
    for axis, task in zip(axes[0], options.tasks):
        runs = {m: study.select(results, stage="run", task=task, method=m) for m in METHODS}
        # LoRA's own crossing of its mean final loss is its number of steps, more or less, so each seed has its own target.
        targets = [study.smooth(r["losses"])[-1] for r in runs["LoRA"]]
        taken = {m: [study.crossing(r, goal) for r, goal in zip(runs[m], targets)] for m in METHODS}
        for number, method in enumerate(METHODS):
            curves = [study.smooth(r["losses"]) for r in runs[method]]
            study.spread(axis, curves, method, f"C{number}")
            text = study.paired(taken[method], taken["LoRA"], 1)[0]
            above = study.paired([c[-1] for c in curves], targets, 4)[0]
            if method != "LoRA":
                doubted = study.doubts(*(study.end(results, task=task, method=m) for m in (method, "LoRA")))
                saved = [theirs - ours for ours, theirs in zip(taken[method], taken["LoRA"])]
                lower = [goal - c[-1] for c, goal in zip(curves, targets)]
                speed[method].append(study.Case(task, saved, study.late(runs["LoRA"], targets), doubted))
                ends[method].append(study.Case(task, lower, "", doubted))
            lines.append(
                f"| {task} | {method} | {runs[method][0]['settings']['rate']:g} | {study.shown([c[-1] for c in curves], 4)} "
                f"| {'–' if method == 'LoRA' else above} "
                f"| {study.shown(taken[method], 1)} | {'–' if method == 'LoRA' else text} "
                f"| {study.shown([r['score'] for r in runs[method]])} |"
            )
        axis.set(title=task, xlabel="step", ylabel="training loss")
        axis.grid(alpha=0.3)
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(options.out / "results.png", dpi=120)
    claims = {f"{m} is faster, in steps": cases for m, cases in speed.items()}
    lines += [
        "",
        "Steps are those to the final loss of LoRA's run with the same seed; a run that never reaches it counts one step more "
        "than there are. Scores: accuracy, or minus the loss in nats a token for text.",
        "",
        *by_rate(results, options),
        "",
        study.edge_note(results, options.tasks, method="LoRA"),
        "",
        *study.table(claims, 1),
        "",
        study.size(options, options.tasks, study.could_see(claims, 1)),
        "",
        f"Verdict: {study.verdict(claims)} {beside(ends)} {by_rate(results, options)[-1]}",
        "",
        "![training loss](results.png)",
    ]
    return lines


def by_rate(results, options):
    """The final loss at every rate of the grid, on the seed that chose: the papers compare at one rate."""
    lines = ["The final training loss at each rate, from the lowest to the highest, on the seed that chose:", ""]
    lines += ["| task | rates | " + " | ".join(METHODS) + " |", "|---" * (2 + len(METHODS)) + "|"]
    wins = [0] * len(METHODS)
    for task in options.tasks:
        cells = []
        for method in METHODS:
            runs = study.select(results, stage="choose", task=task, method=method)
            runs.sort(key=lambda r: r["settings"]["rate"])
            cells.append(", ".join(f"{study.smooth(r['losses'])[-1]:.3f}" for r in runs))
        lines.append(f"| {task} | {', '.join(f'{rate:g}' for rate in RATES[task])} | {' | '.join(cells)} |")
        lowest = [float(cell.split(",")[0]) for cell in cells]
        wins = [w + (each < lowest[0]) for w, each in zip(wins, lowest)]
    below = "; ".join(
        f"{m} ends below LoRA on {w} of {len(options.tasks)} tasks" for m, w in zip(METHODS, wins) if m != "LoRA"
    )
    return [*lines, "", f"At the lowest rate of the grid, one for all methods as in the papers: {below}."]


def beside(ends):
    """How the ends compare, which is no matter of speed."""
    words = []
    for method, cases in ends.items():
        sides = [case.side for case in cases]
        words.append(
            f"{method} lower than LoRA on {sides.count('above')} of {len(sides)} tasks, higher on {sides.count('below')}"
        )
    return f"Beside the claim, the loss at the end, each at its own best rate: {'; '.join(words)}."


STUDY = study.Study(
    __doc__,
    HERE,
    sizes={"steps": 100, "batch": 16, "rank": 8, "seeds": 5, "judged": 256},
    full={"steps": 3000, "batch": 16, "rank": 32, "judged": 10**9},
    plan=plan,
    run=run,
    report=report,
    tasks=("shakespeare", "e2e", "sst2", "banking77"),
)

if __name__ == "__main__":
    study.main(STUDY)
