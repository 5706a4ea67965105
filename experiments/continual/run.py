"""Do Online-LoRA, SD-LoRA and DualLoRA forget less than one LoRA that is trained on task after task?

    python experiments/continual/run.py [--data FOLDER] [--steps N] [--seeds N] [--orders N] [--full]

The claims: Online-LoRA (Wei et al. 2024, arXiv:2411.05663), SD-LoRA (Wu et al. 2025, arXiv:2501.13198) and DualLoRA (Chen et
al. 2024, arXiv:2411.00623) end with a higher average accuracy than sequential LoRA.

Class-incremental: the intents of BANKING77 in an order that is drawn, in tasks of 7; one head for all intents; no task is told
when it is judged, and intents that were not trained yet are left out of the answer. Every method has the same model, rank,
steps, rows in a step and order of rows, and adapts queries and values. What a head sees matters more than the adapter, so the
rule is a part of each method: "seen" takes the cross-entropy over all intents so far, "own" over those of the present task
alone (rows of the head for others stay as they are). SD-LoRA and DualLoRA have "own", as in SD-LoRA's code, Online-LoRA
"seen", since it is told no tasks; sequential LoRA is run with both. Replay is sequential LoRA, half of whose rows come from a
memory of rows of earlier tasks; joint training sees all tasks at once, for as many steps, and is what a continual method would
like to reach.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import study  # noqa: E402
import tasks  # noqa: E402

import jlora  # noqa: E402

#: For each method the intents that its loss is over.
METHODS = {
    "sequential, seen": "seen",
    "sequential, own": "own",
    "Online-LoRA": "seen",
    "SD-LoRA": "own",
    "DualLoRA": "own",
    "replay": "seen",
    "joint": "seen",
}
#: Each claim's method and what it is compared with, whose head has the same rule.
CLAIMS = {
    "Online-LoRA": "sequential, seen",
    "SD-LoRA": "sequential, own",
    "DualLoRA": "sequential, own",
}
TARGETS = r".*/(query|value)/kernel"
HEAD = r"classifier/(kernel|bias)"
#: The loss that counts as low for Online-LoRA: five sums of two means at most, of which the untrained model's are ln 77 each.
PLATEAU = jlora.Plateau(window=5, mean_below=5.6, variance_below=0.5)


def method_of(name, rank, parts):
    if name == "SD-LoRA":
        return jlora.SDLoRA(rank, tasks=parts)
    if name == "DualLoRA":
        return jlora.DualLoRA(rank, directions=rank, tasks=parts)
    return jlora.LoRA(rank, alpha=2 * rank)


def plan(results, options):
    sizes = {name: getattr(options, name) for name in ("parts", "intents", "steps", "batch", "rank", "memory", "rate")}
    return [
        {"task": task, "method": name, "order": order, "seed": seed, "judged": options.judged, **sizes}
        for seed in range(options.seeds)
        for order in range(options.orders)
        for task in options.tasks
        for name in options.methods
    ]


class Stream:
    """The tasks of an order: which intents they have, and the rows of each."""

    def __init__(self, task, order, parts, intents, judged):
        train, test = task.train["targets"], task.test["targets"]
        there = np.random.default_rng(order).permutation(np.intersect1d(train, test))
        parts = min(parts, len(there) // intents)
        self.classes = [there[n * intents : (n + 1) * intents] for n in range(parts)]
        self.train = [np.flatnonzero(np.isin(train, each)) for each in self.classes]
        self.test = [
            np.random.default_rng(order).permutation(np.flatnonzero(np.isin(test, c)))[:judged] for c in self.classes
        ]

    def mask(self, first, last, size):
        """Which of the head's outputs belong to the tasks from `first` to `last`."""
        return np.isin(np.arange(size), np.concatenate(self.classes[first : last + 1]))


class Memory:
    """Rows of earlier tasks, an equal share of each."""

    def __init__(self, size):
        self.size, self.rows = size, []

    def add(self, rng, rows):
        self.rows = [*self.rows, rng.permutation(rows)]
        share = self.size // len(self.rows)
        self.rows = [each[:share] for each in self.rows]

    def draw(self, rng, count):
        return rng.choice(np.concatenate(self.rows), count)


