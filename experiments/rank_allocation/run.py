"""At equal budgets, is ElaLoRA above AdaLoRA above LoRA, and do the layers that got most ranks matter most?

    python experiments/rank_allocation/run.py [--data FOLDER] [--steps N] [--seeds N] [--tasks NAME ...] [--full]

The claims (Chang et al. 2025, arXiv:2504.00254; Zhang et al. 2023, arXiv:2303.10512): ranks that are moved to where they
matter give better scores than the same number spread evenly, and better than ranks that are only pruned; and taking away the
layers to which ElaLoRA gave most ranks hurts most.

Three budgets of ranks a matrix, on average and at the end. Each method at its own best rate of a grid, chosen at the middle
budget by the final training loss of one seed, then run over other seeds. Ablation: of each trained ElaLoRA model each layer's
adapters are switched off alone, and the rise of the test loss is correlated with the layer's number of ranks. A task is one
case: the mean over its budgets.
"""

import sys
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import study  # noqa: E402
import tasks  # noqa: E402

import jlora  # noqa: E402
from jlora import paths  # noqa: E402

METHODS = ("LoRA", "AdaLoRA", "ElaLoRA")
#: What the claim orders: the first above the second.
PAIRS = (("AdaLoRA", "LoRA"), ("ElaLoRA", "AdaLoRA"), ("ElaLoRA", "LoRA"))
RATES = {"sst2": (1e-3, 2e-3, 4e-3), "e2e": (5e-3, 1e-2, 2e-2, 4e-2, 8e-2)}


