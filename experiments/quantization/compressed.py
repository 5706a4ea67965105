"""What a base loses by codes of smaller arrays, and what training in that form gives back.

    python experiments/quantization/compressed.py [--data FOLDER] [--bits N ..] [--stories N] [--pairs N] [--steps N]
    python experiments/quantization/compressed.py --model DIR

The models and scores are those of `run.py`: the loss of stories260k in nats a token, and MiniLM's correlation with people's
judgements, on its first pairs of sentences alone. All linear weights but heads and embeddings are kept as

low rank         `LowRank` in bfloat16, each leaf at the rank that fills the bits;
joint            the same, but queries with keys, and gates with the matrices beside them, as `JointLowRank`;
tensor train     `TensorTrain` of three cores in bfloat16, at the largest bond that fits;
spectral train   `SpectralTrain` in float32, at the largest rank that fits;
one central core `TensorTrain(share=True)` of full bonds in bfloat16: one size;
transposed pair  `TransposedPair` of the feed-forward matrices in bfloat16 (without the gate): one size, the rest as it is.

For comparison `Int8`, `NF4` and `NF3` on the same leaves, where blocks divide them; others stay as they are, and count. Of
stories260k each form is also trained for some steps by `jlora.Fields`, Adam at 1e-3, on stories that it is not scored on.
With `--model DIR`, a Hugging Face directory of a Llama, that model alone is measured on the same stories, untrained, and
what is written is called after the directory. Writes compressed.md and compressed.png, or compressed_NAME.md and
compressed_NAME.png.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parent))
import run

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import jlora
from jlora import models, paths

HERE = Path(__file__).parent
JOINT = r".*/(query|key)/kernel", r".*/(q|k)_proj/kernel", r".*/(gate|up)_proj/kernel"
PAIR = r".*(?<!attention)/(intermediate|output)/dense/kernel", r".*/(up|down)_proj/kernel"


def linear(params, sites):
    """The sizes of the matrices of all linear weights, by path."""
    kept = jlora.adapterize(params, {jlora.ALL_LINEAR: jlora.LoRA(1)}, sites=sites)
    return {site.path: (site.in_size, site.out_size) for site in kept.plan.sites}


def bits_of(code, rows, columns):
    """Bits a weight of a matrix by a code."""
    fields = jax.eval_shape(code.encode, jax.ShapeDtypeStruct((rows, columns), jnp.float32))
    return 8 * sum(field.size * field.dtype.itemsize for field in fields.values()) / (rows * columns)


def largest(make, bits, rows, columns, most):
    """The code of the largest number that takes no more bits, or None."""
    fitting = [number for number in range(1, most + 1) if bits_of(make(number), rows, columns) <= bits]
    return make(fitting[-1]) if fitting else None


def specs(sizes, bits):
    """The forms, each a spec at about so many bits."""
    low = {path: _low(bits, rows, columns) for path, (rows, columns) in sizes.items()}
    joint = {}
    for pattern in JOINT:
        group = {path: size for path, size in sizes.items() if fits(pattern, path)}
        if group:
            rows, columns = next(iter(group.values()))[0], sum(columns for _, columns in group.values())
            rank = int(bits / 16 * rows * columns / (rows + columns))
            joint[pattern] = jlora.JointLowRank(min(rank, rows), dtype="bfloat16")

    def train(bond):
        return jlora.TensorTrain(bond, 4, 1, dtype="bfloat16")

    return {
        "low rank": low,
        "joint": joint | {path: code for path, code in low.items() if not any(fits(each, path) for each in joint)},
        "tensor train": {path: largest(train, bits, *size, 16) for path, size in sizes.items()},
        "spectral train": {path: largest(jlora.SpectralTrain, bits, *size, min(size)) for path, size in sizes.items()},
    }


def fits(pattern, path):
    """Whether a pattern of a spec is that of a path."""
    return re.fullmatch(pattern, path) is not None


def _low(bits, rows, columns):
    rank = max(int(bits / 16 * rows * columns / (rows + columns)), 1)
    return jlora.LowRank(min(rank, rows, columns), dtype="bfloat16")


def measured(params, sites, score, name, spec, train=None):
    """A row: form, bits a weight of all linear weights, relative error, score, and that after training."""
    sizes = linear(params, sites)
    base = jlora.quantize(params, spec, sites)
    leaves = {"/".join(keys): leaf for keys, leaf in paths.flatten_with_keys(base)[0]}
    whole = {"/".join(keys): leaf for keys, leaf in paths.flatten_with_keys(params)[0]}
    errors = jlora.coding_errors(params, base)
    size = sum(whole[path].size for path in sizes)
    plain = sum(leaf.size for path, leaf in leaves.items() if path in sizes and not isinstance(leaf, jlora.Stored))
    bits = (errors.total.bits * errors.total.size + 32 * plain) / size
    squares = sum(float(jnp.sum(whole[path] ** 2)) for path in sizes)
    lost = sum((each.relative * float(jnp.linalg.norm(whole[each.path]))) ** 2 for each in errors.leaves)
    after = None if train is None else train(base, score)
    row = name, bits, (lost / squares) ** 0.5, score(base), after
    print(*row, flush=True)
    return row


def trainer(data: Path, sites, steps):
    """A function that trains a base in its form on the last stories and gives the score after."""
    model, _ = models.load(models.STORIES260K)
    tokenizer = models.load_tokenizer(models.STORIES260K)
    texts = json.loads((data / "tinystories_1000" / "tinystories_1000.json").read_text(encoding="utf-8"))[-400:]
    rows = [ids for ids in (tokenizer.encode(text).ids[:128] for text in texts) if len(ids) == 128]
    rows = np.array(rows, np.int32)
    apply = jlora.lift(model.apply)

    def trained(base, score):
        stored = {"/".join(keys) for keys, leaf in paths.flatten_with_keys(base)[0] if isinstance(leaf, jlora.Stored)}
        adapted = jlora.adapterize(base, dict.fromkeys(sorted(stored), jlora.Fields()), sites=sites)
        tx = jlora.optimizer(adapted, optax.adam, learning_rate=1e-3)

        def loss(params, tokens):
            logits = apply({"params": adapted.replace(params=params)}, tokens)[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        @jax.jit
        def step(params, state, tokens):
            updates, state = tx.update(jax.grad(loss)(params, tokens), state, params)
            return optax.apply_updates(params, updates), state

        params, state = adapted.params, tx.init(adapted.params)
        for number in range(steps):
            params, state = step(params, state, rows[np.arange(number * 8, number * 8 + 8) % len(rows)])
        return score(jlora.requantize(adapted.replace(params=params)))

    return trained


def study(params, sites, score, bits, train=None):
    """The rows of a model."""
    sizes = linear(params, sites)
    rows = [("float32", 32.0, 0.0, score(params), None)]
    for code in (jlora.Int8(), jlora.NF4(), jlora.NF3()):
        spec = {path: code for path, (inputs, _) in sizes.items() if isinstance(code, jlora.Int8) or inputs % 64 == 0}
        rows.append(measured(params, sites, score, str(code), spec))
    pairs = [pattern for pattern in PAIR if any(fits(pattern, path) for path in sizes)]
    shared = jlora.TensorTrain(16, 4, 1, share=True, dtype="bfloat16")
    single = {
        "one central core": dict.fromkeys(sizes, shared),
        "transposed pair": dict.fromkeys(pairs, jlora.TransposedPair(dtype="bfloat16")),
    }
    for name, spec in single.items():
        rows.append(measured(params, sites, score, name, spec, train))
    for size in bits:
        for name, spec in specs(sizes, size).items():
            rows.append(measured(params, sites, score, name, spec, train))
    return rows


def main():
    """Measures, and writes table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=run.DATA)
    parser.add_argument("--bits", type=float, nargs="+", default=[12.0])
    parser.add_argument("--stories", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--model", type=Path)
    asked = parser.parse_args()
    if not asked.data.is_dir():
        parser.error(f"there is no folder {asked.data}; say --data or set JLORA_DATA")
    made = f"Made by `compressed.py`, {asked.stories} stories, {asked.pairs} pairs, {asked.steps} steps of training"
    found = {}
    if asked.model is not None:
        name = asked.model.resolve().name
        rows = study(*run.stories(asked.data, asked.stories, asked.model, together=4), asked.bits)
        return report(
            {f"{name}, nats a token": rows}, f"Made by `compressed.py --model`, {asked.stories} stories", name
        )
    params, sites, score = run.stories(asked.data, asked.stories)
    found["stories260k, nats a token"] = study(
        params, sites, score, asked.bits, trainer(asked.data, sites, asked.steps)
    )
    report(found, made)
    found["MiniLM, Spearman on STS-B"] = study(*run.minilm(asked.data, asked.pairs), asked.bits)
    report(found, made)


def report(found, made, name=None):
    """Writes table and picture of what was measured, under the name of a model of the user's."""
    file = "compressed" if name is None else f"compressed_{name}"
    lines = [f"{made}, JAX {jax.__version__}.", ""]
    figure, axes = plt.subplots(1, len(found), figsize=(5.5 * len(found), 4.5), layout="constrained", squeeze=False)
    for ax, (title, rows) in zip(axes[0], found.items(), strict=True):
        lines += [
            f"## {title}",
            "",
            "| form | bits a weight | relative error of weights | score | trained |",
            "|---|---|---|---|---|",
        ]
        for name, bits, error, value, after in rows:
            told = "" if after is None else f"{after:.4f}"
            lines.append(f"| {name} | {bits:.2f} | {error:.3f} | {value:.4f} | {told} |")
        lines.append("")
        draw(ax, title, rows)
    (HERE / f"{file}.md").write_text("\n".join(lines), encoding="utf-8")
    figure.savefig(HERE / f"{file}.png", dpi=120)
    plt.close(figure)


def draw(ax, title, rows):
    """The score of each form by its bits."""
    ax.axhline(rows[0][3], color="0.6", linewidth=1, label="float32")
    for form in dict.fromkeys(row[0] for row in rows[1:]):
        mine = sorted((row for row in rows[1:] if row[0] == form), key=lambda row: row[1])
        (line,) = ax.plot([row[1] for row in mine], [row[3] for row in mine], "o-", label=form, markersize=4)
        if mine[0][4] is not None:
            ax.plot([row[1] for row in mine], [row[4] for row in mine], "x:", color=line.get_color(), markersize=5)
    ax.set(title=title + (" (dotted: trained)" if rows[-1][4] is not None else ""), xlabel="bits a weight")
    ax.legend(fontsize=7)


if __name__ == "__main__":
    main()
