"""Deep matrix completion: does the compressed product do what the wide one does, only faster, and does it need gamma > 0?

    python experiments/deep_matrix_completion/run.py [--size N] [--steps N] [--seeds N] [--out FOLDER] [--full]

The claim (Yaras et al. 2024, arXiv:2406.04112): where only a part of a low-rank matrix is seen, gradient descent on a
compressed deep product ends at as low an error as on the wide product, or a lower one, in a fraction of the time, if its
outer factors learn too (gamma > 0). With fixed outer factors (gamma = 0) it fails, since one masked gradient does not show
the matrix's space.

A 200 x 200 matrix of rank 3, of which a fifth of the entries is seen; depth 3; plain gradient descent on half the squared
error over what is seen, from factors of size 0.01. `wide` has inner width 200, the compressed forms and `narrow` (the same
small widths, but from random factors) 10. Each form takes the learning rate, and gamma, with which it came to an error of
0.001 soonest on a seed that is not used again. The error is that of the whole matrix, relative to its norm.

A finished run is written to results.jsonl at once, and a script that is started again goes on where it stopped. The default
takes about 2 minutes of one core; --full has a 1000 x 1000 matrix of rank 5 and wants an accelerator.
"""

import argparse
import functools
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import jlora

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from verdicts import interval, visible  # noqa: E402

SIZES = {"size": 200, "rank": 3, "width": 10, "steps": 5000, "seeds": 10}
FULL = {"size": 1000, "rank": 5, "width": 10, "steps": 20000, "seeds": 10}
SEEN, EPS, GOAL, EVERY, TUNING_SEED = 0.2, 0.01, 1e-3, 10, 1000
ALIKE = 2.0  # errors within this factor count as alike, far below the goal as they are

RATES = (0.5, 1.0, 2.0, 4.0)
FORMS = {
    "wide": [{"form": "wide", "rate": rate} for rate in RATES],
    "compressed, gamma > 0": [
        {"form": "compressed", "rate": rate, "gamma": gamma} for rate in RATES for gamma in (0.01, 0.1, 1.0)
    ],
    "compressed, gamma = 0": [{"form": "compressed", "rate": rate, "gamma": 0.0} for rate in RATES],
    "narrow": [{"form": "narrow", "rate": rate} for rate in RATES],
}
WIDE, MOVING, FIXED, NARROW = FORMS


def problem(settings):
    """The matrix, with singular values from 1 to 0.6, and what is seen of it."""
    rng = np.random.default_rng(settings["seed"])
    size, rank = settings["size"], settings["rank"]
    u, v = (np.linalg.qr(rng.standard_normal((size, rank)))[0] for _ in range(2))
    matrix = (u * np.linspace(1, 0.6, rank)) @ v.T
    return jnp.asarray(matrix, jnp.float32), jnp.asarray(rng.random((size, size)) < SEEN, jnp.float32)


def loss_fn(params, batch):
    matrix, seen = batch
    return 0.5 * jnp.sum((seen * (params["w"] - matrix)) ** 2)


def begin(settings, batch):
    """The adapters; what they adapt is zero, so their update is the completed matrix."""
    compressed = settings["form"] == "compressed"
    rank = settings["size"] if settings["form"] == "wide" else settings["width"]
    method = jlora.DeepLoRA(rank, eps=EPS, compressed=compressed, gamma=settings.get("gamma", 0.0))
    params, key = {"w": jnp.zeros_like(batch[0])}, jax.random.key(settings["seed"])
    prepared = jlora.prepare(params, {"w": method}, loss_fn, [batch], key) if compressed else None
    return jlora.adapterize(params, {"w": method}, key, prepared=prepared)


@functools.partial(jax.jit, donate_argnums=1)
def descend(adapted, carry, batch, rate):
    """A few steps, and the error after them."""
    tx = jlora.optimizer(adapted, optax.sgd, rate)

    def weight(p):
        return jlora.merge(adapted.replace(params=p))

    def step(carry, _):
        p, state = carry
        updates, state = tx.update(jax.grad(lambda p: loss_fn(weight(p), batch))(p), state, p)
        return (optax.apply_updates(p, updates), state), None

    carry, _ = jax.lax.scan(step, carry, length=EVERY)
    return carry, jnp.linalg.norm(weight(carry[0])["w"] - batch[0]) / jnp.linalg.norm(batch[0])


