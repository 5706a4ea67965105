"""VB-LoRA: the numbers of PEFT 0.21, stretches that are cut, and what a stretch may not be made of."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.problems import perturbed, weight
from descent import descend

import jlora

pytestmark = pytest.mark.once

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "vblora.npz"))
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
LAYERS = ("up", "down")
METHOD = jlora.VBLoRA(rank=3, num_vectors=5, vector_length=2, topk=2)


def forward(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def arrays(prefix):
    """The golden arrays as jlora has them; PEFT keeps logits as `[rank, tiles, vectors]` and `[tiles, rank, vectors]`."""
    own = {
        layer: {name: jnp.asarray(np.swapaxes(GOLDEN[f"{prefix}/{layer}/{side}"], 0, 1)) for name, side in SIDES}
        for layer in LAYERS
    }
    return {**own, "~shared": {"VBLoRA": {"bank": jnp.asarray(GOLDEN[f"{prefix}/bank"])}}}


SIDES = (("la", "A"), ("lb", "B"))


def of_peft(prefix):
    adapted = jlora.adapterize({layer: jnp.asarray(GOLDEN[f"w/{layer}"]) for layer in LAYERS}, {".*": METHOD})
    assert jax.tree.map(jnp.shape, arrays(prefix)) == jax.tree.map(jnp.shape, adapted.params)
    return adapted.replace(params=arrays(prefix))


def test_outputs_gradients_and_steps_are_those_of_peft():
    adapted = of_peft("before")

    def outputs(p):
        return jlora.lift(forward, strict=True)(adapted.replace(params=p), GOLDEN["x"])

    tx = jlora.optimizer(adapted, optax.adam, learning_rate=0.02)
    y, _, gradients, after = descend(outputs, adapted.params, tx, steps=5)
    close(y[0], GOLDEN["y"])
    jax.tree.map(lambda mine, theirs: close(mine[0], theirs), gradients, arrays("gradient"))
    jax.tree.map(partial(close, atol=1e-4), after, arrays("after"))


def test_merged_weights_are_those_of_peft():
    merged = jlora.merge(of_peft("after"))
    for layer in LAYERS:
        close(merged[layer], GOLDEN[f"merged/{layer}"])


def test_the_start_is_drawn_as_peft_draws_it():
    adapted = jlora.adapterize({"w": jnp.zeros((512, 512))}, {"w": jlora.VBLoRA()})
    bank = np.asarray(adapted.params["~shared"]["VBLoRA"]["bank"])
    found = [np.abs(bank).max(), bank.std(), np.asarray(adapted.params["w"]["la"]).std()]
    np.testing.assert_allclose(found, GOLDEN["drawn"], rtol=0.05)


def test_the_last_stretch_is_cut_where_the_length_does_not_divide_a_side():
    adapted = perturbed(jlora.adapterize({"w": weight(0, 7, 5)}, {"w": jlora.VBLoRA(2, 6, 3)}))
    bank = np.asarray(adapted.params["~shared"]["VBLoRA"]["bank"], np.float64)
    logits = {name: np.asarray(array, np.float64) for name, array in adapted.params["w"].items()}
    assert logits["la"].shape == (3, 2, 6) and logits["lb"].shape == (2, 2, 6)

    def stretch(scores):
        chosen = sorted(range(6), key=lambda n: -scores[n])[:2]
        shares = np.exp(scores[chosen]) / np.exp(scores[chosen]).sum()
        return shares[0] * bank[chosen[0]] + shares[1] * bank[chosen[1]]

    a = np.stack([np.concatenate([stretch(logits["la"][n, r]) for n in range(3)])[:7] for r in range(2)], axis=1)
    b = np.stack([np.concatenate([stretch(logits["lb"][r, n]) for n in range(2)])[:5] for r in range(2)])
    close(jlora.merge(adapted)["w"] - adapted.base["w"], a @ b)


def test_more_choices_than_vectors_and_a_bank_of_zeros_are_refused():
    with pytest.raises(ValueError, match=r"VBLoRA's topk \(3\) is above the number of vectors \(2\)"):
        jlora.VBLoRA(num_vectors=2, topk=3)
    with pytest.raises(ValueError, match="VBLoRA's bank_bound must be positive"):
        jlora.VBLoRA(bank_bound=0.0)
