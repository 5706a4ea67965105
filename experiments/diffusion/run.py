"""Does LCM-LoRA draw in four steps, also with a style it was not trained with, and does ZipLoRA beat the sum of two adapters?

    python experiments/diffusion/run.py [--data FOLDER] [--seeds N] [--small] [--full]

The claims (Luo et al. 2023, arXiv:2311.05556; Shah et al. 2023, arXiv:2311.13600), as they are tried here:

- LCM-LoRA in 4 steps draws nearer to the digits than its base by 4 steps of DDIM
- 0.8 style + 1.0 LCM-LoRA, added without training, draws nearer to the styled digits in 4 steps than the style by 4 steps of
  DDIM; and more of its images have both the right digit and the style
- ZipLoRA, on a subject's label, shows more of the subject and of a style than the sum of both adapters: with the paper's
  penalty, and with that of the public code

"Nearer" is the Fréchet distance of a judge's features to those of test images in that style. The judge is a small network that
tells digit, style and pose. "More" is a share of images by the judge; for ZipLoRA the mean of two shares, "the digit, lying on
its side" and "the style". A claim and its opposite are judged by the same rule (experiments/verdicts.py).

MNIST at 14 x 14 pixels. Two cases, each with a base of its own, trained here: one predicts noise, its style is inverted and
its subject a 7 that lies on its side; the other predicts velocity, with a striped ground and a lying 4. No style adapter sees
the subject's digit. Adapters are on convolutions, dense layers and the time embedding; every seed trains its own LCM-LoRA,
style, subject and gains, on the case's one base. Guidance is 1 for DDIM, and between 0 and 2 for the distillation. A case does
not count where what its claim begins with was not learned: if the base, the style or the subject alone shows it in less than
half of the images.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import denoising  # noqa: E402
import study  # noqa: E402

import jlora  # noqa: E402

CASES = {
    "noise": {"prediction": "epsilon", "style": "inverted", "subject": 7},
    "velocity": {"prediction": "v_prediction", "style": "striped", "subject": 4},
}
SMALL = {"seeds": 2, "width": 16, "blocks": 1, "base": 200, "steps": 60, "zips": 20, "images": 64, "judged": 200}
BATCH, ROWS, GUIDANCE, FEW, MANY, MOST = 64, 64, 1.0, 4, 20, 50
LEARNING_RATES = {"base": 2e-3, "lcm": 1e-3, "look": 2e-3, "gains": 1e-2}
PENALTIES = ("dot", "elementwise")


def plan(results, options):
    sizes = {name: getattr(options, name) for name in SMALL if name != "seeds"}
    return [{"case": case, "seed": seed, **sizes} for seed in range(options.seeds) for case in options.tasks]


@functools.cache
def program(kind, prediction, width, blocks):
    """A compiled step that lowers one kind of loss: of plain params, an `Adapted`, or gains."""
    fn, _, _ = denoising.denoiser(width, blocks)
    schedule = denoising.schedule(prediction)

    def loss_of(whole, batch, key):
        if kind == "denoise":
            return denoising.denoising_loss(fn, whole, *batch, key, prediction)
        if kind == "lcm":
            x0, label = batch
            free = jnp.full_like(label, denoising.NOTHING)
            return jlora.losses.consistency_distillation(
                fn, whole, x0, label, free, key, schedule, guidance=(0.0, 2.0 * GUIDANCE)
            )
        keys = jax.random.split(key)
        # One noise and time for all, as the public code has it.
        t = jax.random.randint(keys[0], batch[0][1].shape, 0, denoising.TIMESTEPS)
        noise = jax.random.normal(keys[1], batch[0][0].shape)
        inputs = [(schedule.add_noise(x0, noise, t), t, label) for x0, label in batch]
        return whole.loss(lambda adapted, x: fn(adapted, *x), inputs, weight=0.01, form=kind)

    @functools.partial(jax.jit, compiler_options=study.COMPILER)
    def step(whole, state, batch, key, rate):
        rebuild, trained = parts(whole)
        loss, gradient = jax.value_and_grad(lambda p: loss_of(rebuild(p), batch, key))(trained)
        updates, state = optax.adam(rate).update(gradient, state)
        return rebuild(optax.apply_updates(trained, updates)), state, loss

    return step


def parts(whole):
    """What puts the trained arrays back, and these."""
    if isinstance(whole, jlora.Adapted):
        return lambda p: whole.replace(params=p), whole.params
    if hasattr(whole, "gains"):
        return lambda p: whole.replace(gains=p), whole.gains
    return lambda p: p, whole


def fit(kind, cell, whole, data, steps, rate, seed):
    """Adam with a rate that rises over 5 % of the steps and falls to zero; `data` are (images, labels), or two such."""
    step = program(kind, CASES[cell["case"]]["prediction"], cell["width"], cell["blocks"])
    rng, state, losses = np.random.default_rng(seed), optax.adam(rate).init(parts(whole)[1]), []
    several = isinstance(data, list)
    rows = {"lcm": BATCH // 2, "denoise": BATCH}.get(kind, BATCH // 4)

    def of(images, labels):
        which = rng.integers(len(labels), size=rows)
        return images[which], labels[which]

    for number in range(steps):
        batch = [of(*each) for each in data] if several else of(*data)
        now = rate * min(1, (number + 1) / max(1, steps // 20)) * (1 - number / steps)
        whole, state, loss = step(
            whole, state, batch, jax.random.fold_in(jax.random.key(seed), number), jnp.float32(now)
        )
        losses.append(loss)
    return whole, [round(float(loss), 5) for loss in losses[:: max(1, steps // 50)]]


@functools.cache
def base_of(case, folder, width, blocks, steps):
    """The params of a case's base."""
    images, labels = denoising.mnist(folder)[0]
    seed = 100 + list(CASES).index(case)
    params = denoising.denoiser(width, blocks)[1](seed)
    cell = {"case": case, "width": width, "blocks": blocks}
    return fit("denoise", cell, params, (denoising.drawn(images), labels), steps, LEARNING_RATES["base"], seed)[0]


