"""kauldron's `kd.train.Trainer` on a `jlora.linen.Lifted`: exact start, base untouched, optimizer state of the adapters alone.

python experiments/clients/kauldron_trainer.py
"""

from __future__ import annotations

import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from kauldron import kd

import jlora
import jlora.linen


class Model(nn.Module):
    """A classifier of digits' pixels, as kauldron has models: what each input is called stands in a field."""

    image: kd.kontext.Key = kd.kontext.REQUIRED

    @nn.compact
    def __call__(self, image):
        x = nn.relu(nn.Dense(32, name="up")(image))
        return nn.Dense(4, name="head")(x)


def batches():
    """Points of four clusters."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 64)
    centers = rng.normal(size=(4, 8))
    images = centers[labels] + 0.3 * rng.normal(size=(64, 8))
    return [{"image": image, "label": label[None]} for image, label in zip(images.astype(np.float32), labels)]


def trainer(workdir: str, model):
    optimizer = kd.optim.partial_updates(optax.adam(1e-2), mask=kd.optim.select("lora"))
    return kd.train.Trainer(
        seed=0,
        workdir=workdir,
        train_ds=kd.data.py.DataSource(
            data_source=batches(), shuffle=True, seed=0, num_epochs=None, num_workers=0, batch_size=16
        ),
        model=model,
        train_losses={"xent": kd.losses.SoftmaxCrossEntropyWithIntLabels(logits="preds", labels="batch.label")},
        optimizer=optimizer,
        num_train_steps=20,
        log_metrics_every=5,
        checkpointer=None,
        writer=kd.train.metric_writer.NoopWriter(),
    )


def main() -> None:
    spec = {jlora.ALL_LINEAR: jlora.LoRA(rank=2), r"head/.*": jlora.Full()}
    lifted = jlora.linen.Lifted(Model(image="batch.image"), spec)
    with tempfile.TemporaryDirectory() as folder:
        job = trainer(folder, lifted)
        start = job.init_state()
        before = jax.device_get(start.params)
        state, _ = job.train()
    images = jnp.stack([each["image"] for each in batches()])
    labels = jnp.concatenate([each["label"] for each in batches()])
    plain = Model(image="batch.image").apply({"params": before["base"]}, images)
    assert np.array_equal(lifted.apply({"params": before}, images), plain)
    assert all(map(np.array_equal, jax.tree.leaves(before["base"]), jax.tree.leaves(state.params["base"])))
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params["lora"]))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * trained, (moments, trained)
    logits = jax.jit(lifted.apply)({"params": state.params}, images)
    first, last = (
        float(optax.softmax_cross_entropy_with_integer_labels(each, labels).mean()) for each in (plain, logits)
    )
    print(f"loss {first:.2f} at first, {last:.2f} at last; {moments} values of Adam's state for {trained} trained ones")
    assert last < first / 2


if __name__ == "__main__":
    main()
