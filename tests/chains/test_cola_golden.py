"""COLA: two links trained here end where a loop of `merge_and_unload` over PEFT ends, folded and kept beside the base."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "cola.npz"))
LAYERS = ("up", "down")


def loss(params):
    return jnp.sum(jnp.sin(jnp.tanh(jnp.asarray(GOLDEN["x"]) @ params["up"]) @ params["down"]))


def factors(link):
    return {layer: {name: jnp.asarray(GOLDEN[f"{link}/{layer}/{name}"]) for name in "ab"} for layer in LAYERS}


@pytest.mark.once
@pytest.mark.parametrize("wrap", [lambda lora: lora, lambda lora: jlora.Chain(lora, links=2)], ids=["folded", "kept"])
def test_two_links_end_where_peft_ends(wrap):
    params = {layer: jnp.asarray(GOLDEN[f"{layer}/w"]) for layer in LAYERS}
    adapted = jlora.adapterize(params, {".*": wrap(jlora.LoRA(2, alpha=3))})
    tx = jlora.optimizer(adapted, optax.adamw, 0.05, weight_decay=0.1)
    state = tx.init(adapted.params)

    @jax.jit
    def step(adapted, state):
        gradient = jax.grad(lambda p: jlora.lift(loss)(adapted.replace(params=p)))(adapted.params)
        updates, state = tx.update(gradient, state, adapted.params)
        return adapted.replace(params=optax.apply_updates(adapted.params, updates)), state

    for link in range(2):
        adapted = adapted.replace(params=factors(link))
        for _ in range(4):
            adapted, state = step(adapted, state)
        for layer, leaf in jlora.merge(adapted).items():
            np.testing.assert_allclose(leaf, GOLDEN[f"{link}/{layer}/merged"], atol=2e-5)
        if link == 0:
            adapted, state = jlora.restart(adapted, state, tx, jax.random.key(1))
