"""LoHa and HiRA against their formulas written by entries, and their starts; PEFT's numbers are in tests/interchange."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)
W = RNG.normal(size=(5, 4)).astype("f4")
A1, A2 = RNG.normal(size=(2, 5, 3)).astype("f4")
B1, B2 = RNG.normal(size=(2, 3, 4)).astype("f4")
# For each method: its trained arrays, and the effective weight as a sum over ranks.
CASES = {
    "loha": (
        jlora.LoHa(rank=3, alpha=6.0),
        {"a1": A1, "b1": B1, "a2": A2, "b2": B2},
        lambda p: W + 2 * np.einsum("ir,ro,is,so->io", p["a1"], p["b1"], p["a2"], p["b2"]),
    ),
    "hira": (jlora.HiRA(rank=3), {"a": A1, "b": B1}, lambda p: W * (1 + np.einsum("ir,ro->io", p["a"], p["b"]))),
}


@pytest.mark.parametrize("name", CASES)
def test_weight_and_gradients_are_those_of_the_formula(name):
    method, arrays, formula = CASES[name]
    adapted = jlora.adapterize({"k": jnp.asarray(W)}, {"k": method})
    adapted = adapted.replace(params={"k": {key: jnp.asarray(value) for key, value in arrays.items()}})
    np.testing.assert_allclose(jlora.merge(adapted)["k"], formula(arrays), rtol=1e-5, atol=1e-5)
    x, g = RNG.normal(size=(7, 5)).astype("f4"), RNG.normal(size=(7, 4)).astype("f4")
    product = jlora.lift(lambda p, x: x @ p["k"])
    found = jax.grad(lambda p: (product(adapted.replace(params=p), x) * g).sum())(adapted.params)["k"]
    for key, value in arrays.items():
        for at in [(0, 0), (value.shape[0] - 1, value.shape[1] - 1)]:
            step = {other: each.astype("f8") for other, each in arrays.items()}
            step[key] = step[key].copy()
            step[key][at] += 1e-3
            # Each formula is linear in each of its arrays.
            slope = ((formula(step) - formula({k: v.astype("f8") for k, v in arrays.items()})) * (x.T @ g)).sum() / 1e-3
            np.testing.assert_allclose(found[key][at], slope, rtol=1e-3, atol=1e-4)


def test_starts_are_exact_and_as_wide_as_in_peft():
    params = {"k": jnp.ones((400, 300))}
    loha = jlora.adapterize(params, {"k": jlora.LoHa(rank=16)}).params["k"]
    hira = jlora.adapterize(params, {"k": jlora.HiRA(rank=16)}).params["k"]
    gaussian = jlora.adapterize(params, {"k": jlora.HiRA(rank=16, init="gaussian")}).params["k"]
    assert not np.any(loha["a2"]) and not np.any(hira["b"])
    for array, bound in ((loha["a1"], 1 / 20), (loha["b1"], 1 / 4), (loha["b2"], 1 / 4), (hira["a"], 1 / 20)):
        np.testing.assert_allclose(np.abs(array).max(), bound, rtol=0.01)
        np.testing.assert_allclose(np.std(array), bound / 3**0.5, rtol=0.05)
    np.testing.assert_allclose(np.std(gaussian["a"]), 1 / 16, rtol=0.05)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: jlora.LoHa(rank=0), "LoHa's rank must be a positive whole number, got 0"),
        (lambda: jlora.LoHa(alpha=0), "LoHa's alpha must be finite and not 0, got 0"),
        (lambda: jlora.HiRA(init="zeros"), "HiRA's init must be one of"),
        (
            lambda: jlora.adapterize({"k": jnp.asarray(W)}, {"k": jlora.HiRA(rank=5)}),
            r"k, shape \(5, 4\): rank 5 is above",
        ),
    ],
)
def test_what_they_can_not_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