def method_of(name, budget, steps):
    """The method with `budget` ranks a matrix at the end; the phases are shares of the run as in the papers' scripts."""
    if name == "LoRA":
        return jlora.LoRA(budget, alpha=16)
    phases = {
        "steps": steps,
        "start_steps": steps // 10,
        "final_steps": steps * 3 // 10,
        "interval": max(1, steps // 20),
    }
    if name == "AdaLoRA":
        return jlora.AdaLoRA(rank=budget * 3 // 2, target=budget, alpha=16, orthogonality=0.1, **phases)
    return jlora.ElaLoRA(rank=budget, alpha=16, **phases)


def plan(results, options):
    variants = [{"method": name} for name in METHODS]
    middle = options.budgets[len(options.budgets) // 2]
    cells = study.best_of_rates(results, options, variants, lambda task, _: RATES[task], extra={"budget": middle})
    runs = [cell for cell in cells if cell["stage"] == "run"]
    others = [{**cell, "budget": budget} for budget in options.budgets if budget != middle for cell in runs]
    return cells + others


def run(cell, options):
    task = tasks.load(cell["task"], options.data)
    method = method_of(cell["method"], cell["budget"], cell["steps"])
    settings = {name: cell[name] for name in ("rate", "steps", "seed", "batch")}
    adapted, losses, state = study.fit(task, method, **settings)
    found = {"losses": losses}
    if cell["stage"] == "run":
        found |= study.tested(task, adapted, options.judged)
        found["ranks"] = final_ranks(task, adapted, state)
        if cell["method"] == "ElaLoRA":
            found["without_layer"] = without_each_layer(task, adapted, options.judged)
            if cell["seed"] == 0:
                jlora.rank_history(adapted, state).plot(options.out / f"ranks_{cell['task']}_{cell['budget']}.png")
    return found


def final_ranks(task, adapted, state):
    """{module: rank} at the end; for LoRA what it was made with."""
    if any(isinstance(site.method, jlora.LoRA) for site in adapted.plan.sites):
        return {
            f"{site.path}[{n}]": site.method.rank
            for site in adapted.plan.sites
            if isinstance(site.method, jlora.LoRA)
            for n in range(site.batch_shape[0])
        }
    return {name: int(rank) for name, rank in jlora.ranks(adapted, state).items()}


def without_each_layer(task, adapted, most):
    """The test loss with the adapters of one layer switched off, for each layer."""
    sites = [site for site in adapted.plan.sites if "e" in site.method.axes]
    losses = []
    for layer in range(sites[0].batch_shape[0]):
        params = jax.tree.map(lambda leaf: leaf, adapted.params)  # new dicts, the same arrays
        for site in sites:
            paths.insert(params, (*site.keys, "e"), paths.lookup(params, site.keys)["e"].at[layer].set(0.0))
        losses.append(study.test_loss(task, adapted.replace(params=params), most))
    return losses


def layer_ranks(record):
    """Ranks of each layer, over its modules."""
    totals = {}
    for name, rank in record["ranks"].items():
        layer = int(name.rsplit("[", 1)[1].rstrip("]"))
        totals[layer] = totals.get(layer, 0) + rank
    return [totals[layer] for layer in sorted(totals)]


def report(results, options):
    lines = [
        "Claims: ElaLoRA is above AdaLoRA above LoRA at equal budgets; the layers to which ElaLoRA gave most ranks matter "
        f"most. All linear layers, alpha 16, {options.steps} steps, {options.seeds} seeds. Means with 95 % intervals; "
        "differences are paired by seed. Score: accuracy, or minus the loss in nats a token for text.",
        "",
        "| task | ranks a matrix | method | rate | test score | difference to LoRA | test loss |",
        "|---|---|---|---|---|---|---|",
    ]
    better, order = {pair: [] for pair in PAIRS if set(pair) <= set(METHODS)}, []
    figure, axes = plt.subplots(1, len(options.tasks), figsize=(4.5 * len(options.tasks), 3.2), squeeze=False)
    for axis, task in zip(axes[0], options.tasks):
        for number, method in enumerate(METHODS):
            means, halves = [], []
            for budget in options.budgets:
                runs = study.select(results, stage="run", task=task, method=method, budget=budget)
                plain = study.select(results, stage="run", task=task, method="LoRA", budget=budget)
                scores = [r["score"] for r in runs]
                text = study.paired(scores, [r["score"] for r in plain])[0]
                mean, half = study.interval(scores)
                means.append(mean)
                halves.append(half)
                lines.append(
                    f"| {task} | {budget} | {method} | {runs[0]['settings']['rate']:g} | {study.shown(scores)} "
                    f"| {'–' if method == 'LoRA' else text} | {study.shown([r['loss'] for r in runs], 4)} |"
                )
            axis.errorbar(
                np.arange(len(means)) + 0.08 * (number - 1), means, halves, label=method, marker="o", capsize=3
            )
        axis.set_xticks(range(len(options.budgets)), [str(b) for b in options.budgets])
        axis.set(title=task, xlabel="ranks a matrix", ylabel="test score")
        axis.grid(alpha=0.3)
        for pair, cases in better.items():
            cases.append(case(results, task, pair, options.budgets))
        order.append(study.Case(task, correlations(results, task, options.budgets)))
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(options.out / "results.png", dpi=120)
    claims = {f"{a} is above {b}": cases for (a, b), cases in better.items()}
    layers = {"layers with more ranks matter more, by the correlation": order}
    return [
        *lines,
        "",
        "Ablation: the rank correlation (Spearman) between a layer's ranks and the rise of the test loss without it, the mean "
        f"over a seed's budgets: {', '.join(f'{each.name} {study.shown(each.differences, 2)}' for each in order)}.",
        "",
        study.edges(results, options.tasks, METHODS),
        "",
        *study.table({**claims, **layers}),
        "",
        study.size(options, options.tasks, study.could_see(claims)),
        "",
        f"Verdict: {study.verdict({**claims, **layers})}",
        "",
        "![scores](results.png)",
        "",
        *[f"![ranks of {task} at {b}](ranks_{task}_{b}.png)" for task in options.tasks for b in options.budgets],
    ]


def case(results, task, pair, budgets):
    """The differences of the scores of two methods by seed, over all budgets."""
    runs = [[study.select(results, stage="run", task=task, method=m, budget=b) for m in pair] for b in budgets]
    differences = [[ours["score"] - theirs["score"] for ours, theirs in zip(*each)] for each in runs]
    return study.Case(
        task, study.pooled(differences), "", study.doubts(*(study.end(results, task=task, method=m) for m in pair))
    )


def correlations(results, task, budgets):
    """By seed, the mean over budgets of the correlation between a layer's ranks and the rise without it; 0 if all are equal."""
    found = []
    for budget in budgets:
        runs = study.select(results, stage="run", task=task, method="ElaLoRA", budget=budget)
        found.append([correlation(r) if len(set(layer_ranks(r))) > 1 else 0.0 for r in runs])
    return study.pooled(found)


def correlation(record):
    rises = [loss - record["loss"] for loss in record["without_layer"]]
    return stats.spearmanr(layer_ranks(record), rises).statistic


STUDY = study.Study(
    __doc__,
    HERE,
    sizes={"steps": 100, "batch": 16, "seeds": 5, "judged": 512, "budgets": (2, 4, 8)},
    full={"steps": 10000, "batch": 32, "judged": 10**9},
    plan=plan,
    run=run,
    report=report,
    tasks=("e2e", "sst2"),
)

if __name__ == "__main__":
    study.main(STUDY)
