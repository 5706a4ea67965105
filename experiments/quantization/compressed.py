"""What a base loses by codes of smaller arrays, by the bits that they keep, and what training in that form gives back.

    python experiments/quantization/compressed.py [--models stories260k minilm smollm2 | DIR ..] [--bits N ..] [--forms F ..]
    python experiments/quantization/compressed.py --small --out FOLDER            a try, in minutes
    python experiments/quantization/compressed.py --table                         what is measured already, and no more

The models and scores are those of `run.py`: a language model's loss in nats a token on the first stories, and MiniLM's
correlation with people's judgements on its first pairs of sentences. `smollm2` is SmolLM2-135M-Instruct as
`jlora.models.load` knows it, whose file holds most weights in 4 to 6 bits; a Hugging Face directory of a Llama stands for
itself. All linear weights but heads and embeddings are kept as

low rank         `LowRank` in bfloat16, each leaf at the rank that fills the bits;
joint            the same, but queries with keys, and gates with the matrices beside them, as `JointLowRank`;
tensor train     `TensorTrain` of three cores in bfloat16, at the largest bond that fits;
spectral train   `SpectralTrain` in float32, at the largest rank that fits;
one central core `TensorTrain(share=True)` of full bonds in bfloat16: one size;
transposed pair  `TransposedPair` of the feed-forward matrices in bfloat16 (without the gate): one size, the rest as it is.

For comparison `Int8`, `NF4`, `NF3` and `NF2` on the same leaves, where blocks divide them; others stay as they are, and count
as 32 bits a weight; so does what a form leaves as it is. Weights in bfloat16 have 16 bits: a product above that is larger than
they are. Language models are also trained in each form of products for `--steps` steps by `jlora.Fields`, Adam at 1e-3, eight
rows of 128 tokens, on stories that they are not scored on.

A measured row is a line of compressed.jsonl, and is not measured again; compressed.md and compressed.png tell the rows that
were asked for.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
FEW_BITS = (jlora.Int8(), jlora.NF4(), jlora.NF3(), jlora.NF2())
PRODUCTS = ("low rank", "joint", "tensor train", "spectral train")
SINGLE = ("one central core", "transposed pair")
# Stories or pairs that a model is scored on, and steps of training.
SIZES = {"stories260k": (30, 40), "minilm": (40, 0), "smollm2": (8, 0)}


@dataclass(frozen=True)
class Subject:
    """A model: its params and sites, `score(params)`, and for language models `trainer(base)`."""

    params: Any
    sites: Any
    score: Any
    trainer: Any = None


def subject(name, data, count, steps):
    """A model by its name or directory."""
    if name == "minilm":
        return Subject(*run.minilm(data, count))
    directory = models.STORIES260K if name == "stories260k" else name
    found = run.stories(data, count, directory, together=4)
    return Subject(*found, trainer(data, directory, found[1], steps) if steps else None)


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
    few, many = 0, most
    while few < many:  # bits rise with the number
        middle = (few + many + 1) // 2
        few, many = (middle, many) if bits_of(make(middle), rows, columns) <= bits else (few, middle - 1)
    return make(few) if few else None


def spec_of(form, sizes, bits):
    """A form as a spec at about so many bits; None where no leaf can be kept so."""
    if form == "low rank":
        return {path: _low(bits, rows, columns) for path, (rows, columns) in sizes.items()}
    if form == "joint":
        return _joint(sizes, bits)
    if form == "tensor train":
        make = lambda bond: jlora.TensorTrain(bond, 4, 1, dtype="bfloat16")  # noqa: E731
        return {path: largest(make, bits, *size, 16) for path, size in sizes.items()}
    if form == "spectral train":
        return {path: largest(jlora.SpectralTrain, bits, *size, min(size)) for path, size in sizes.items()}
    if form == "one central core":
        return dict.fromkeys(sizes, jlora.TensorTrain(16, 4, 1, share=True, dtype="bfloat16"))
    if form == "transposed pair":
        pairs = [pattern for pattern in PAIR if any(fits(pattern, path) for path in sizes)]
        return dict.fromkeys(pairs, jlora.TransposedPair(dtype="bfloat16"))
    code = next(each for each in FEW_BITS if str(each) == form)
    return {path: code for path, (rows, _) in sizes.items() if isinstance(code, jlora.Int8) or rows % 64 == 0}


def fits(pattern, path):
    """Whether a pattern of a spec is that of a path."""
    return re.fullmatch(pattern, path) is not None


def _low(bits, rows, columns):
    rank = max(int(bits / 16 * rows * columns / (rows + columns)), 1)
    return jlora.LowRank(min(rank, rows, columns), dtype="bfloat16")


def _joint(sizes, bits):
    joint = {}
    for pattern in JOINT:
        group = {path: size for path, size in sizes.items() if fits(pattern, path)}
        if group:
            # Of one layer: in stacks the paths are those of one layer, else of all.
            layers = len(group) // 2
            rows, columns = next(iter(group.values()))[0], sum(columns for _, columns in group.values()) // layers
            rank = int(bits / 16 * rows * columns / (rows + columns))
            joint[pattern] = jlora.JointLowRank(min(rank, rows), dtype="bfloat16")
    rest = {path: size for path, size in sizes.items() if not any(fits(pattern, path) for pattern in joint)}
    return joint | spec_of("low rank", rest, bits)


def measured(of, form, bits):
    """What a form keeps and loses: bits a weight of all linear weights, relative error, score, and that after training."""
    if form == "float32":
        return {"kept": 32.0, "error": 0.0, "score": of.score(of.params), "trained": None}
    sizes = linear(of.params, of.sites)
    base = jlora.quantize(of.params, spec_of(form, sizes, bits), of.sites)
    leaves = {"/".join(keys): leaf for keys, leaf in paths.flatten_with_keys(base)[0]}
    whole = {"/".join(keys): leaf for keys, leaf in paths.flatten_with_keys(of.params)[0]}
    errors = jlora.coding_errors(of.params, base)
    size = sum(whole[path].size for path in sizes)
    plain = sum(leaf.size for path, leaf in leaves.items() if path in sizes and not isinstance(leaf, jlora.Stored))
    squares = sum(float(jnp.sum(whole[path] ** 2)) for path in sizes)
    lost = sum((each.relative * float(jnp.linalg.norm(whole[each.path]))) ** 2 for each in errors.leaves)
    trains = of.trainer is not None and form in PRODUCTS + SINGLE
    return {
        "kept": (errors.total.bits * errors.total.size + 32 * plain) / size,
        "error": (lost / squares) ** 0.5,
        "score": of.score(base),
        "trained": of.score(of.trainer(base)) if trains else None,
    }


def trainer(data, directory, sites, steps):
    """A function that trains a base in its form on the last stories."""
    model, _ = models.load(directory, param_dtype=jnp.float32)
    tokenizer = models.load_tokenizer(directory)
    texts = json.loads((data / "tinystories_1000" / "tinystories_1000.json").read_text(encoding="utf-8"))[-400:]
    rows = [ids for ids in (tokenizer.encode(text).ids[:128] for text in texts) if len(ids) == 128]
    rows = np.array(rows, np.int32)
    apply = jlora.lift(model.apply)

    def trained(base):
        stored = {"/".join(keys) for keys, leaf in paths.flatten_with_keys(base)[0] if isinstance(leaf, jlora.Stored)}
        adapted = jlora.adapterize(base, dict.fromkeys(sorted(stored), jlora.Fields()), sites=sites)
        tx = jlora.optimizer(adapted, optax.adam, learning_rate=1e-3)

        def loss(params, rest, tokens):
            logits = apply({"params": rest.replace(params=params)}, tokens)[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        @jax.jit
        def step(params, state, rest, tokens):
            updates, state = tx.update(jax.grad(loss)(params, rest, tokens), state, params)
            return optax.apply_updates(params, updates), state

        params, state, rest = adapted.params, tx.init(adapted.params), adapted.replace(params={})
        for number in range(steps):
            params, state = step(params, state, rest, rows[np.arange(number * 8, number * 8 + 8) % len(rows)])
        return jlora.requantize(adapted.replace(params=params))

    return trained


def wanted(forms, bits):
    """The rows of a model: forms, and for products the bits."""
    single = [(form, None) for form in ("float32", *map(str, FEW_BITS), *SINGLE)]
    rows = single + [(form, size) for size in bits for form in PRODUCTS]
    return [row for row in rows if forms is None or row[0] in {"float32", *forms}]


def study(asked):
    """The rows of all models, measured or read, by title."""
    file = asked.out / "compressed.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {_key(line["settings"]): line for line in lines}
    found = {}
    for name in asked.models:
        count, steps = SIZES.get(name, SIZES["smollm2"])
        count, steps = asked.count or count, steps if asked.steps is None else asked.steps
        of, rows = None, []
        for form, bits in wanted(asked.forms, asked.bits):
            here = {"model": Path(name).name, "count": count, "form": form, "bits": bits}
            here |= {"steps": steps} if form in PRODUCTS + SINGLE else {}
            if _key(here) not in done and asked.table:
                continue
            if _key(here) not in done:
                of = of or subject(name, asked.data, count, steps)
                done[_key(here)] = {"settings": here, **measured(of, form, bits), "jax": jax.__version__}
                with file.open("a") as out:
                    out.write(json.dumps(done[_key(here)]) + "\n")
                print(json.dumps(done[_key(here)]), flush=True)
            rows.append(done[_key(here)])
        unit = "Spearman on STS-B" if name == "minilm" else "nats a token"
        if rows:
            found[f"{Path(name).name}, {unit}"] = rows
            report(found, asked.out)


def _key(settings):
    return json.dumps(settings, sort_keys=True)


def report(found, out):
    """Writes table and picture of what was measured."""
    lines = [
        f"Made by `compressed.py`, JAX {', '.join(sorted({row['jax'] for rows in found.values() for row in rows}))}."
    ]
    figure, axes = plt.subplots(1, len(found), figsize=(5.5 * len(found), 4.5), layout="constrained", squeeze=False)
    for ax, (title, rows) in zip(axes[0], found.items(), strict=True):
        steps = sorted({row["settings"]["steps"] for row in rows if row["trained"] is not None})
        told = f"{rows[0]['settings']['count']} {'pairs' if 'Spearman' in title else 'stories'}"
        lines += [
            "",
            f"## {title}",
            "",
            f"{told}, {steps[0]} steps of training." if steps else f"{told}, not trained.",
            "",
        ]
        lines += ["| form | bits a weight | relative error of weights | score | trained |", "|---|---|---|---|---|"]
        for row in rows:
            after = "" if row["trained"] is None else f"{row['trained']:.4f}"
            cells = f"{row['kept']:.2f} | {row['error']:.3f} | {row['score']:.4f} | {after}"
            lines.append(f"| {row['settings']['form']} | {cells} |")
        draw(ax, title, rows)
    (out / "compressed.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    figure.savefig(out / "compressed.png", dpi=120)
    plt.close(figure)


def draw(ax, title, rows):
    """The score of each form by its bits; those of few bits are one line."""
    ax.axhline(rows[0]["score"], color="0.6", linewidth=1, label="float32")
    ax.axvline(16, color="0.9", linewidth=1)
    few = [str(code) for code in FEW_BITS]
    trained = False
    for form in dict.fromkeys(
        "few bits" if row["settings"]["form"] in few else row["settings"]["form"] for row in rows[1:]
    ):
        mine = [row for row in rows[1:] if row["settings"]["form"] in (few if form == "few bits" else (form,))]
        mine = sorted(mine, key=lambda row: row["kept"])
        bits = [row["kept"] for row in mine]
        (line,) = ax.plot(bits, [row["score"] for row in mine], "o-", label=form, markersize=4)
        if mine[0]["trained"] is not None:
            trained = True
            ax.plot(bits, [row["trained"] for row in mine], "x:", color=line.get_color(), markersize=5)
    ax.set(title=title + (" (dotted: trained)" if trained else ""), xlabel="bits a weight")
    ax.legend(fontsize=7)


def main():
    """Measures what is missing, and writes table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=run.DATA)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--models", nargs="+", default=list(SIZES))
    parser.add_argument("--forms", nargs="+")
    parser.add_argument("--bits", type=float, nargs="+", default=[4.0, 8.0, 12.0, 16.0, 24.0])
    parser.add_argument(
        "--count", type=int, help=f"stories or pairs; default { ({name: n for name, (n, _) in SIZES.items()}) }"
    )
    parser.add_argument(
        "--steps", type=int, help=f"of training; default { ({name: n for name, (_, n) in SIZES.items()}) }"
    )
    parser.add_argument("--small", action="store_true", help="stories260k on 3 stories, with 2 steps, at one size")
    parser.add_argument("--table", action="store_true", help="write the table of what is measured already")
    asked = parser.parse_args()
    if not asked.data.is_dir():
        parser.error(f"there is no folder {asked.data}; say --data or set JLORA_DATA")
    if asked.small:
        asked.models, asked.bits, asked.count, asked.steps = ["stories260k"], [12.0], 3, 2
    asked.out.mkdir(parents=True, exist_ok=True)
    study(asked)


if __name__ == "__main__":
    main()
