"""Do Online-LoRA, SD-LoRA and DualLoRA forget less of split MNIST than one LoRA that is trained on task after task?

    python experiments/split_mnist/run.py [--data FOLDER] [--steps N] [--seeds N] [--orders N] [--full]

The claims, the methods and the rules of their losses are those of experiments/continual; this is the same stream with images,
and with enough orders and seeds for intervals. Class-incremental: the ten digits in an order that is drawn, in five tasks of
two; one head, no task is told when it is judged, and digits that were not trained yet are left out of the answer.

The backbone must not have seen the classes. It is a small Vision Transformer that learned to tell by how much an image was
turned (experiments/vit, `--labels turns`) and has read no label of MNIST; it stays frozen. Its head is new in every run. Replay
has the memory of SD-LoRA's constants: as many images, a byte for each pixel, as these have bytes.

The criterion, which was written before the first run: a claim lies on a side where the 95 % interval of the difference of the
average accuracy, over the runs with the same order and seed, lies there; and one data set is one witness, so that the verdict
on a claim is "inconclusive" whatever its side. The settings, with one learning rate for all, were fixed before it as well.
"""

import functools
import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import mnist  # noqa: E402
import study  # noqa: E402
import tasks  # noqa: E402

import jlora  # noqa: E402
from jlora import models  # noqa: E402