@functools.cache
def samplers(prediction, width, blocks):
    fn, schedule = denoising.denoiser(width, blocks)[0], denoising.schedule(prediction)
    ddim = functools.partial(denoising.ddim, fn, guidance=GUIDANCE, plan=schedule)
    few = functools.partial(jlora.losses.lcm_sample, fn, schedule=schedule, steps=FEW)
    return (
        jax.jit(
            lambda params, noise, label, times, count: ddim(params, noise, label, times, count),
            compiler_options=study.COMPILER,
        ),
        jax.jit(lambda params, noise, label, key: few(params, noise, label, key), compiler_options=study.COMPILER),
    )


def draw(cell, params, labels, steps=None):
    """Images of labels: by `steps` of DDIM, or as LCM-LoRA is sampled."""
    ddim, few = samplers(CASES[cell["case"]]["prediction"], cell["width"], cell["blocks"])
    found = []
    for start in range(0, len(labels), ROWS):
        keys = jax.random.split(jax.random.key(1000 * cell["seed"] + start))  # the same noise for all
        noise = jax.random.normal(keys[0], (ROWS, denoising.SIDE, denoising.SIDE, 1))
        chosen = np.resize(labels[start : start + ROWS], ROWS)  # filled up, so that one program serves all
        if steps is None:
            found.append(few(params, noise, chosen, keys[1]))
        else:
            times = np.zeros(MOST + 1, np.int32)
            times[:steps] = np.arange(steps, 0, -1) * denoising.TIMESTEPS // steps - 1
            found.append(ddim(params, noise, chosen, times, steps))
    return np.clip(np.concatenate(found)[: len(labels)], -1, 1)


def run(cell, options):
    adapters, losses = trained(cell, options)
    tried = {**in_few_steps(cell, options, adapters), **with_subject(cell, options, adapters)}
    pictures = {name: pixels(drawn[:10]) for name, (_, drawn) in tried.items()} if cell["seed"] == 0 else {}
    return {
        "judge": denoising.judge(options.data, cell["judged"])[1],
        "found": {name: {k: round(float(v), 4) for k, v in each.items()} for name, (each, _) in tried.items()},
        "losses": losses,
        "pictures": pictures,
    }


def base(cell, options):
    return base_of(cell["case"], options.data, cell["width"], cell["blocks"], cell["base"])