def run(settings):
    """One run: the error on its way, when it came to the goal, and how long a step took."""
    batch = problem(settings)
    adapted, rate = begin(settings, batch), jnp.float32(settings["rate"])
    carry = jax.tree.map(jnp.copy, (adapted.params, jlora.optimizer(adapted, optax.sgd, rate).init(adapted.params)))
    errors = []
    for number in range(settings["steps"] // EVERY):
        carry, error = descend(adapted, carry, batch, rate)
        errors.append(error)
        if number == 0:  # compiled by now
            error.block_until_ready()
            start = time.perf_counter()
    curve = [float(error) for error in errors]
    taken = (time.perf_counter() - start) / max(1, EVERY * (len(curve) - 1))
    found = np.flatnonzero(np.array(curve) <= GOAL)
    diverged = not np.isfinite(curve[-1])
    completed = np.asarray(jlora.merge(adapted.replace(params=carry[0]))["w"])
    return {
        "error": None if diverged else curve[-1],
        "steps_to_goal": EVERY * (int(found[0]) + 1) if len(found) else None,
        "seconds_a_step": taken,
        "rank": None if diverged else int(np.sum(np.linalg.svd(completed, compute_uv=False) > 1e-2)),
        "trained": sum(leaf.size for leaf in jax.tree.leaves(adapted.params)),
        "curve": [
            float(f"{error:.3g}") if np.isfinite(error) else None for error in curve[:: max(1, len(curve) // 100)]
        ],
    }


def quality(record):
    """Sooner at the goal is better, then a lower error; what diverged is worst, even if it came by the goal."""
    if record["error"] is None:
        return (np.inf, np.inf)
    return (record["steps_to_goal"] or np.inf, record["error"])


def study(options):
    """All runs by form: those with the chosen rates, over the seeds."""
    path = options.out / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    done = {json.dumps(each["settings"], sort_keys=True): each for each in map(json.loads, lines)}

    def once(settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in done:
            done[key] = json.loads(json.dumps({"settings": settings, **run(settings)}))
            with path.open("a") as file:
                file.write(json.dumps(done[key]) + "\n")
            print(key, done[key]["error"], flush=True)
        return done[key]

    common = {name: getattr(options, name) for name in SIZES if name != "seeds"}
    results = {}
    for form, choices in FORMS.items():
        tuned = [once({**common, **choice, "seed": TUNING_SEED}) for choice in choices]
        chosen = choices[min(range(len(choices)), key=lambda n: quality(tuned[n]))]
        results[form] = [once({**common, **chosen, "seed": seed}) for seed in range(options.seeds)]
    return results


def shown(values, form=".3g"):
    mean, half = interval(values)
    return f"{mean:{form}} ± {half:.2g}"


def seconds_to_goal(records):
    """By seed; None where the goal was not met by all."""
    if any(r["steps_to_goal"] is None for r in records):
        return None
    return np.array([r["steps_to_goal"] * r["seconds_a_step"] for r in records])


def verdict(results):
    """What follows, in sentences; differences are paired by seed."""
    wide, moving, fixed = (results[form] for form in (WIDE, MOVING, FIXED))
    times = seconds_to_goal(wide), seconds_to_goal(moving)
    if times[0] is None or times[1] is None:
        met = [sum(r["steps_to_goal"] is not None for r in records) for records in (wide, moving)]
        return f"Verdict: inconclusive: {met[0]} wide and {met[1]} compressed runs met the goal."
    ratio, half = interval(np.log(times[0] / times[1]))
    faster = f"{np.exp(ratio):.1f} times ({np.exp(ratio - half):.1f} to {np.exp(ratio + half):.1f})"
    error, width = interval([np.log10(m["error"] / w["error"]) for m, w in zip(moving, wide)])
    lower = "lower" if error + width < 0 else "higher" if error - width > 0 else "no different"
    failed = sum(r["steps_to_goal"] is None for r in fixed)
    # The claim has three parts; one that is surely false is enough to contradict it, all must be surely true to reproduce it.
    true = (ratio - half > 0, error + width < np.log10(ALIKE), failed == len(fixed))
    false = (ratio + half < 0, error - width > np.log10(ALIKE), failed == 0)
    word = "reproduced" if all(true) else "contradicted" if any(false) else "inconclusive"
    return (
        f"Verdict: {word}. Compressed with gamma > 0 meets the goal {faster} as fast as the wide product, in seconds; its "
        f"final error is {lower} (factor {10**error:.2g}, {10 ** (error - width):.2g} to {10 ** (error + width):.2g}). "
        f"With gamma = 0, {failed} of {len(fixed)} runs never meet it."
    )


def could_see(results):
    """The smallest ratio of times that 8 of 10 such studies would see, from the spread over seeds."""
    times = seconds_to_goal(results[WIDE]), seconds_to_goal(results[MOVING])
    if times[0] is None or times[1] is None:
        return ""
    return f" A time {np.exp(visible(np.log(times[0] / times[1]))):.2g} times as long or as short would have been seen."


def beside(results):
    """What the claim leaves out: whether the gradient's space is needed, or narrow factors from chance do as well."""
    compressed, narrow = (seconds_to_goal(results[form]) for form in (MOVING, NARROW))
    if compressed is None or narrow is None:
        return "Beside the claim: the compressed and the narrow product did not both meet the goal in all runs."
    ratio, half = interval(np.log(compressed / narrow))
    return (
        "Beside the claim: the narrow product from random factors, which needs no gradient first, meets the goal "
        f"{np.exp(ratio):.2g} times ({np.exp(ratio - half):.2g} to {np.exp(ratio + half):.2g}) as fast as the compressed one."
    )


def report(results, options):
    """results.md."""
    lines = [
        "Claim: on matrix completion, the compressed deep product gets to the error of the wide one or below, faster, and "
        f"needs gamma > 0. {options.size} x {options.size}, rank {options.rank}, {SEEN:.0%} seen, depth 3, width "
        f"{options.width}, start {EPS}, {options.steps} steps of gradient descent, {options.seeds} seeds, one CPU core. Rates "
        "and gamma were chosen on another seed. Means with 95 % intervals.",
        "",
        f"| form | rate | gamma | trained values | final error | runs at {GOAL:g} | steps to {GOAL:g} | ms a step "
        f"| seconds to {GOAL:g} | rank |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for form, records in results.items():
        settings, times = records[0]["settings"], seconds_to_goal(records)
        met = [r["steps_to_goal"] for r in records if r["steps_to_goal"] is not None]
        ranks = sorted({r["rank"] for r in records if r["rank"] is not None})
        lines.append(
            f"| {form} | {settings['rate']:g} | {settings.get('gamma', '–')} | {records[0]['trained']:,} "
            f"| {shown([r['error'] for r in records])} | {len(met)} of {len(records)} "
            f"| {shown(met) if len(met) == len(records) else '–'} "
            f"| {shown([1000 * r['seconds_a_step'] for r in records])} | {'–' if times is None else shown(times)} "
            f"| {', '.join(map(str, ranks))} |"
        )
    notes = "Rank: singular values of the result above 0.01. Errors are of the whole matrix, relative to its norm."
    picture = "![Error over steps, and over seconds](results.png)"
    size = (
        f"Size: matrices of {options.size} x {options.size} and rank {options.rank}, no model; {options.steps} steps, "
        f"{options.seeds} seeds; each rate chosen by one seed.{could_see(results)}"
    )
    lines += ["", notes, "", picture, "", size, "", verdict(results), "", beside(results)]
    (options.out / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def plot(results, options):
    """results.png: the error over steps and over seconds, one line a seed."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for number, (form, records) in enumerate(results.items()):
        for seed, record in enumerate(records):
            every = max(1, options.steps // EVERY // 100) * EVERY
            steps = EVERY + every * np.arange(len(record["curve"]))
            for axis, x in zip(axes, (steps, steps * record["seconds_a_step"])):
                axis.plot(
                    x,
                    np.array(record["curve"], float),
                    f"C{number}",
                    alpha=0.6,
                    lw=0.8,
                    label=form if seed == 0 else None,
                )
    axes[0].set(xlabel="step", ylabel="relative error of the whole matrix", yscale="log")
    axes[1].set(xlabel="seconds, one CPU core", xscale="log")
    axes[0].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(options.out / "results.png", dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results")
    parser.add_argument("--full", action="store_true", help=f"a larger problem: {FULL}")
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, help=f"default {value}")
    options = parser.parse_args(arguments)
    for name, value in (FULL if options.full else SIZES).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.steps < 2 * EVERY or options.seeds < 2:
        parser.error(f"at least {2 * EVERY} steps and 2 seeds are needed")
    options.out.mkdir(parents=True, exist_ok=True)
    results = study(options)
    report(results, options)
    plot(results, options)


if __name__ == "__main__":
    main()