def run(cell, options):
    task = tasks.load(cell["task"], options.data)
    stream = Stream(task, cell["order"], cell["parts"], cell["intents"], cell["judged"])
    name, seed, key = cell["method"], cell["seed"], jax.random.key(cell["seed"])
    method = method_of(name, cell["rank"], len(stream.classes))
    spec, first = {TARGETS: method, HEAD: jlora.Full()}, tasks.rows(task.train, stream.train[0][:64])
    params, prepared = task.params(seed), None
    if method.needs:
        prepared = jlora.prepare(
            params, spec, lambda p, b: jnp.mean(task.apply(p, b)), [first["inputs"]], sites=task.sites
        )
    adapted = jlora.adapterize(params, spec, key, task.sites, prepared)
    tx = jlora.optimizer(adapted, optax.adam, cell["rate"])
    learner = (Online if name == "Online-LoRA" else Learner)(task, tx, adapted, first, key)
    rng, memory, size = np.random.default_rng(seed), Memory(cell["memory"]), adapted.base["classifier"]["bias"].shape[0]
    table = np.full((len(stream.classes),) * 2, np.nan)
    for t, rows in enumerate(stream.train):
        if t and isinstance(method, jlora.Lifelong):
            learner.next_task(t, tasks.rows(task.train, rng.permutation(rows)[:64]))
        pool = np.concatenate(stream.train) if name == "joint" else rows
        trained = len(stream.classes) - 1 if name == "joint" else t
        mask = stream.mask(t if METHODS[name] == "own" else 0, trained, size)
        for chosen in drawn(rng, pool, cell["steps"], cell["batch"]):
            if name == "replay" and t:
                half = cell["batch"] // 2
                chosen = np.concatenate([chosen[half:], memory.draw(rng, half)])
            learner.step(tasks.rows(task.train, chosen), mask)
        if name == "replay":
            memory.add(rng, rows)
        if name != "joint" or t == len(stream.classes) - 1:
            table[t, : t + 1] = judged(task, learner.adapted, stream, t, size)
    counts = {"trained": sum(x.size for x in jax.tree.leaves(adapted.params))}
    counts |= {"kept": sum(x.size for x in jax.tree.leaves(adapted.frozen)), "programs": learner.programs()}
    return {
        "table": [[None if np.isnan(x) else round(float(x), 4) for x in row] for row in table],
        **counts,
        **learner.told,
    }


