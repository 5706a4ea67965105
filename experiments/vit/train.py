"""Trains a small Vision Transformer on MNIST, and writes it as a folder that jlora.models.load and transformers read.

    python experiments/vit/train.py [--out FOLDER] [--data FOLDER] [--labels digits|turns] [--steps N] [--seed N]

On "digits" it learns the ten digits. On "turns" it reads no label: each image is turned by 0, 90, 180 or 270 degrees, and it
learns by how much (Gidaris et al. 2018, arXiv:1803.07728), which is how experiments/split_mnist makes its backbone.
"""

import argparse
import functools
import json
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import mnist  # noqa: E402
import tasks  # noqa: E402

from jlora import models  # noqa: E402

#: The content of config.json: 17 tokens of width 64 in two layers, 75,000 parameters.
CONFIG = {
    "architectures": ["ViTForImageClassification"],
    "model_type": "vit",
    "image_size": 28,
    "patch_size": 7,
    "num_channels": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "qkv_bias": True,
}
LABELS = {"digits": 10, "turns": 4}
BATCH, RATE, DECAY = 128, 2e-3, 0.05


def config_of(labels: str) -> dict:
    """What transformers reads of the model."""
    names = [str(number if labels == "digits" else 90 * number) for number in range(LABELS[labels])]
    ids = {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}
    return {**CONFIG, **ids, "dtype": "float32"}


def turned(images: jax.Array, quarters: jax.Array) -> jax.Array:
    """Each image turned by its number of quarters, to the left."""
    every = jnp.stack([jnp.rot90(images, quarter, (1, 2)) for quarter in range(4)])
    return every[quarters, jnp.arange(len(images))]


def train(labels: str, images: np.ndarray, digits: np.ndarray, steps: int, seed: int, compiler: dict | None = None):
    """The model and its params after `steps` of AdamW, whose rate rises for a tenth of them and falls along a cosine."""
    model = models.ViT(models.ViTConfig.from_hf(config_of(labels)))
    key = jax.random.key(seed)
    params = jax.jit(model.init)(key, images[:1])["params"]
    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0, RATE, max(1, steps // 10), steps), weight_decay=DECAY)

    # All steps are one program. Images are cut in it, since the batches of a run would not fit where the images do.
    @functools.partial(jax.jit, compiler_options=compiler)
    def run(params, order, key, images, digits):
        def step(carry, chosen):
            (params, state), (rows, key) = carry, chosen
            batch, targets = images[rows], digits[rows]
            if labels == "turns":
                targets = jax.random.randint(key, rows.shape, 0, 4)
                batch = turned(batch, targets)

            def loss(params):
                outputs = model.apply({"params": params}, batch)
                return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()

            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), (order, jax.random.split(key, steps)))
        return params, losses

    rng, batch = np.random.default_rng(seed), min(BATCH, len(images))
    epochs = -(-steps * batch // len(images))
    order = np.concatenate([rng.permutation(len(images)) for _ in range(epochs)])[: steps * batch].reshape(steps, batch)
    params, losses = run(params, order, key, images, digits)
    return model, params, np.asarray(losses)


def accuracy(labels: str, model, params, images: np.ndarray, digits: np.ndarray) -> float:
    """The share of right answers; of turns, over all four of every image."""
    apply, right = jax.jit(model.apply), []
    for quarter in range(4 if labels == "turns" else 1):
        for start in range(0, len(images), 500):
            batch = jnp.asarray(images[start : start + 500])
            wanted = np.full(len(batch), quarter) if labels == "turns" else digits[start : start + 500]
            outputs = apply({"params": params}, turned(batch, jnp.full(len(batch), quarter)))
            right.append(np.argmax(outputs, -1) == wanted)
    return float(np.mean(np.concatenate(right)))


def write(folder: Path, labels: str, model, params) -> None:
    """The folder of the model."""
    with tempfile.TemporaryDirectory() as source:
        Path(source, "config.json").write_text(json.dumps(config_of(labels)))
        models.save(folder, model, params, source)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=tasks.DATA, help="folder that holds mnist")
    parser.add_argument("--out", type=Path, default=Path("vit_mnist"), help="folder of the model; must not exist")
    parser.add_argument("--labels", choices=LABELS, default="digits")
    parser.add_argument("--steps", type=int, default=3000, help="of 128 images")
    parser.add_argument("--most", type=int, help="use the first images only")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.out.exists():
        parser.error(f"{options.out} is there already; give another folder")
    trained, judged = mnist.load(options.data, options.most)
    start = time.process_time()
    model, params, losses = train(options.labels, *trained, options.steps, options.seed)
    spent = time.process_time() - start
    write(options.out, options.labels, model, params)
    score = accuracy(options.labels, *models.load(options.out), *judged)
    print(
        f"{options.labels}: {options.steps} steps of {BATCH} images, seed {options.seed}; loss of the last tenth "
        f"{losses[-max(1, len(losses) // 10) :].mean():.4f}; {100 * score:.2f} % of {len(judged[1]):,} test images right, as "
        f"read again from {options.out}; {spent:.0f} s of processor time"
    )


if __name__ == "__main__":
    main()
