"""BA-LoRA's regularizers: values and gradients against numpy, masks, and the corners where derivatives are not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.losses import consistency, diversity, spectrum

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)
Z, T = RNG.standard_normal((2, 5, 4, 6)).astype(np.float32)  # rows, tokens, classes
MASK = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], np.float32)


def softmax(z):
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def consistency_by_hand(z, t, mask, form):
    z, t = z.astype(np.float64), t.astype(np.float64)
    if form == "classify":
        unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
        return np.sum(((unit(z) - unit(t)) ** 2).mean(-1) * mask) / mask.sum()
    p, q = softmax(t), softmax(z)
    return np.sum(p * np.log(p / q) * mask[..., None]) / np.sum(mask.any(1))


def diversity_by_hand(z, mask, form):
    rows = z.astype(np.float64)[mask > 0]
    if form == "generate":
        p = softmax(rows)
        return np.mean(np.sum(p * np.log(p), axis=-1))
    c = np.cov(rows, rowvar=False)
    return sum(c[i, j] ** 2 for i in range(6) for j in range(6) if i != j) / 6


def spectrum_by_hand(z, mask, count):
    sigma = np.linalg.svd((z.astype(np.float64) * mask[..., None]).reshape(len(z), -1), compute_uv=False)
    return -sigma[:count].sum() / sigma.sum()


CASES = {
    "consistency": (
        lambda z, m, form: consistency(z, T, m, form=form),
        lambda z, m, form: consistency_by_hand(z, T, m, form),
        ("classify", "generate"),
    ),
    "diversity": (
        lambda z, m, form: diversity(z, m, form=form),
        lambda z, m, form: diversity_by_hand(z, m, form),
        ("classify", "generate"),
    ),
    "spectrum": (
        lambda z, m, count: spectrum(z, m, count=count),
        lambda z, m, count: spectrum_by_hand(z, m, count),
        (1, 3),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_numpy_and_padding_does_not_count(name):
    loss, by_hand, options = CASES[name]
    ones, rubbish = np.ones_like(MASK), np.where(MASK[..., None] > 0, Z, np.inf).astype(np.float32)
    direction = RNG.standard_normal(Z.shape)
    for option in options:
        compiled = jax.jit(lambda z, m, o=option: loss(z, m, o))
        value, gradient = jax.jit(jax.value_and_grad(compiled))(rubbish, MASK)
        assert value == pytest.approx(by_hand(Z, MASK, option), rel=1e-5)
        assert not np.any(np.asarray(gradient)[MASK == 0])
        ends = [by_hand(Z + step * direction, MASK, option) for step in (1e-4, -1e-4)]
        assert np.sum(gradient * direction) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=5e-3, abs=1e-5)
        assert compiled(Z, None) == pytest.approx(by_hand(Z, ones, option), rel=1e-5)
        np.testing.assert_allclose(compiled(Z, MASK.any(1)), by_hand(Z, ones * MASK.any(1)[:, None], option), rtol=1e-5)


@pytest.mark.parametrize("form", ["classify", "generate"])
def test_a_model_at_its_start_is_consistent_and_the_teacher_gets_no_gradient(form):
    value, gradient = jax.jit(jax.value_and_grad(lambda z: consistency(z, Z, form=form)))(Z)
    assert value == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    assert not np.any(jax.jit(jax.grad(lambda t: consistency(Z, t, form=form)))(T))


def test_diversity_is_zero_for_uncorrelated_classes_and_minus_log_classes_for_uniform_ones():
    uncorrelated = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], np.float32)
    assert diversity(uncorrelated) == pytest.approx(0, abs=1e-6)
    assert diversity(np.zeros((3, 6), np.float32), form="generate") == pytest.approx(-np.log(6), rel=1e-6)


def test_the_spectrum_is_finite_at_repeated_and_zero_singular_values():
    repeated = np.eye(4, 6, dtype=np.float32)
    low = (RNG.standard_normal((20, 2)) @ RNG.standard_normal((2, 6))).astype(np.float32)
    for matrix, wanted in ((repeated, -0.5), (low, -1.0), (np.zeros((3, 5), np.float32), 0.0)):
        value, gradient = jax.jit(jax.value_and_grad(lambda z: spectrum(z, count=2)))(matrix)
        assert value == pytest.approx(wanted, abs=2e-3)
        assert np.all(np.isfinite(gradient))
    gradient = jax.jit(jax.grad(lambda z: consistency(z, jnp.zeros_like(z))))(np.zeros((2, 3), np.float32))
    assert np.all(np.isfinite(gradient))


def test_the_base_of_an_adapted_model_is_its_teacher():
    """Also where the start is a part of the weight (PiSSA): the base's own arrays are used, and no others."""
    params = {"w": jnp.asarray(RNG.standard_normal((4, 3)), jnp.float32)}
    fn, x = lambda params, x: x @ params["w"], jnp.ones((2, 4))
    adapted = jlora.adapterize(params, {"w": jlora.LoRA(2, init="pissa")})
    assert adapted.base["w"] is params["w"]
    assert consistency(jlora.lift(fn)(adapted, x), fn(adapted.base, x)) == pytest.approx(0, abs=1e-9)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r'form must be "classify" or "generate", got \'nlu\''):
        diversity(Z, form="nlu")
    with pytest.raises(ValueError, match=r"the mask has shape \(4,\), the logits \(5, 4, 6\): wanted \(5, 4\)"):
        diversity(Z, np.ones(4))
    with pytest.raises(
        ValueError, match=r"the teacher's logits have shape \(4, 6\), those of the adapted model \(5, 4, 6\)"
    ):
        consistency(Z, T[0])
    with pytest.raises(ValueError, match=r"logits must be \[rows, ..., classes\], got shape \(6,\)"):
        spectrum(Z[0, 0])
    with pytest.raises(ValueError, match=r"at least 1; got 0"):
        spectrum(Z, count=0)
