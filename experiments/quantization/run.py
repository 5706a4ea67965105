"""What a base loses by each code, on two real models that nothing was trained for here.

    python experiments/quantization/run.py [--data FOLDER] [--stories N]

stories260k    The 260K-parameter Llama that comes with jlora: loss in nats a token on stories (`tinystories_1000`), which it
               was not trained on in this order; width 64, so that a block of 64 is a whole side. Its down projections have
               172 rows, which no block divides, and stay as they are.
minilm         A sentence encoder of 22.7 million parameters: Spearman's correlation of its cosines with people's on the
               test set of `stsb_cc`.

All other linear weights but heads and embeddings are quantized, nothing is trained. Writes results.md and results.png. The data
are those that PROVENANCE.md describes beside them; for another place say --data or set JLORA_DATA.
"""

import argparse
import csv
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import jlora
from jlora import models, paths

HERE = Path(__file__).parent
DATA = Path(os.environ.get("JLORA_DATA", HERE.parents[2] / "shared" / "data"))
CODES = (
    jlora.Int8(),
    jlora.Float8(),
    jlora.NF4(),
    jlora.NF4(double=True),
    jlora.FP4(),
    jlora.Int4(),
    jlora.NF3(),
    jlora.Uniform(4),
    jlora.NF2(),
)
LENGTH = 256


def stories(data: Path, count: int, directory: Path = models.STORIES260K, together: int = 50):
    """The params of a language model, its sites, and a function from quantized params to the loss on the first stories."""
    model, params = models.load(directory, param_dtype=jnp.float32)
    tokenizer = models.load_tokenizer(directory)
    texts = json.loads((data / "tinystories_1000" / "tinystories_1000.json").read_text(encoding="utf-8"))[:count]
    rows = [tokenizer.encode(text).ids[:LENGTH] for text in texts]
    tokens = np.zeros((len(rows), LENGTH), np.int32)
    counted = np.zeros((len(rows), LENGTH), np.float32)
    for n, row in enumerate(rows):
        tokens[n, : len(row)], counted[n, 1 : len(row)] = row, 1

    @jax.jit
    def loss(params, tokens, counted):
        logits = jlora.lift(model.apply)({"params": params}, tokens)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)[..., 0]
        return -jnp.sum(chosen * counted[:, 1:])

    def score(params):
        parts = [slice(n, n + together) for n in range(0, len(tokens), together)]
        return float(sum(loss(params, tokens[part], counted[part]) for part in parts) / counted.sum())

    sites = jlora.sites(model.apply, {"params": params}, tokens[:1])
    return params, sites, score


def minilm(data: Path, pairs: int | None = None):
    """The same of the sentence encoder, with the correlation; on the first pairs of sentences alone, if so many are given."""
    directory = data / "minilm_l6_v2"
    model, params = models.load(directory, param_dtype=jnp.float32)
    tokenizer = models.load_tokenizer(directory)
    with (data / "stsb_cc" / "test.tsv").open(encoding="utf-8") as file:
        lines = [line for line in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if len(line) >= 7][:pairs]
    people = np.array([float(line[4]) for line in lines])
    texts = [line[n] for n in (5, 6) for line in lines]
    rows = [tokenizer.encode(text).ids[:64] for text in texts]
    tokens, mask = np.zeros((len(rows), 64), np.int32), np.zeros((len(rows), 64), np.int32)
    for n, row in enumerate(rows):
        tokens[n, : len(row)], mask[n, : len(row)] = row, 1

    @jax.jit
    def embed(params, tokens, mask):
        hidden = jlora.lift(lambda params: model.apply({"params": params}, tokens, attention_mask=mask))(params)
        mean = jnp.sum(hidden * mask[..., None], 1) / jnp.sum(mask, 1, keepdims=True)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)

    def score(params):
        found = [embed(params, tokens[n : n + 197], mask[n : n + 197]) for n in range(0, len(tokens), 197)]
        first, second = np.split(np.concatenate(found), 2)
        return float(np.corrcoef(ranked(np.sum(first * second, -1)), ranked(people))[0, 1])

    sites = jlora.sites(lambda params, x: model.apply({"params": params}, x), params, tokens[:1])
    return params, sites, score


def ranked(values: np.ndarray) -> np.ndarray:
    """Ranks, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def measure(params, sites, score, left_out=()):
    """A row for the plain model and for each code: name, bits, relative error of the weights, score."""
    rows = [("float32", 32.0, 0.0, score(params))]
    before = dict(paths.flatten_with_keys(params)[0])
    for code in CODES:
        base = jlora.quantize(params, {**dict.fromkeys(left_out), jlora.ALL_LINEAR: code}, sites)
        kept = [(keys, leaf) for keys, leaf in paths.flatten_with_keys(base)[0] if isinstance(leaf, jlora.Stored)]
        bits = 8 * sum(leaf.nbytes for _, leaf in kept) / sum(leaf.size for _, leaf in kept)
        lost = sum(float(jnp.sum((leaf.decoded() - before[keys]) ** 2)) for keys, leaf in kept)
        whole = sum(float(jnp.sum(before[keys] ** 2)) for keys, _ in kept)
        rows.append((str(code), bits, (lost / whole) ** 0.5, score(base)))
        print(*rows[-1], flush=True)
    return rows


def main():
    """Measures, and writes table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--stories", type=int, default=200)
    asked = parser.parse_args()
    if not asked.data.is_dir():
        parser.error(f"there is no folder {asked.data}; say --data or set JLORA_DATA")
    found = {
        "stories260k, nats a token": measure(*stories(asked.data, asked.stories), [r".*/down_proj/kernel"]),
        "MiniLM, Spearman on STS-B": measure(*minilm(asked.data)),
    }
    lines = [f"Made by `run.py`, {asked.stories} stories, JAX {jax.__version__}. Nothing is trained.", ""]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for ax, (title, rows) in zip(axes, found.items(), strict=True):
        lines += [
            f"## {title}",
            "",
            "| code | bits a weight | relative error of weights | score |",
            "|---|---|---|---|",
        ]
        lines += [f"| {name} | {bits:.2f} | {error:.3f} | {value:.4f} |" for name, bits, error, value in rows]
        lines.append("")
        ax.axhline(rows[0][3], color="0.6", linewidth=1, label="float32")
        ax.plot([row[1] for row in rows[1:]], [row[3] for row in rows[1:]], "o")
        for name, bits, _, value in rows[1:]:
            ax.annotate(name, (bits, value), textcoords="offset points", xytext=(4, 4), fontsize=7)
        ax.set(title=title, xlabel="bits a weight")
        ax.legend()
    (HERE / "results.md").write_text("\n".join(lines), encoding="utf-8")
    figure.savefig(HERE / "results.png", dpi=120)


if __name__ == "__main__":
    main()
