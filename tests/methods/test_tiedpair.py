"""Tied pairs: both updates of two factors, how pairs are found, and what has none."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract.problems import normal, perturbed, weight
from descent import descend

import jlora

pytestmark = pytest.mark.once

close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def networks(layers=2):
    return {
        f"layers_{n}": {"up": weight(2 * n, 6, 10), "down": weight(2 * n + 1, 10, 6), "norm": jnp.ones(6)}
        for n in range(layers)
    }


def forward(params, x):
    for layer in params.values():
        x = x * layer["norm"] + jnp.tanh(x @ layer["up"]) @ layer["down"]
    return x


def test_it_trains_as_two_loras_whose_factors_are_transposes_with_the_sum_of_their_gradients():
    params, x, method = networks(), normal(9, 5, 6), jlora.TiedPair(rank=3, alpha=6)
    adapted = perturbed(jlora.adapterize(params, {".*/(up|down)": method}))
    assert jax.tree.map(jnp.shape, adapted.params["~shared"]) == {"TiedPair": {"a": (2, 6, 3), "b": (2, 3, 10)}}

    def written(p):
        """NumPy's own formula, differentiated by JAX, of factors as the reference's two matrices would have them."""
        merged = {}
        for n, (name, layer) in enumerate(params.items()):
            update = 2 * jnp.einsum("ir,ro->io", p["a"][n], p["b"][n])
            merged[name] = {**layer, "up": layer["up"] + update, "down": layer["down"] + update.T}
        return forward(merged, x)

    def lifted(p):
        whole = adapted.replace(params={**adapted.params, "~shared": {"TiedPair": p}})
        return jlora.lift(forward, strict=True)(whole, x)

    start, tx = adapted.params["~shared"]["TiedPair"], optax.adam(0.02)
    jax.tree.map(partial(close, atol=1e-4), descend(lifted, start, tx, 4), descend(written, start, tx, 4))


def test_stacked_layers_and_experts_are_paired_matrix_by_matrix():
    params = {"up": weight(0, 3, 6, 10), "down": weight(1, 3, 10, 6)}
    adapted = perturbed(jlora.adapterize(params, {".*": jlora.Axes("batch in out", jlora.TiedPair(rank=2))}))
    merged = jlora.merge(adapted)
    up, down = (np.asarray(merged[name] - params[name]) for name in ("up", "down"))
    close(up, np.swapaxes(down, 1, 2))
    assert len({matrix.tobytes() for matrix in up}) == 3


def test_square_matrices_are_paired_by_patterns_and_pairs_of_other_sizes_take_their_part():
    params = {f"layers_{n}": {kind: weight(n, 8, 8) for kind in "qkvo"} for n in range(2)}
    params["layers_2"] = {"v": weight(5, 6, 6), "o": weight(6, 6, 6)}
    method = jlora.TiedPair(rank=2, scaling="rslora", first=".*/v", second=".*/o")
    adapted = perturbed(jlora.adapterize(params, {".*/[vo]": method}))
    drawer, merged = adapted.params["~shared"]["TiedPair"], jlora.merge(adapted)
    for n, (name, size) in enumerate((("layers_0", 8), ("layers_1", 8), ("layers_2", 6))):
        wanted = 8 / 2**0.5 * np.asarray(drawer["a"][n][:size]) @ np.asarray(drawer["b"][n][:, :size])
        close(merged[name]["v"] - params[name]["v"], wanted)
        close(merged[name]["o"] - params[name]["o"], wanted.T)
    two = perturbed(jlora.adapterize({"p": weight(0, 4, 4), "q": weight(1, 4, 4)}, {".*": jlora.TiedPair(rank=2)}))
    found = jlora.merge(two)
    close(found["p"] - two.base["p"], (found["q"] - two.base["q"]).T)


def test_the_start_is_lora_s():
    adapted = jlora.adapterize({"up": weight(0, 100, 400), "down": weight(1, 400, 100)}, {".*": jlora.TiedPair()})
    drawer = adapted.params["~shared"]["TiedPair"]
    assert np.abs(drawer["a"]).max() == pytest.approx(0.1, rel=0.02) and not np.any(drawer["b"])


def test_matrices_without_a_partner_or_with_several_are_refused_by_name():
    with pytest.raises(
        ValueError, match=r"layers_0/up: TiedPair finds no matrix \[10, 6\] in the same layer to tie this one"
    ):
        jlora.adapterize(networks(), {".*/up": jlora.TiedPair(rank=2)})
    gated = {"layers_0": {"gate": weight(0, 6, 10), "up": weight(1, 6, 10), "down": weight(2, 10, 6)}}
    with pytest.raises(
        ValueError, match=r"more than one pair among layers_0/down \[10, 6\], layers_0/gate \[6, 10\], "
    ):
        jlora.adapterize(gated, {".*": jlora.TiedPair(rank=2)})
    method = jlora.TiedPair(rank=2, first=".*/up", second=".*/down", unpaired=True)
    adapted = perturbed(jlora.adapterize(gated, {".*": method}))
    delta = jax.tree.map(jnp.subtract, jlora.merge(adapted), gated)["layers_0"]
    close(delta["up"], delta["down"].T)
    assert not np.allclose(delta["gate"], delta["up"])
    with pytest.raises(ValueError, match="the first is not the transpose of the second in shape"):
        jlora.adapterize(gated, {".*": jlora.TiedPair(rank=2, first=".*/up", second=".*/gate", unpaired=True)})
    with pytest.raises(ValueError, match="TiedPair takes first and second together, got 'a' and None"):
        jlora.TiedPair(first="a")
    for name in ("first", "second"):
        with pytest.raises(ValueError, match=rf"TiedPair's {name} must be a regex that matches paths, got '\(': "):
            jlora.TiedPair(**{"first": "a", "second": "a", name: "("})
