"""Writes `deeplora.npz`: what the authors' code does on a tiny model, for `tests/test_deeplora.py`.

    python tests/golden/make_deeplora.py FOLDER

FOLDER is a checkout of github.com/cjyaras/deep-lora-transformers at commit 2bf128f (2024). Run with a Python that has jax,
flax, optax, chex and tqdm. What that code imports beside these is not needed here, and a blank module stands in for it.
"""

import argparse
import sys
from pathlib import Path
from unittest import mock

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

KERNELS = {"square": (12, 12), "wide": (12, 16), "tall": (16, 10)}
RANK, DEPTH, EPS, GAMMA, RATE, DECAY, STEPS = 4, 3, 0.1, 0.5, 1e-2, 0.1, 5


class Output:
    """The tiny model, called as the authors call a transformer."""

    def __call__(self, x, params, dropout_rng=None, train=False):
        for name in KERNELS:
            x = jnp.sin(x @ params[name]["kernel"])
        return (jnp.sum(x, axis=-1, keepdims=True),)


def flat(tree):
    return {name: np.array(leaf) for name, leaf in flax.traverse_util.flatten_dict(tree, sep="/").items()}


def run(out, configs, train, base, batch, compress):
    """The start and the params after some steps, of the wide form that is compressed or of the narrow one."""
    config = configs.TaskConfig(
        lora_adapt_type="all-dense", lora_rank=RANK, lora_depth=DEPTH, lora_init_scale=EPS, lora_gamma=GAMMA
    )
    config.lora_compress, config.learning_rate, config.decay_ratio = compress, RATE, DECAY
    config.num_train_steps, config.finetune_task_name = STEPS, "stsb"
    rate = train.create_learning_rate_fn(STEPS, 0, RATE, DECAY)
    model = train.TrainState.create(apply_fn=Output(), params=base, tx=train.optax.set_to_zero())
    state, lora = train.create_lora_state(config, base, rate, jax.random.key(1), jax.random.key(2))
    name = "compressed" if compress else "narrow"
    if compress:
        out |= {f"wide/{key}": value for key, value in flat_factors(state.params).items()}
        state = train.create_compressed_lora_train_state(state, lora, model, dict(batch), config)
    out |= {f"{name}/start/{key}": value for key, value in flat_factors(state.params).items()}
    step = train.create_train_step_fn(config, rate)
    losses = []
    for _ in range(STEPS):
        state, measured = step(model, state, dict(batch))
        losses.append(measured["loss"])
    out |= {f"{name}/after/{key}": value for key, value in flat_factors(state.params).items()}
    out[f"{name}/losses"] = np.array(losses)


def flat_factors(params):
    """`square/left`, `square/mf/W1`, .. without the path of the kernel in front."""
    return {key.replace("/kernel", ""): value for key, value in flat(params).items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    sys.path.insert(0, str(parser.parse_args().folder))
    blanks = dict.fromkeys(("transformers", "evaluate", "nltk"), mock.MagicMock())
    sys.modules.update(blanks, dataclasses_json=mock.MagicMock(dataclass_json=lambda cls: cls))
    jax.tree_map = jax.tree.map  # removed from JAX since
    from dlt import configs, model_utils, train

    model_utils.MIN_DIMS = 1
    rng = np.random.default_rng(0)
    base = {
        name: {"kernel": (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)}
        for name, shape in KERNELS.items()
    }
    batch = {"x": rng.standard_normal((6, 12)).astype(np.float32), "labels": rng.standard_normal(6).astype(np.float32)}
    out = {**{f"base/{name}": value["kernel"] for name, value in base.items()}, **batch}
    for compress in (True, False):
        run(out, configs, train, base, batch, compress)
    np.savez(Path(__file__).with_name("deeplora.npz"), **out)


if __name__ == "__main__":
    main()
