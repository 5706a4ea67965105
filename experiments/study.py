"""What every study shares: a grid of runs that is written run by run and resumed, and means with 95 % intervals.

A study's script says which runs it wants (`plan`), how one is done (`run`) and what follows from them (`report`). A run is
a dict of its settings; the results are lines of JSON beside the script, so a script that was stopped goes on where it was.
"""

import argparse
import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tasks
import verdicts as verdicts
from criteria import Criterion, broken, register
from scipy import stats
from verdicts import Case as Case
from verdicts import could_see as could_see
from verdicts import doubts as doubts
from verdicts import interval as interval
from verdicts import paired as paired
from verdicts import pooled as pooled
from verdicts import shown as shown
from verdicts import surely_above as surely_above
from verdicts import table as table
from verdicts import verdict as verdict

import jlora
from jlora import paths

matplotlib.use("Agg")

Record = dict[str, Any]

#: Options of XLA; tests, which compile more than they compute, turn its optimizations off.
COMPILER: dict[str, Any] = {}


@dataclass(frozen=True)
class Study:
    """One claim and how it is tried.

    Attributes:
        about: the script's docstring, shown by --help.
        folder: the script's folder, where results go unless --out says otherwise.
        sizes: the numbers that fix how long the study takes, by name; each is an option of the command line.
        full: the sizes of the paper, as far as they make sense here; for --full.
        plan: `plan(results, options) -> settings of runs`, asked again when those are done: a later stage may depend on the
            results of an earlier one.
        run: `run(settings, options) -> what was found`.
        report: `report(results, options) -> lines of results.md`; it may draw figures into `options.out`.
        tasks: names of the tasks that may be chosen.
        small: the sizes of a small machine, for --small; such results go to the folder's `small`.
        criteria: `criteria(options)` gives what will count as what, written down before the first run; then the plan must
            keep the rules of experiments/README.md. Studies without it were made by older rules.
        needs_data: whether it reads the folder of data.
    """

    about: str
    folder: Path
    sizes: dict[str, Any]
    full: dict[str, Any]
    plan: Callable[[list[Record], Any], list[Record]]
    run: Callable[[Record, Any], Record]
    report: Callable[[list[Record], Any], list[str]]
    tasks: tuple[str, ...] = field(default=())
    small: dict[str, Any] | None = None
    criteria: Callable[[Any], tuple[Criterion, ...]] | None = None
    needs_data: bool = True


