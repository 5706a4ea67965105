"""What tunix's trainers and its sampler make of a `jlora.nnx` module, each against what it must be.

    python experiments/clients/tunix_trainers.py

Fine-tuning with a stop and a restart against one run without, DPO with the base itself as the reference, and sampling against
the merged model; with AdaLoRA, whose ranks are allocated by the optimizer. A minute and a half on two cores.
"""

from __future__ import annotations

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import stories
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.rl.utils import is_sharing_backbone
from tunix.sft import utils
from tunix.sft.dpo.dpo_trainer import DataInput, DPOTrainer, DPOTrainingConfig
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

import jlora
import jlora.nnx

LORA = jlora.LoRA(rank=4)
ADALORA = jlora.AdaLoRA(rank=4, target=2, steps=4, final_steps=1)
BATCHES = [np.random.default_rng(n).integers(3, 512, (4, 12)) for n in range(4)]


def policy(base, method=LORA):
    """The base with adapters at two kinds of products, and their optimizer."""
    model = jlora.nnx.adapt(base, {r".*/(q_proj/w|up_proj/kernel)": method}, **base.get_model_input())
    return model, jlora.nnx.on_state(jlora.optimizer(model.adapted(), optax.adamw, 1e-2, ratio=4))


def inputs(tokens):
    """What a call of the model takes, as `PeftTrainer`'s loss names it."""
    length = tokens.shape[1]
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (len(tokens), length, length))
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    return {
        "input_tokens": tokens,
        "input_mask": jnp.ones_like(tokens),
        "positions": positions,
        "attention_mask": causal,
    }


def fit(model, tx, batches, folder=None):
    """Trains by `PeftTrainer`, from the newest checkpoint of the folder if it has one."""
    options = ocp.CheckpointManagerOptions(save_interval_steps=1, max_to_keep=1)
    config = TrainingConfig(
        eval_every_n_steps=10**6,
        max_steps=len(batches),
        checkpoint_root_directory=folder,
        checkpointing_options=options if folder else None,
    )
    trainer = PeftTrainer(model, tx, config).with_gen_model_input_fn(inputs)
    trainer.train(batches)
    trainer.close()
    return model


def same(one, other):
    """Whether the adapters of two modules are equal, bit for bit."""
    return all(map(np.array_equal, jax.tree.leaves(one.adapted().params), jax.tree.leaves(other.adapted().params)))


def check_fine_tuning(method) -> None:
    base = stories.load()
    before = jax.device_get(nnx.state(base))
    model, tx = policy(base, method)
    assert utils.is_lora_enabled(model) and is_sharing_backbone(base, model)
    fit(model, tx, BATCHES)
    with tempfile.TemporaryDirectory() as folder:
        fit(*policy(base, method), BATCHES[:2], folder)
        resumed, tx = policy(base, method)
        fit(resumed, tx, BATCHES, folder)
    assert same(model, resumed) and not same(model, policy(base, method)[0])
    assert is_sharing_backbone(base, model), "the base is there twice"
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(nnx.state(base)))), "the base was trained"
    if method is ADALORA:
        left = [int(np.sum(fields["e"] != 0)) for fields in triplets(model.adapted().params)]
        assert sum(left) == 2 * len(left) and len(set(left)) > 1, left
        print("ranks left:", left)


def triplets(tree):
    """The trained fields of each AdaLoRA leaf."""
    return [tree] if "e" in tree else [found for branch in tree.values() for found in triplets(branch)]


def check_dpo() -> None:
    base = stories.load()
    model, tx = policy(base)
    start = policy(base)[0]
    trainer = DPOTrainer(
        model,
        base,
        tx,
        DPOTrainingConfig(eval_every_n_steps=10**6, max_steps=2, max_prompt_length=8, max_response_length=8),
        tokenizer=stories.Tokenizer(),
    )
    chosen, rejected = np.array(["a happy dog.", "a red ball!"]), np.array(["an ugly rat", "no no no"])
    pairs = {"prompts": np.array(["Tom saw", "Sue had"]), "chosen_responses": chosen, "rejected_responses": rejected}
    trainer.train([DataInput(**{name: list(texts) for name, texts in pairs.items()})] * 2)
    assert not same(model, start) and is_sharing_backbone(base, model)


def check_sampling() -> None:
    model, _ = policy(stories.load(), jlora.LoRA(rank=4, init="random"))
    texts = []
    for each in (model, model.merged()):
        sampler = Sampler(each, stories.Tokenizer(), CacheConfig(64, 5, 4, 8))
        texts.append(sampler(stories.PROMPTS, max_generation_steps=12, max_prompt_length=16, temperature=0.0).text)
    assert texts[0] == texts[1]


if __name__ == "__main__":
    check_sampling()
    print("Sampler: the words of the merged model", flush=True)
    check_dpo()
    print("DPOTrainer: the reference is the base itself", flush=True)
    check_fine_tuning(LORA)
    print("PeftTrainer: a run that is stopped and started again is the run without", flush=True)
    check_fine_tuning(ADALORA)
    print("PeftTrainer with AdaLoRA: the same, and ranks as by its budget", flush=True)