def trained(cell, options):
    """The adapters of a case and a seed: of few steps, style and subject, and what is put together; and losses on the way."""
    case, (images, labels) = CASES[cell["case"]], denoising.mnist(options.data)[0]
    adapt = denoising.denoiser(cell["width"], cell["blocks"])[2]
    others, own = labels != case["subject"], labels == case["subject"]
    data = {
        "lcm": (denoising.drawn(images), labels),
        "style": (denoising.drawn(images[others], case["style"]), labels[others]),
        "subject": (denoising.drawn(images[own], pose="turned"), labels[own]),
    }
    adapters, losses = {}, {}
    for number, (name, rows) in enumerate(data.items()):
        seed = 10 * cell["seed"] + number
        kind, rate = ("lcm", LEARNING_RATES["lcm"]) if name == "lcm" else ("denoise", LEARNING_RATES["look"])
        adapters[name], losses[name] = fit(
            kind, cell, adapt(base(cell, options), seed), rows, cell["steps"], rate, seed
        )
    parents = [adapters["subject"], adapters["style"]]
    adapters["sum"] = jlora.combine(parents, [1.0, 1.0])
    adapters["fast"] = jlora.combine([adapters["style"], adapters["lcm"]], [0.8, 1.0])
    for form in PENALTIES:
        rows, rate = [data["subject"], data["style"]], LEARNING_RATES["gains"]
        pair, seed = jlora.zip_adapters(parents), 10 * cell["seed"] + 5
        pair, losses[form] = fit(form, cell, pair, rows, cell["zips"], rate, seed)
        adapters[form] = pair.adapted()
    return adapters, losses


def in_few_steps(cell, options, adapters):
    """All digits, by the base and with adapters: shares of right ones, and the distance to those of the style."""
    style, labels = CASES[cell["case"]]["style"], np.arange(cell["images"]) % 10
    see, test = denoising.judge(options.data, cell["judged"])[0], denoising.mnist(options.data)[1][0][:2000]

    def judged(adapter, look, steps=None):
        drawn = draw(cell, jlora.merge(adapters[adapter]) if adapter else base(cell, options), labels, steps)
        shown, features = (np.asarray(each) for each in see(drawn))
        digit, right = shown[:, 0] == labels, shown[:, 1] == denoising.STYLES.index(style)
        distance = denoising.frechet(features, np.asarray(see(denoising.drawn(test, look))[1]))
        shares = {"digit": digit.mean(), "style": right.mean(), "both": (digit & right).mean()}
        return {**shares, "distance": distance}, drawn

    return {
        f"base, DDIM {MOST}": judged(None, "plain", MOST),
        f"base, DDIM {FEW}": judged(None, "plain", FEW),
        f"LCM-LoRA, {FEW}": judged("lcm", "plain"),
        f"style, DDIM {MANY}": judged("style", style, MANY),
        f"style, DDIM {FEW}": judged("style", style, FEW),
        f"0.8 style + LCM-LoRA, {FEW}": judged("fast", style),
    }


def with_subject(cell, options, adapters):
    """The subject's digit, by subject and style alone and together: how often either is seen."""
    case, see = CASES[cell["case"]], denoising.judge(options.data, cell["judged"])[0]
    names = {
        "subject alone": "subject",
        "style alone": "style",
        "sum": "sum",
        **{f"ZipLoRA, {f}": f for f in PENALTIES},
    }
    found = {}
    for name, adapter in names.items():
        drawn = draw(cell, jlora.merge(adapters[adapter]), np.full(cell["images"], case["subject"]), MANY)
        digit, style, pose = np.asarray(see(drawn)[0]).T
        turned = (digit == case["subject"]) & (pose == denoising.POSES.index("turned"))
        look = style == denoising.STYLES.index(case["style"])
        found[name] = {"subject": turned.mean(), "style": look.mean(), "both": (turned & look).mean()}, drawn
    return found


def pixels(images):
    """Images in a row as hexadecimal bytes."""
    return np.uint8((np.concatenate(images[..., 0], axis=1) + 1) * 127.5).tobytes().hex()


def mean_of(shares):
    return (shares["subject"] + shares["style"]) / 2


def claims_of(results, options):
    """The differences of every claim in every case, positive on the claimed side."""
    claims = {}
    for case in options.tasks:
        runs = [r["found"] for r in study.select(results, case=case)]
        many, few, lcm = f"base, DDIM {MOST}", f"base, DDIM {FEW}", f"LCM-LoRA, {FEW}"
        alone, styled, fast = f"style, DDIM {MANY}", f"style, DDIM {FEW}", f"0.8 style + LCM-LoRA, {FEW}"
        drawn = "" if np.mean([r[many]["digit"] for r in runs]) > 0.5 else "the base has not learned its digits"
        kept = drawn or ("" if np.mean([r[alone]["both"] for r in runs]) > 0.5 else "the style was not learned")
        ends = [(r["subject alone"]["subject"], r["style alone"]["style"]) for r in runs]
        zips = "" if np.mean(ends, axis=0).min() > 0.5 else "subject or style alone was not learned"
        tried = {
            "LCM-LoRA in 4 steps is nearer than DDIM in 4": (
                [r[few]["distance"] - r[lcm]["distance"] for r in runs],
                drawn,
            ),
            "0.8 style + LCM-LoRA in 4 steps is nearer than the style by DDIM in 4": (
                [r[styled]["distance"] - r[fast]["distance"] for r in runs],
                kept,
            ),
            "more of its images have the digit and the style": (
                [r[fast]["both"] - r[styled]["both"] for r in runs],
                kept,
            ),
        }
        for form in PENALTIES:
            name = {"dot": "ZipLoRA with the paper's penalty", "elementwise": "ZipLoRA with the code's penalty"}[form]
            differences = [mean_of(r[f"ZipLoRA, {form}"]) - mean_of(r["sum"]) for r in runs]
            tried[f"{name} shows more of subject and style than the sum"] = (differences, zips)
        for claim, (differences, mute) in tried.items():
            claims.setdefault(claim, []).append(study.Case(case, differences, mute))
    return claims


