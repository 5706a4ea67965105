"""Does the best ratio of LoRA+'s two learning rates grow with the width of the network?

    python experiments/loraplus_theory/run.py [--widths N ...] [--seeds N] [--steps N] [--tasks NAME ...] [--small]

The claim (Hayou et al. 2024, arXiv:2402.12354): in the limit of large width n LoRA learns features efficiently only with a
rate of A that falls as 1 / n and a rate of B that stays. So the best ratio of B's rate to A's grows as n: log over log, a slope
of one.

The student is `y = φ(φ(x W_in) (W + a b)) w_out` with all but LoRA's factors drawn and frozen, at variance 1 / inputs, `a` with
entries of the same size, `b` zero. A teacher of the same form and width 32, without LoRA, draws the targets, which are the
same for all widths. Tasks are activations φ. Adam on all rows at once, for each pair of rates on a grid of 8 x 8 whose
neighbours are a factor of four apart; both fall to zero linearly. All runs of a grid are one program. Measured: the loss at the
end, on the rows of training, since the theory is about training; for each seed the best ratio at each width, between the grid's
points by a parabola through the logarithm of the loss at the best point and its neighbours; and the slope of the ratio's
logarithm over the width's.

The grid of a width grows by itself while the best pair of any seed lies at an end, and what a still wider one could undo does
not count. The paper's own toy experiment is of this kind; its exact sizes were not at hand, and those here are ours. They and
the parabola were settled after a first run of `--small`. Once the study had run, a grid that grew only while the mean over
seeds was best at an end turned out too narrow: 15 of 80 best pairs lay at ends (slope +0.19, -0.31 to +0.69, "not of this
size"). So the grids were made to grow by seed, and the criterion stayed.
"""

import functools
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import grids  # noqa: E402
import ruling  # noqa: E402
import study  # noqa: E402
from criteria import Criterion  # noqa: E402

import jlora  # noqa: E402

ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh}
FEATURES, TEACHER, FACTOR = 8, 32, 4.0
#: The grid at the beginning: a rate of A, or B, is the factor to one of these powers.
POWERS = tuple(range(-8, 0))


def criteria(options):
    return (
        Criterion(
            claim="the best ratio of B's rate to A's grows with the width",
            paper="theory: in proportion to the width, a slope of 1",
            difference="slope of the logarithm of the best ratio over that of the width",
            effect=1.0,
            tasks=tuple(options.tasks),
            seeds=options.seeds,
            rates="measured",
            small=options.small,
        ),
    )


def network(params, x, activation):
    """Two hidden layers of the same width and one output: `[rows]`."""
    act = ACTIVATIONS[activation]
    return act(act(x @ params["in"]) @ params["hidden"]["kernel"]) @ params["out"]


def drawn(key, width):
    """Weights normal with variance one over the number of inputs."""
    keys = jax.random.split(key, 3)
    return {
        "in": jax.random.normal(keys[0], (FEATURES, width)) / FEATURES**0.5,
        "hidden": {"kernel": jax.random.normal(keys[1], (width, width)) / width**0.5},
        "out": jax.random.normal(keys[2], (width,)) / width**0.5,
    }


def data(seed, rows, activation):
    """Inputs and the teacher's outputs at mean 0 and variance 1; of training and of the test, by the seed alone."""
    key = jax.random.key(1000 + seed)
    x = jax.random.normal(jax.random.fold_in(key, 1), (2 * rows, FEATURES))
    y = network(drawn(key, TEACHER), x, activation)
    y = (y - y.mean()) / y.std()
    return (x[:rows], y[:rows]), (x[rows:], y[rows:])


@functools.cache
def program(activation, steps):
    """`train(stacked, state, rate, ratio, count, batch)`: one step of all runs, and their losses before it."""
    fn = jlora.lift(lambda params, x: network(params, x, activation))

    def loss_of(adapted, batch):
        return jnp.mean((fn(adapted, batch[0]) - batch[1]) ** 2)

    def step(adapted, state, rate, ratio, count, batch):
        loss, gradients = jax.value_and_grad(lambda p: loss_of(adapted.replace(params=p), batch))(adapted.params)
        updates, state = optimizer(adapted, rate * (1 - count / steps), ratio).update(gradients, state, adapted.params)
        return optax.apply_updates(adapted.params, updates), state, loss

    return (
        jax.jit(jlora.each_run(step, (0, 0, 0, 0, None, None)), donate_argnums=1, compiler_options=study.COMPILER),
        jax.jit(jlora.each_run(loss_of, (0, None)), compiler_options=study.COMPILER),
    )


#: What a width's grid was compiled to: other seeds have the same shapes.
_COMPILED = {}


def optimizer(adapted, rate, ratio):
    return jlora.optimizer(adapted, optax.adam, rate, ratio=ratio)