def beside(folder, file):
    """The module of a script of another experiment."""
    spec = importlib.util.spec_from_file_location(f"{folder}_{file}", HERE.parent / folder / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


continual, vit = beside("continual", "run"), beside("vit", "train")
METHODS = continual.METHODS
TARGETS = r".*/[qv]_proj/kernel"
DIGITS = 10
#: The loss that counts as low for Online-LoRA, as many times ln 10 as in experiments/continual ln 77.
PLATEAU = jlora.Plateau(window=5, mean_below=3.0, variance_below=0.5)


def plan(results, options):
    sizes = {
        name: getattr(options, name)
        for name in ("steps", "batch", "rank", "memory", "rate", "images", "judged", "turns")
    }
    return [
        {"task": task, "method": name, "order": order, "seed": seed, **sizes}
        for name in options.methods
        for seed in range(options.seeds)
        for order in range(options.orders)
        for task in options.tasks
    ]


@functools.cache
def data_of(folder, images, judged):
    """Images and digits to train on, and as many of each digit to judge by."""
    train, test = mnist.load(folder, tasks.MOST_ROWS or images)
    test = mnist.load(folder)[1] if tasks.MOST_ROWS is None else test
    chosen = np.concatenate([np.flatnonzero(test[1] == digit)[:judged] for digit in range(DIGITS)])
    return train, (test[0][chosen], test[1][chosen])


def backbone(options, turns):
    """The Vision Transformer that has learned turns, made where it is not there."""
    folder = options.out / "backbone"
    if not folder.exists():
        images = mnist.load(options.data, tasks.MOST_ROWS)[0]
        vit.write(folder, "turns", *vit.train("turns", *images, turns, 0, study.COMPILER)[:2])
    return models.load(folder)


class Learner:
    """The compiled programs of a kind of adapter: all runs of it share them, since they differ in arrays alone."""

    def __init__(self, kind, model, params, spec, first, rate):
        self.model, self.spec = model, spec
        self.sites = jlora.sites(self.apply, params, first[0])
        adapted = self.start(params, jax.random.key(0), first[0])
        self.tx = jlora.optimizer(adapted, optax.adam, rate)
        compiled = functools.partial(jax.jit, compiler_options=study.COMPILER)
        self.train = compiled(self.online_steps if kind == "Online-LoRA" else self.steps)
        self.judge = compiled(jlora.lift(self.apply))
        self.seen = compiled(
            lambda adapted, images: jlora.observe(self.apply, jlora.input_covariance)(adapted, images)[1]
        )

    def apply(self, params, images):
        return self.model.apply({"params": params}, images)

    def mean(self, params, images):
        return jnp.mean(self.apply(params, images))

    def start(self, params, key, images):
        prepared = None
        if any(getattr(method, "needs", ()) for method in self.spec.values()):
            prepared = jlora.prepare(params, self.spec, self.mean, [images], sites=self.sites)
        return jlora.adapterize(params, self.spec, key, self.sites, prepared)

    def logits(self, adapted, batch):
        return jnp.where(batch["mask"], jlora.lift(self.apply)(adapted, batch["images"]), -1e9)

    def row_losses(self, adapted, batch):
        return optax.softmax_cross_entropy_with_integer_labels(self.logits(adapted, batch), batch["targets"])

    def steps(self, adapted, state, memory, batches, key):
        """All steps of a task; the optimizer moves no row of the head that the mask leaves out."""

        def step(carry, batch):
            adapted, state = carry
            gradients = jax.grad(lambda p: jnp.mean(self.row_losses(adapted.replace(params=p), batch)))(adapted.params)
            updates, state = self.tx.update(gradients, state, adapted.params)
            head = jax.tree.map(lambda u: jnp.where(batch["mask"][0], u, 0), updates["classifier"])
            return (
                adapted.replace(params=optax.apply_updates(adapted.params, {**updates, "classifier": head})),
                state,
            ), None

        (adapted, state), _ = jax.lax.scan(step, (adapted, state), batches)
        return adapted, state, memory

    def surprise(self, adapted, batch):
        return jlora.own_label_losses(self.logits(adapted, batch))

    @functools.cached_property
    def online(self):
        return jlora.OnlineLoRA(self.row_losses, self.tx, self.surprise, plateau=PLATEAU)

    def online_steps(self, adapted, state, memory, batches, key):
        """All steps of a task, which Online-LoRA is not told; each row has its mask, as it was when it came."""

        def step(carry, batch):
            return self.online.step(*carry, batch, key), None

        return jax.lax.scan(step, (adapted, state, memory), batches)[0]


@functools.cache
def learner(kind, rank, rate, data, images, judged, out, turns):
    options = type("Options", (), {"data": data, "out": out})
    model, pretrained = backbone(options, turns)
    classifier, params = models.make_classifier(model, pretrained, DIGITS, jax.random.key(0))
    method = continual.method_of(kind, rank, DIGITS // 2)
    (train, digits), _ = data_of(data, images, judged)
    spec = {TARGETS: method, continual.HEAD: jlora.Full()}
    return Learner(kind, classifier, params, spec, (train[:64], digits[:64]), rate), pretrained


def run(cell, options):
    name, seed, key = cell["method"], cell["seed"], jax.random.key(cell["seed"])
    kind = name if name in ("SD-LoRA", "DualLoRA", "Online-LoRA") else "LoRA"
    shared = (cell["rank"], cell["rate"], options.data, cell["images"], cell["judged"], options.out, cell["turns"])
    learn, pretrained = learner(kind, *shared)
    (images, digits), (shown, answers) = data_of(options.data, cell["images"], cell["judged"])
    order = np.random.default_rng(cell["order"]).permutation(DIGITS).reshape(-1, 2)
    rows = [np.flatnonzero(np.isin(digits, each)) for each in order]
    params = models.make_classifier(learn.model, pretrained, DIGITS, jax.random.key(1000 + seed))[1]
    adapted = learn.start(params, key, images[rows[0][:64]])
    rng, memory, state = np.random.default_rng(seed), continual.Memory(cell["memory"]), learn.tx.init(adapted.params)

    def batches(chosen, mask):
        masks = np.broadcast_to(np.isin(np.arange(DIGITS), mask), (*chosen.shape, DIGITS))
        return {"images": images[chosen], "targets": digits[chosen], "mask": masks}

    remembered = None
    if kind == "Online-LoRA":
        first = jax.tree.map(lambda x: x[0], batches(np.resize(rows[0], (1, cell["batch"])), order[0]))
        remembered = learn.online.init(adapted, first)
    counts = {"trained": sum(x.size for x in jax.tree.leaves(adapted.params))}
    counts |= {"kept": sum(x.size for x in jax.tree.leaves(adapted.frozen))}
    table = np.full((len(order),) * 2, np.nan)
    for t, own in enumerate(rows):
        if t and kind in ("SD-LoRA", "DualLoRA"):
            inputs = learn.seen(adapted, images[rng.permutation(own)[:64]]) if kind == "DualLoRA" else None
            adapted, state = jlora.next_task(adapted, state, learn.tx, jax.random.fold_in(key, t), inputs=inputs)
        pool = np.concatenate(rows) if name == "joint" else own
        chosen = continual.drawn(rng, pool, cell["steps"], cell["batch"])
        if name == "replay" and t:
            half = cell["batch"] // 2
            chosen[:, :half] = memory.draw(rng, chosen[:, :half].shape)
        seen = order if name == "joint" else order[t] if METHODS[name] == "own" else order[: t + 1]
        adapted, state, remembered = learn.train(adapted, state, remembered, batches(chosen, seen), key)
        if name == "replay":
            memory.add(rng, own)
        if name != "joint" or t == len(order) - 1:
            mask = np.isin(np.arange(DIGITS), order[: t + 1])
            right = np.argmax(np.where(mask, learn.judge(adapted, shown), -np.inf), -1) == answers
            table[t, : t + 1] = [np.mean(right[np.isin(answers, each)]) for each in order[: t + 1]]
    told = {"restarts": int(remembered.restarts)} if kind == "Online-LoRA" else {}
    return {
        "table": [[None if np.isnan(x) else round(float(x), 4) for x in row] for row in table],
        **counts,
        "programs": learn.train._cache_size(),
        **told,
    }


def report(results, options):
    runs = {name: study.select(results, method=name) for name in options.methods}
    continual.curves(runs, options.out / "results.png")
    claims = continual.claims_of(runs, "split MNIST")
    replay = {f"{name} ends above a replay of the memory of SD-LoRA": name for name in continual.CLAIMS}
    averages = {name: [continual.scores(r)[0] for r in found] for name, found in runs.items()}
    against = {
        claim: [study.Case("split MNIST", np.subtract(averages[name], averages["replay"]).tolist())]
        for claim, name in replay.items()
        if name in runs and "replay" in runs
    }
    kept = next((found[0]["kept"] for name, found in runs.items() if name == "SD-LoRA"), 0)
    restarts = [r["restarts"] for r in runs.get("Online-LoRA", [])]
    began = f"Online-LoRA began {np.mean(restarts):.1f} new adapters a run. " if restarts else ""
    return [
        f"Split MNIST in five tasks of two digits; a Vision Transformer of 75,000 parameters that has learned turns for "
        f"{options.turns} steps and no digit, its queries and values at rank {options.rank}, Adam at {options.rate:g}, "
        f"{options.steps} steps of {options.batch} images a task. Orders of the digits: {options.orders}; seeds: "
        f"{options.seeds}; images that a replay keeps: {options.memory}. One learning rate for all, which no run chose. Means "
        "with 95 % intervals over orders and seeds.",
        "",
        *continual.table_of(runs),
        "",
        f"{began}The constants of SD-LoRA have {4 * kept:,} bytes, those of {4 * kept // 784} images.",
        "",
        *study.table(claims),
        "",
        "Beside the claims, and tried in the same runs:",
        "",
        *study.table(against),
        "",
        f"Size: {2 * options.judged} test images of each task. {study.could_see(claims)} One data set is one witness.",
        "",
        f"Verdict: {study.verdict(claims)}",
        "",
        "![mean accuracy over the tasks so far](results.png)",
    ]


STUDY = study.Study(
    __doc__,
    HERE,
    sizes={
        "steps": 50,
        "batch": 32,
        "rank": 4,
        "orders": 3,
        "seeds": 3,
        "memory": 41,
        "rate": 5e-3,
        "images": 20_000,
        "judged": 100,
        "turns": 600,
        "methods": tuple(METHODS),
    },
    full={"steps": 1000, "images": 60_000, "judged": 800, "turns": 10_000},
    plan=plan,
    run=run,
    report=report,
    tasks=("mnist",),
)

if __name__ == "__main__":
    study.main(STUDY)