def report(results, options):
    lines = [
        f"Claims: LCM-LoRA draws in {FEW} steps, alone and added to a style; ZipLoRA beats the sum of a subject and a style. "
        f"Digits of 14 x 14 pixels, {options.seeds} seeds, {options.images} images each. Shares are by a judge that is right "
        f"on {results[0]['judge'][0]:.1%} of test digits in all looks, {results[0]['judge'][1]:.1%} of styles and "
        f"{results[0]['judge'][2]:.1%} of poses; distances are Fréchet's, of its features to those of test images. Means with "
        "95 % intervals.",
    ]
    heads = {
        "distance": ("digit", "style", "both", "distance"),
        "subject": ("subject", "style", "both"),
    }
    for case in options.tasks:
        runs = [r["found"] for r in study.select(results, case=case)]
        for mark, columns in heads.items():
            where = "all digits" if mark == "distance" else f"the label {CASES[case]['subject']} alone, DDIM {MANY}"
            lines += [
                "",
                f"{case}: {where}",
                "",
                f"| what draws | {' | '.join(columns)} |",
                "|---" * (1 + len(columns)) + "|",
            ]
            for name in runs[0]:
                if mark in runs[0][name]:
                    cells = [study.shown([r[name][column] for r in runs], 2) for column in columns]
                    lines.append(f"| {name} | {' | '.join(cells)} |")
    claims = claims_of(results, options)
    size = (
        f"Size: a denoiser of {options.blocks} blocks of width {options.width} in each of {len(options.tasks)} cases, trained "
        f"for {options.base} steps of {BATCH} digits of 14 x 14 pixels; adapters for {options.steps} steps, gains for "
        f"{options.zips}; {options.seeds} seeds, {options.images} images. {study.could_see(claims)}"
    )
    picture(results, options)
    lines += [
        "",
        *study.table(claims),
        "",
        size,
        "",
        f"Verdict: {study.verdict(claims)}",
        "",
        "![what each draws](results.png)",
    ]
    return lines


def picture(results, options):
    """results.png: ten images of each, of the first seed."""
    first = [study.select(results, case=case, seed=0)[0]["pictures"] for case in options.tasks]
    names = list(first[0])
    figure, axes = plt.subplots(len(names), len(first), figsize=(4.6 * len(first), 0.46 * len(names)), squeeze=False)
    for column, (case, pictures) in enumerate(zip(options.tasks, first)):
        axes[0, column].set_title(case, fontsize=8)
        for row, name in enumerate(names):
            image = np.frombuffer(bytes.fromhex(pictures[name]), np.uint8).reshape(denoising.SIDE, -1)
            axes[row, column].imshow(image, cmap="gray", vmin=0, vmax=255)
            axes[row, column].set(xticks=[], yticks=[])
            if column == 0:
                axes[row, column].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=7)
    figure.tight_layout(pad=0.3)
    figure.savefig(options.out / "results.png", dpi=110)
    plt.close(figure)


STUDY = study.Study(
    __doc__,
    HERE,
    {"seeds": 3, "width": 16, "blocks": 1, "base": 600, "steps": 150, "zips": 60, "images": 100, "judged": 400},
    {"seeds": 5, "width": 64, "blocks": 4, "base": 20000, "steps": 2000, "zips": 100, "images": 1000, "judged": 2000},
    plan,
    run,
    report,
    tuple(CASES),
)


def main(arguments):
    """`--small` stands for the sizes of `SMALL`, a quick look; say --out with it."""
    small = [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]
    study.main(STUDY, [each for given in arguments for each in (small if given == "--small" else [given])])


if __name__ == "__main__":
    main(sys.argv[1:])