def run(cell, options):
    """Losses at the end `[rates of A, rates of B]`, of training and test; none where a run diverged."""
    width, seed, steps = (cell[name] for name in ("width", "seed", "steps"))
    params = drawn(jax.random.key(seed), width)
    spec = {"hidden/kernel": jlora.LoRA(cell["rank"], alpha=cell["rank"])}
    train_rows, test_rows = data(seed, cell["rows"], cell["task"])
    of_a, of_b = (np.float32(FACTOR) ** np.array(cell[name], np.float32) for name in ("powers_a", "powers_b"))
    rate, ratio = np.repeat(of_a, len(of_b)), np.tile(of_b, len(of_a)) / np.repeat(of_a, len(of_b))
    start = jlora.adapterize(params, spec, jax.random.key(seed))
    stacked = jlora.stack([start] * len(rate))
    state = jax.jit(jlora.each_run(lambda adapted, r, q: optimizer(adapted, r, q).init(adapted.params)))(
        stacked, rate, ratio
    )
    train, loss_of = program(cell["task"], steps)
    asked = (cell["task"], width, cell["rows"], cell["rank"], steps, len(rate))
    if asked not in _COMPILED:
        _COMPILED[asked] = train.lower(stacked, state, rate, ratio, jnp.float32(0), train_rows).compile()
    compiled = _COMPILED[asked]
    for count in range(steps):
        trained, state, _ = compiled(stacked, state, rate, ratio, jnp.float32(count), train_rows)
        stacked = stacked.replace(params=trained)
    found = {"flops": study.flops(compiled) * steps}
    for name, rows in (("train_loss", train_rows), ("test_loss", test_rows)):
        table = np.asarray(loss_of(stacked, rows), np.float64).reshape(len(of_a), len(of_b))
        found[name] = [[float(f"{v:.5g}") if np.isfinite(v) else None for v in row] for row in table]
    return found


def plan(results, options):
    """The grid of every width and seed; while any best pair lies at an end one more rate of A or B, with all of the other."""
    wanted = []
    for task in options.tasks:
        for width in options.widths:
            blocks = [(POWERS, POWERS)]
            while (tables := tables_of(results, task, width, blocks, options)) is not None:
                ends = Counter(grown(table) for table in tables if grown(table) is not None)
                if not ends or len(blocks) > grids.MOST:
                    break
                blocks.append(ends.most_common(1)[0][0])
            wanted += [
                settings(options, task, width, seed, *block) for block in blocks for seed in range(options.seeds)
            ]
    return wanted


def settings(options, task, width, seed, of_a, of_b):
    sizes = {name: getattr(options, name) for name in ("steps", "rows", "rank")}
    own = {"width": width, "powers_a": list(of_a), "powers_b": list(of_b), "seed": seed}
    return {"stage": "run", "task": task, **sizes, **own}


def grown(table):
    """The powers of A and of B of the block by which a grid grows, at the end where its best is; None if that is inside."""
    axes = [tuple(sorted({place[axis] for place in table})) for axis in (0, 1)]
    for axis, (powers, power) in enumerate(zip(axes, lowest(table))):
        beyond = {powers[0]: powers[0] - 1, powers[-1]: powers[-1] + 1}.get(power)
        if beyond is not None:
            return ((beyond,), axes[1]) if axis == 0 else (axes[0], (beyond,))
    return None


def lowest(table):
    """The pair of powers with the lowest loss."""
    return min(table, key=lambda place: (table[place], place))


def between(table):
    """Where the loss is lowest, between the grid's points: a pair of powers.

    Along each axis the lowest point of the parabola through the logarithm of the loss at the best pair and its two neighbours,
    which is at most half a step away; the best pair itself at an end of the grid, or beside a run that diverged.
    """
    found = list(lowest(table))
    for axis, power in enumerate(lowest(table)):
        beside = [tuple(power + step if n == axis else p for n, p in enumerate(lowest(table))) for step in (-1, 1)]
        left, right = (np.log(table.get(place, np.inf)) for place in beside)
        middle = np.log(table[lowest(table)])
        curvature = left - 2 * middle + right
        if np.isfinite(curvature) and curvature > 0:
            found[axis] += (left - right) / (2 * curvature)
    return tuple(found)


def tables_of(results, task, width, blocks, options):
    """For each seed the losses of these blocks; None where a run is missing."""
    asked = [settings(options, task, width, seed, *block) for block in blocks for seed in range(options.seeds)]
    found = [each for each in results if each["settings"] in asked]
    if len(found) < len(asked):
        return None
    return [losses(found, task, width, seed) for seed in range(options.seeds)]


def losses(results, task, width, seed):
    """The training loss of each pair of powers; infinite where a run diverged."""
    table = {}
    for each in study.select(results, task=task, width=width, seed=seed):
        for of_a, row in zip(each["settings"]["powers_a"], each["train_loss"]):
            for of_b, loss in zip(each["settings"]["powers_b"], row):
                # Zero has no logarithm, and below this, of targets of variance one, float32 tells nothing apart.
                table[of_a, of_b] = np.inf if loss is None else max(loss, 1e-12)
    return table