def main(study: Study, arguments: list[str] | None = None) -> None:
    """The command line of a study.

    Raises:
        ValueError: where results exist that were made under other criteria, or the plan breaks a rule.
    """
    options = _options(study, arguments)
    rules = study.criteria(options) if study.criteria else ()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if rules:
        register(options.out / "criterion.json", rules, len(results))
    done = {_key(each["settings"]): each for each in results}
    wanted: list[Record] = []
    while (stages := study.plan(_of(done, wanted), options)) != wanted:
        wanted = stages
        _keep(rules, wanted)
        pending = [each for each in wanted if _key(each) not in done]
        for number, settings in enumerate(pending):
            start = time.perf_counter()
            found = study.run(settings, options)
            line = {"settings": settings, **found, "seconds": round(time.perf_counter() - start, 1)}
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            done[_key(settings)] = line
            print(f"{number + 1}/{len(pending)} {_key(settings)} {line['seconds']} s", flush=True)
    lines = study.report(_of(done, wanted), options)
    (options.out / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _keep(rules: tuple[Criterion, ...], planned: list[Record]) -> None:
    """Refuses a plan that has come to its reported runs and breaks a rule, before they are run."""
    if not any(each["stage"] == "run" for each in planned if rules):
        return
    if found := [sentence for rule in rules for sentence in broken(rule, planned)]:
        raise ValueError(f"the plan breaks a rule of experiments/README.md: {'; '.join(found)}")


def _options(study: Study, arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=study.about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=tasks.DATA, help="folder of the data sets and the model")
    parser.add_argument("--out", type=Path, help="folder of the results; by default the script's")
    parser.add_argument("--full", action="store_true", help=f"the paper's size: {study.full}")
    if study.small is not None:
        parser.add_argument("--small", action="store_true", help=f"for a small machine: {study.small}")
    parser.add_argument("--tasks", nargs="+", default=list(study.tasks), help="some of the tasks")
    for name, value in study.sizes.items():
        several = isinstance(value, tuple)
        kind = type(value[0] if several else value)
        parser.add_argument(f"--{name}", type=kind, nargs="+" if several else None, help=f"default {value}")
    options = parser.parse_args(arguments)
    small = study.small is not None and options.small
    if small and options.full:
        parser.error("--small and --full are two sizes; say one")
    options.small = small
    options.out = options.out or (study.folder / "small" if small else study.folder)
    sizes = {**study.sizes, **(study.full if options.full else {}), **((study.small or {}) if small else {})}
    for name, value in sizes.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if study.needs_data and not options.data.is_dir():
        parser.error(f"there is no folder {options.data}; say --data or set JLORA_DATA")
    if unknown := sorted(set(options.tasks) - set(study.tasks)):
        parser.error(f"unknown tasks {unknown}; there are {list(study.tasks)}")
    return options


def _key(settings: Record) -> str:
    return json.dumps(settings, sort_keys=True)


def _of(done: dict[str, Record], wanted: list[Record]) -> list[Record]:
    """The finished among the wanted runs: results of other settings stay in the file and out of the report."""
    return [done[key] for each in wanted if (key := _key(each)) in done]


def fit(
    task: tasks.Task,
    method: jlora.Method | None,
    *,
    rate: float,
    steps: int,
    seed: int,
    batch: int = 16,
    ratio: float | None = None,
    among: np.ndarray | None = None,
    prepared: jlora.Prepared | None = None,
    each_step: Callable[[int, jlora.Adapted, Any], None] | None = None,
) -> tuple[jlora.Adapted, list[float], Any]:
    """Trains by AdamW without decay; the rate rises over the first 5 % of the steps and falls to zero, linearly.

    In a chain it rises so after each restart too.

    Args:
        task: the task.
        method: the method on every linear layer; None trains the head alone.
        rate: the highest learning rate.
        steps: number of steps.
        seed: of the head, the adapters and the order of the rows.
        batch: rows in a step.
        ratio: LoRA+'s lambda.
        among: the rows to train on; None means all.
        prepared: for methods that start from gradients.
        each_step: called with the step, the adapters and the optimizer's state.

    Returns:
        The adapted model, the loss of every step, and the optimizer's state.
    """
    spec = task.spec(method)
    adapted = jlora.adapterize(task.params(seed), spec, jax.random.key(seed), task.sites, prepared)
    # As arrays, which is how a step gets them: numbers that are equal would be one group.
    tx = _optimizer(adapted, jnp.float32(0), None if ratio is None else jnp.float32(ratio))
    state = tx.init(adapted.params)
    step, losses = _step(task), []
    # For methods that look at data between steps; some of it is trained on too.
    rows = [tasks.rows(task.train, np.random.default_rng(seed).permutation(len(task.train["targets"]))[-batch:])]
    ramp = max(1, steps // 20)
    links = method.links if isinstance(method, jlora.Chain) else 1
    starts = [0, *jlora.link_ends(links, steps)]
    for number, chosen in enumerate(tasks.batches(task, seed, steps, batch, among)):
        since = number - max(start for start in starts if start <= number)
        now = rate * min(1, (since + 1) / ramp) * min(1, (steps - number) / max(1, steps - ramp))
        adapted, state, loss = step(adapted, state, tasks.rows(task.train, chosen), now, ratio)
        losses.append(loss)
        adapted, state = jlora.run_events(
            adapted, state, _still(adapted.plan, tx), jax.random.key(seed), number + 1, _mean_loss(task), rows
        )
        if each_step is not None:
            each_step(number, adapted, state)
    return adapted, [round(float(loss), 5) for loss in losses], state


def _optimizer(adapted: jlora.Adapted, rate: Any, ratio: Any) -> optax.GradientTransformation:
    return jlora.optimizer(adapted, optax.adamw, rate, ratio=ratio, weight_decay=0.0)


_OPTIMIZERS: dict[Any, Any] = {}


def _still(plan: Any, tx: Any) -> Any:
    """One optimizer for all runs of a plan: what an event has compiled is found again by it."""
    return _OPTIMIZERS.setdefault(plan, tx)


@functools.cache
def _mean_loss(task: tasks.Task) -> Any:
    """`loss(adapted, batch)` for events that look at held-out data."""
    apply = jlora.lift(task.apply)
    return lambda adapted, batch: task.loss(apply(adapted, batch["inputs"]), batch["targets"])


@functools.cache
def _step(task: tasks.Task) -> Any:
    @functools.partial(jax.jit, compiler_options=COMPILER)
    def step(adapted: jlora.Adapted, state: Any, batch: Any, rate: jax.Array, ratio: jax.Array | None) -> Any:
        rules = (site.method.optimizer_rule for site in adapted.plan.sites)
        statistic = next((rule.statistic for rule in rules if hasattr(rule, "statistic")), None)

        def loss_fn(p: Any) -> tuple[jax.Array, Any]:
            whole, seen = adapted.replace(params=p), None
            if statistic is None:
                outputs = jlora.lift(task.apply)(whole, batch["inputs"])
            else:
                outputs, seen = jlora.observe(task.apply, statistic)(whole, batch["inputs"])
            return task.loss(outputs, batch["targets"]), seen

        (loss, seen), gradients = jax.value_and_grad(loss_fn, has_aux=True)(adapted.params)
        tx = optax.with_extra_args_support(_optimizer(adapted, rate, ratio))
        updates, state = tx.update(gradients, state, adapted.params, inputs=seen)
        return adapted.replace(params=optax.apply_updates(adapted.params, updates)), state, loss

    return step


def flops(compiled: Any) -> float:
    """Floating-point operations of one call, by XLA's own account of the compiled program, which counts a loop's body once.

    Raises:
        ValueError: where the platform's compiler says nothing of it.
    """
    cost = compiled.cost_analysis()
    if not cost or "flops" not in cost:
        raise ValueError(f"the compiler gives no cost of this program, only {sorted(cost or {})}")
    return float(cost["flops"])


def cost(results: list[Record]) -> str:
    """The line of a report that says what its runs took: seconds, and FLOPs where every run has "flops"."""
    seconds = math.fsum(each["seconds"] for each in results)  # `sum` adds up otherwise before Python 3.12
    if all("flops" in each for each in results):
        return f"Cost: {seconds:.0f} s, {sum(each['flops'] for each in results):.1e} FLOPs."
    return f"Cost: {seconds:.0f} s; FLOPs were not counted."


def measured(task: tasks.Task, adapted: Any, most: int) -> Record:
    """ "train_loss" and "test_loss" on fixed rows, the same for all runs: a batch's own loss depends on which rows it has."""
    lost = {}
    for name, data in (("train_loss", task.train), ("test_loss", task.test)):
        count = len(data["targets"])
        which = np.sort(np.random.default_rng(0).permutation(count)[: min(most, count)])
        some = tasks.rows(data, which)
        lost[name] = float(task.loss(_outputs(task, adapted, most, some), some["targets"]))
    return lost


def ranks(adapted: jlora.Adapted) -> dict[str, list[int]]:
    """The ranks of every layer by kernel: those whose gate is not zero, where a method has gates."""
    found = {}
    for site in adapted.plan.sites:
        fields = {**paths.lookup(adapted.frozen, site.keys), **paths.lookup(adapted.params, site.keys)}
        if "a" in fields:
            gates = site.method.gates(fields) if hasattr(site.method, "gates") else np.ones(fields["b"].shape[:-1])
            found[site.path] = np.count_nonzero(np.asarray(gates), axis=-1).tolist()
    return found


def judge(task: tasks.Task, adapted: Any, most: int, data: Record | None = None) -> float:
    """The score on the first `most` rows of the test set, or of other data; of an `Adapted`, or of ordinary params."""
    data = task.test if data is None else data
    outputs = _outputs(task, adapted, most, data)
    return task.score(outputs, data["targets"][: len(outputs)])


def test_loss(task: tasks.Task, adapted: Any, most: int) -> float:
    """The loss on the first `most` rows of the test set."""
    return tested(task, adapted, most)["loss"]


def tested(task: tasks.Task, adapted: Any, most: int) -> Record:
    """The "score" and the "loss" on the first `most` rows of the test set."""
    outputs = _outputs(task, adapted, most, task.test)
    targets = task.test["targets"][: len(outputs)]
    return {"score": task.score(outputs, targets), "loss": float(task.loss(outputs, targets))}


def _outputs(task: tasks.Task, adapted: Any, most: int, data: Record, batch: int = 64) -> np.ndarray:
    count = min(most, len(data["targets"]))
    outputs = []
    for start in range(0, count, batch):
        # The last batch is filled up, so that one compilation serves all.
        which = np.minimum(np.arange(start, start + batch), count - 1)
        outputs.append(np.asarray(_forward(task)(adapted, tasks.rows(data, which)["inputs"])))
    return np.concatenate(outputs)[:count]


@functools.cache
def _forward(task: tasks.Task) -> Any:
    return jax.jit(jlora.lift(task.apply), compiler_options=COMPILER)


def smooth(losses: list[float], width: int = 10) -> np.ndarray:
    """The mean of the last `width` losses at each step; of all so far in the beginning."""
    sums = np.cumsum([0.0, *losses])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def steps_to(losses: list[float], target: float) -> int | None:
    """The first step at which the smoothed loss is at the target or below; None where it never is."""
    reached = np.flatnonzero(smooth(losses)[9:] <= target)
    return int(reached[0]) + 10 if len(reached) else None


def crossing(record: Record, target: float) -> int:
    """`steps_to` of a run, or one step more than it has where it never gets there."""
    reached = steps_to(record["losses"], target)
    return len(record["losses"]) + 1 if reached is None else reached


def blind(task: tasks.Task, most: int) -> float:
    """The score of the commonest label for all of the first `most` test rows; of similarities that are all alike, zero."""
    if task.kind == "regress":
        return 0.0
    targets = task.test["targets"][:most]
    commonest = np.bincount(targets).argmax()
    return task.score(np.eye(targets.max() + 1)[np.full(len(targets), commonest)], targets)


def size(options: Any, names: Any, seen: str, rows: str = "") -> str:
    """The line of a report that says how large the study was.

    Args:
        options: of the command line.
        names: of the tasks.
        seen: what it could have seen; see `verdicts.could_see`.
        rows: of a step; by default those of `best_of_rates`.
    """
    models: dict[str, list[str]] = {}
    for name in names:
        models.setdefault(tasks.model_of(name), []).append(name)
    told = "; ".join(f"{model} on {', '.join(each)}" for model, each in models.items())
    kinds = dict.fromkeys(name in tasks.TEXT for name in names)
    rows = rows or " or ".join(
        f"{options.batch} windows of text" if k else f"{options.batch // 2} sentences" for k in kinds
    )
    return (
        f"Size: {told}; {options.steps} steps of {rows}, {options.judged} test rows at most, {options.seeds} seeds; each rate "
        f"chosen by one seed. {seen}"
    )


def late(runs: list[Record], targets: list[float]) -> str:
    """Why steps to a target can't tell who is faster, if these runs, LoRA's own, come there only at their end."""
    steps = [crossing(run, target) for run, target in zip(runs, targets)]
    share = float(np.mean(steps)) / len(runs[0]["losses"])
    return "LoRA itself gets there in its last tenth, when the rate goes to zero" if share > 0.9 else ""


#: The seed on which learning rates are chosen; the runs that are reported have others.
CHOOSE = 100


def best_of_rates(
    results: list[Record],
    options: Any,
    variants: list[Record],
    rates: Callable[[str, Record], Any],
    extra: Record | None = None,
) -> list[Record]:
    """The runs of a fair comparison: every variant at the best of its learning rates on every task, over the seeds.

    First each rate is run on one seed (stage "choose"), then the best, by the smoothed final training loss, on the others.

    Args:
        results: as `Study.plan` gets them.
        options: with `steps`, `seeds`, `batch` (rows of text; half as many sentences, whose model is 80 times as large) and,
            if there is one, `rank`.
        variants: the settings in which the variants differ.
        rates: the learning rates of a variant on a task.
        extra: settings that are the same for all.
    """

    def fixed(task: str) -> Record:
        sizes = {"steps": options.steps, "batch": options.batch if task in tasks.TEXT else options.batch // 2}
        return {"task": task, **sizes, **({"rank": options.rank} if "rank" in options else {}), **(extra or {})}

    every = [(task, variant) for task in options.tasks for variant in variants]
    chosen = [
        {"stage": "choose", **fixed(task), **variant, "rate": rate, "seed": CHOOSE}
        for task, variant in every
        for rate in rates(task, variant)
    ]
    if len(results) < len(chosen):
        return chosen
    best = [(task, variant, best_rate(results, task=task, **variant)) for task, variant in every]
    runs = [
        {"stage": "run", **fixed(task), **variant, "rate": rate, "seed": seed}
        for seed in range(options.seeds)
        for task, variant, rate in best
    ]
    return chosen + runs


def best_rate(results: list[Record], **wanted: Any) -> float:
    """The learning rate with the lowest smoothed final loss among the runs of stage "choose" with these settings."""
    found = [r for r in results if r["settings"]["stage"] == "choose" and _matches(r, wanted)]
    return min(found, key=final_loss)["settings"]["rate"]


def final_loss(record: Record) -> float:
    """The smoothed loss at the end of a run; infinite where it diverged."""
    return _finite(smooth(record["losses"])[-1])


def edges(results: list[Record], names: Any, methods: Any) -> str:
    """A sentence about the methods whose best rate on a task is at an end of its grid."""
    found = _at_ends(results, {f"{m} on {task}": {"method": m, "task": task} for m in methods for task in names})
    if not found:
        return "Every best rate lies inside its grid."
    cases = "; ".join(f"at the {end} rate {', '.join(labels)}" for end, labels in found.items())
    return f"Best at an end of their grids, so that a wider one could favour them: {cases}."


def edge_note(results: list[Record], names: list[str], **wanted: Any) -> str:
    """A sentence about the tasks on which the runs with these settings, LoRA's, were best at an end of their grid."""
    found = _at_ends(results, {task: {**wanted, "task": task} for task in names})
    if not found:
        return "LoRA's best rate lies inside its grid on every task."
    cases = " and ".join(f"the {end} of its grid on {', '.join(labels)}" for end, labels in found.items())
    return f"LoRA's best rate is {cases}: a wider grid could only favour LoRA."


def _at_ends(results: list[Record], cases: dict[str, Record]) -> dict[str, list[str]]:
    """For the ends of grids, "highest" and "lowest", the labels of the runs that are best there."""
    found: dict[str, list[str]] = {}
    for label, wanted in cases.items():
        if where := end(results, **wanted):
            found.setdefault(where, []).append(label)
    return found


def end(results: list[Record], **wanted: Any) -> str | None:
    """Which end of its grid the best rate of these runs is at, if it is at one."""
    grid = [r["settings"]["rate"] for r in select(results, stage="choose", **wanted)]
    best = best_rate(results, **wanted)
    return "highest" if best == max(grid) else "lowest" if best == min(grid) else None


def select(results: list[Record], **wanted: Any) -> list[Record]:
    """The results with these settings, by seed."""
    return sorted((r for r in results if _matches(r, wanted)), key=lambda r: r["settings"]["seed"])


def _matches(record: Record, wanted: Record) -> bool:
    return all(record["settings"].get(name) == value for name, value in wanted.items())


def _finite(value: float) -> float:
    return float(value) if np.isfinite(value) else float("inf")


def spread(axis: Any, curves: list[np.ndarray], label: str, color: str) -> None:
    """Draws the mean of several curves and its 95 % interval."""
    array = np.array(curves)
    mean = array.mean(0)
    half = (
        stats.t.ppf(0.975, len(array) - 1) * array.std(0, ddof=1) / np.sqrt(len(array)) if len(array) > 1 else 0 * mean
    )
    steps = np.arange(1, len(mean) + 1)
    axis.plot(steps, mean, label=label, color=color)
    axis.fill_between(steps, mean - half, mean + half, color=color, alpha=0.2, linewidth=0)
