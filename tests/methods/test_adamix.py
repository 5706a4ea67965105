"""AdaMix: one copy is drawn with a key, their mean acts without; and the loss on two draws."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)
BASE = {"w": jnp.asarray(RNG.standard_normal((6, 5)), jnp.float32)}
X = jnp.asarray(RNG.standard_normal((4, 6)), jnp.float32)
METHODS = [jlora.AdaMix(rank=2, experts=3, alpha=5), jlora.AdaMix(rank=2, experts=3, alpha=5, shared_b=False)]
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def started(method):
    """The start with noise, which tells the copies apart."""
    adapted, rng = jlora.adapterize(BASE, {"w": method}, jax.random.key(1)), np.random.default_rng(2)
    noisy = lambda leaf: leaf + jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)
    return adapted.replace(params=jax.tree.map(noisy, adapted.params))


@jax.jit
def drawn(adapted, key):
    return jlora.lift(lambda params: X @ params["w"], strict=True)(adapted.replace(context={"dropout": key}))


def whole(adapted):
    return jlora.lift(lambda params: X @ params["w"], strict=True)(adapted)


@pytest.mark.parametrize("method", METHODS)
def test_with_a_key_one_copy_acts_and_each_in_its_turn(method):
    adapted = started(method)
    a, b = (np.asarray(adapted.params["w"][name]) for name in "ab")
    choices = [X @ (BASE["w"] + 2.5 * left @ right) for left in a for right in b]
    seen = set()
    for seed in range(60):
        y = drawn(adapted, jax.random.key(seed))
        (found,) = [n for n, choice in enumerate(choices) if np.allclose(y, choice, rtol=1e-4, atol=1e-4)]
        seen.add(found)
    assert seen == set(range(len(choices)))
    close(whole(adapted), X @ (BASE["w"] + 2.5 * a.mean(0) @ b.mean(0)))


def test_copies_that_are_not_drawn_get_no_gradient():
    adapted = started(METHODS[1])
    loss = lambda params, key: jnp.sum(jnp.sin(drawn(adapted.replace(params=params), key)))
    gradient = jax.grad(loss)(adapted.params, jax.random.key(3))["w"]
    moved = {name: np.any(np.asarray(leaf) != 0, axis=(1, 2)) for name, leaf in gradient.items()}
    assert [each.sum() for each in moved.values()] == [1, 1]


def test_copies_start_alike_so_that_any_draw_is_the_base_and_compact_makes_one_lora():
    start = jlora.adapterize(BASE, {"w": METHODS[0]}, jax.random.key(1))
    a = np.asarray(start.params["w"]["a"])
    assert np.array_equal(a[0], a[1]) and np.array_equal(a[0], a[2]) and np.any(a[0])
    close(drawn(start, jax.random.key(0)), X @ BASE["w"])
    adapted = started(METHODS[0])
    small = jlora.compact(adapted)
    assert small.plan.sites[0].method == jlora.LoRA(2, alpha=5)
    close(whole(small), whole(adapted))


def test_agreement_is_half_of_both_divergences_each_pulling_one_side():
    p, q = (RNG.standard_normal((3, 4, 5)).astype(np.float32) for _ in range(2))
    mask = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], np.float32)
    log_p, log_q = (np.log(np.exp(z) / np.exp(z).sum(-1, keepdims=True)) for z in (p, q))
    each = 0.5 * ((np.exp(log_q) - np.exp(log_p)) * (log_q - log_p)).sum(-1)
    close(jlora.losses.agreement(p, q, mask), (each * mask).sum() / 2)  # two rows count
    pull = jax.grad(jlora.losses.agreement)(p, q, mask)
    close(pull, 0.5 * (np.exp(log_p) - np.exp(log_q)) * mask[..., None] / 2)
    close(jax.grad(jlora.losses.agreement)(p, p), np.zeros_like(p))
    with pytest.raises(ValueError, match="the other draw's logits have shape"):
        jlora.losses.agreement(p, q[:, :2])


def test_hyperparameters_out_of_range_are_refused():
    with pytest.raises(ValueError, match="AdaMix's experts must be a whole number of at least 2, got 1"):
        jlora.AdaMix(experts=1)
    with pytest.raises(ValueError, match="rank 6 is above the smaller side"):
        jlora.adapterize(BASE, {"w": jlora.AdaMix(rank=6)})