def slope(widths, ratios):
    """Of the logarithm of the ratios over that of the widths, by least squares."""
    return float(np.polyfit(np.log(widths), np.log(ratios), 1)[0])


def report(results, options):
    lines = [
        "Claim: the best ratio of B's learning rate to A's grows in proportion to the width. For each width and seed the "
        f"pair of rates with the lowest training loss after {options.steps} steps of Adam on {options.rows} rows, rank "
        f"{options.rank}; means over {options.seeds} seeds.",
        "",
        "| φ | width | best rate of A | of B | best ratio | loss there | loss at equal rates | seeds at an end of the grid |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cases = []
    for task in options.tasks:
        best, at_end = {}, False
        for width in options.widths:
            tables = [losses(results, task, width, seed) for seed in range(options.seeds)]
            best[width] = [between(table) for table in tables]
            ends = [grown(table) is not None for table in tables]
            at_end |= any(ends)
            equal = [min(loss for (a, b), loss in table.items() if a == b) for table in tables]
            powers = np.array(best[width])
            told = (
                *FACTOR ** powers.mean(0),
                FACTOR ** (powers[:, 1] - powers[:, 0]).mean(),
                geometric([min(table.values()) for table in tables]),
                geometric(equal),
            )
            lines.append(
                f"| {task} | {width} | {' | '.join(f'{each:.2g}' for each in told)} | {sum(ends)} of {len(ends)} |"
            )
        # A ratio that a wider grid would change could turn the slope either way, by the place of its width.
        doubted = ("above", "below") if at_end else ()
        ratios = [[FACTOR ** (best[w][s][1] - best[w][s][0]) for w in options.widths] for s in range(options.seeds)]
        cases.append(study.Case(task, [slope(options.widths, each) for each in ratios], doubted=doubted))
    heat_maps(results, options)
    return [
        *lines,
        "",
        "Means are geometric; rates between the grid's points, a factor of four apart, are a parabola's. A grid grew by "
        f"{grids.MOST} rates at most. Where the loss depends on the product of both rates alone, a valley from one corner to "
        "the other, the best ratio is anywhere along it: see the picture.",
        "",
        *ruling.rule(criteria(options)[0], cases, 2),
        "",
        f"Size: widths {', '.join(map(str, options.widths))}; {options.steps} steps, {options.rows} rows, {options.seeds} "
        "seeds, 64 runs and more for each. A slope that would have been seen stands in the table.",
        "",
        study.cost(results),
        "",
        "![the loss of every pair of rates](results.png)",
    ]


def geometric(values):
    """The mean of positive numbers by their logarithms."""
    return float(np.exp(np.mean(np.log(values))))


def heat_maps(results, options):
    """One picture for each task and width: the mean logarithm of the loss over both rates, and where it is lowest."""
    size = (2.7 * len(options.widths), 2.7 * len(options.tasks))
    figure, axes = plt.subplots(len(options.tasks), len(options.widths), figsize=size, squeeze=False)
    for row, task in zip(axes, options.tasks):
        for axis, width in zip(row, options.widths):
            tables = [losses(results, task, width, seed) for seed in range(options.seeds)]
            of_a, of_b = (sorted({place[side] for place in tables[0]}) for side in (0, 1))
            mean = np.array([[np.mean([np.log10(table[a, b]) for table in tables]) for b in of_b] for a in of_a])
            axis.imshow(np.minimum(mean, 1), origin="lower", cmap="viridis")
            place = np.unravel_index(np.argmin(mean), mean.shape)
            axis.plot(place[1], place[0], "r*", markersize=10)
            for ticks, powers in ((axis.set_xticks, of_b), (axis.set_yticks, of_a)):
                shown = range(0, len(powers), 3)
                ticks(list(shown), [f"$4^{{{powers[n]}}}$" for n in shown])
            axis.set(title=f"{task}, width {width}", xlabel="rate of B", ylabel="rate of A")
    figure.tight_layout()
    figure.savefig(options.out / "results.png", dpi=110)


STUDY = study.Study(
    __doc__,
    HERE,
    sizes={"widths": (64, 256, 1024, 4096), "steps": 100, "rows": 128, "rank": 4, "seeds": 10},
    full={"widths": (64, 128, 256, 512, 1024, 2048, 4096), "steps": 1000, "rows": 1000},
    plan=plan,
    run=run,
    report=report,
    tasks=tuple(ACTIVATIONS),
    small={"widths": (32, 128, 512), "steps": 100, "rows": 64, "seeds": 5},
    criteria=criteria,
    needs_data=False,
)

if __name__ == "__main__":
    study.main(STUDY)