def drawn(rng, pool, steps, batch):
    """The rows of each step: epochs in new orders."""
    epochs = -(-steps * batch // len(pool))
    return np.concatenate([rng.permutation(pool) for _ in range(epochs)])[: steps * batch].reshape(steps, batch)


def judged(task, adapted, stream, t, size):
    """The accuracy on each task so far, among the intents so far."""
    data = tasks.rows(task.test, np.concatenate(stream.test[: t + 1]))
    outputs = np.where(stream.mask(0, t, size), study._outputs(task, adapted, 10**9, data), -np.inf)
    right = np.argmax(outputs, -1) == data["targets"]
    return [float(np.mean(each)) for each in np.split(right, np.cumsum([len(rows) for rows in stream.test[:t]]))]


class Learner:
    """Trains an `Adapted` on masked batches; the optimizer moves no row of the head that the mask leaves out."""

    def __init__(self, task, tx, adapted, first, key):
        self.task, self.tx, self.adapted, self.key, self.told = task, tx, adapted, key, {}
        self.state = tx.init(adapted.params)
        self.compiled = jax.jit(self.stepped, compiler_options=study.COMPILER)
        self.seen = jax.jit(jlora.observe(task.apply, jlora.input_covariance), compiler_options=study.COMPILER)

    def stepped(self, adapted, state, batch, mask):
        def loss(p):
            outputs = jlora.lift(self.task.apply)(adapted.replace(params=p), batch["inputs"])
            return self.task.loss(jnp.where(mask, outputs, -1e9), batch["targets"])

        updates, state = self.tx.update(jax.grad(loss)(adapted.params), state, adapted.params)
        head = jax.tree.map(lambda u: jnp.where(mask, u, 0), updates["classifier"])
        return adapted.replace(params=optax.apply_updates(adapted.params, {**updates, "classifier": head})), state

    def step(self, batch, mask):
        self.adapted, self.state = self.compiled(self.adapted, self.state, batch, mask)

    def next_task(self, t, rows):
        needs = any(site.method.needs for site in self.adapted.plan.sites)
        inputs = self.seen(self.adapted, rows["inputs"])[1] if needs else None
        key = jax.random.fold_in(self.key, t)
        self.adapted, self.state = jlora.next_task(self.adapted, self.state, self.tx, key, inputs=inputs)

    def programs(self):
        return self.compiled._cache_size()


class Online(Learner):
    """Online-LoRA, which is told no tasks; each row has its mask, so that one in the buffer keeps what was seen by then."""

    def __init__(self, task, tx, adapted, first, key):
        super().__init__(task, tx, adapted, first, key)

        def logits(adapted, batch):
            return jnp.where(batch["mask"], jlora.lift(task.apply)(adapted, batch["inputs"]), -1e9)

        def losses(adapted, batch):
            return optax.softmax_cross_entropy_with_integer_labels(logits(adapted, batch), batch["targets"])

        online = jlora.OnlineLoRA(losses, tx, lambda a, b: jlora.own_label_losses(logits(a, b)), plateau=PLATEAU)
        size = adapted.base["classifier"]["bias"].shape[0]
        self.memory = online.init(adapted, self.with_mask(first, np.ones(size, bool)))
        self.compiled = jax.jit(online.step, compiler_options=study.COMPILER)
        self.told = {"restarts": 0}

    def with_mask(self, batch, mask):
        return {**batch, "mask": np.broadcast_to(mask, (len(batch["targets"]), len(mask)))}

    def step(self, batch, mask):
        given = (self.adapted, self.state, self.memory, self.with_mask(batch, mask), self.key)
        self.adapted, self.state, self.memory = self.compiled(*given)
        self.told["restarts"] = int(self.memory.restarts)


def scores(record):
    """The average accuracy at the end, and the forgetting (of joint training there is none)."""
    table = np.array(record["table"], float)
    if record["settings"]["method"] == "joint":
        return float(np.mean(table[-1])), float("nan")
    found = jlora.TaskScores(table)
    return found.average, found.forgetting


def report(results, options):
    runs = {name: study.select(results, method=name) for name in options.methods}
    curves(runs, options.out / "results.png")
    claims = claims_of(runs, "BANKING77")
    restarts = [r["restarts"] for r in runs["Online-LoRA"]] if "Online-LoRA" in runs else []
    told = f"Online-LoRA began {np.mean(restarts):.1f} new adapters a run. " if restarts else ""
    return [
        f"BANKING77 in up to {options.parts} tasks of {options.intents} intents, MiniLM's queries and values at rank "
        f"{options.rank}, Adam at {options.rate:g}, {options.steps} steps of {options.batch} rows a task. Orders of the "
        f"intents: {options.orders}; seeds: {options.seeds}; rows that a replay keeps: {options.memory}. One learning rate for "
        "all, which no run chose. Means with 95 % intervals over orders and seeds, which one run has not (nan).",
        "",
        *table_of(runs),
        "",
        f"{told}The constants of SD-LoRA are the finished directions: for their bytes a replay could keep "
        f"{rows_for(runs, options):,} rows of tokens.",
        "",
        *study.table(claims),
        "",
        f"Size: {options.judged} test rows of each task at most. {study.could_see(claims)} One data set is one witness.",
        "",
        f"Verdict: {study.verdict(claims)}",
        "",
        "![mean accuracy over the tasks so far](results.png)",
    ]


def table_of(runs):
    """Lines of a table with the scores and costs of every method."""
    lines = [
        "| method | loss over | average accuracy | forgetting | trained values | constants | compiled steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in runs.items():
        averages, forgot = zip(*map(scores, found))
        lines.append(
            f"| {name} | {METHODS[name]} | {study.shown(averages)} | {'–' if name == 'joint' else study.shown(forgot)} "
            f"| {found[0]['trained']:,} | {found[0]['kept']:,} | {max(r['programs'] for r in found)} |"
        )
    return lines


def curves(runs, path):
    """Draws the mean accuracy on the tasks so far after every task."""
    figure, axis = plt.subplots(figsize=(7, 4))
    for name, found in runs.items():
        every = [[np.mean(row[: t + 1]) for t, row in enumerate(np.array(r["table"], float))] for r in found]
        mean = np.mean(every, axis=0)
        if name == "joint":
            axis.axhline(mean[-1], color="black", linestyle=":", label=name)
        else:
            axis.plot(np.arange(1, len(mean) + 1), mean, marker="o", markersize=3, label=name)
    axis.set(xlabel="tasks trained", ylabel="mean accuracy on the tasks so far")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def claims_of(runs, where):
    """Each claim's case: the differences of the average accuracy by order and seed."""
    averages = {name: [scores(r)[0] for r in found] for name, found in runs.items()}
    return {
        f"{name} ends above {other}": [study.Case(where, np.subtract(averages[name], averages[other]).tolist())]
        for name, other in CLAIMS.items()
        if name in runs and other in runs
    }


def rows_for(runs, options):
    """How many rows of 24 tokens, of 4 bytes each with their mask, the finished directions' bytes would hold."""
    kept = next((found[0]["kept"] for name, found in runs.items() if name == "SD-LoRA"), 0)
    return kept // (2 * 24)


STUDY = study.Study(
    __doc__,
    HERE,
    sizes={
        "parts": 5,
        "intents": 7,
        "steps": 16,
        "batch": 8,
        "rank": 4,
        "orders": 1,
        "seeds": 1,
        "memory": 154,
        "rate": 2e-3,
        "judged": 28,
        "methods": tuple(METHODS),
    },
    full={"parts": 11, "steps": 600, "batch": 32, "rank": 8, "orders": 3, "seeds": 3, "judged": 10**9},
    plan=plan,
    run=run,
    report=report,
    tasks=("banking77",),
)

if __name__ == "__main__":
    study.main(STUDY)
