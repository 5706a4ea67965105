"""Attention in blocks of queries: the same numbers and gradients, and scores of one block at a time."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.core.products.backend import traced_for
from jlora.models import attention

pytestmark = pytest.mark.once

BATCH, LENGTH, HEADS, WIDTH = 2, 11, 4, 8
SEGMENTS = jnp.array([[1] * 6 + [2] * 5, [0] * 2 + [1] * 7 + [0] * 2], jnp.int32)


def inputs(kv_heads):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(BATCH, LENGTH, heads, WIDTH) for heads in (HEADS, kv_heads, kv_heads)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]


def visible(causal, window):
    positions = attention.token_positions(SEGMENTS) if causal else None
    return attention.Visible(SEGMENTS, SEGMENTS, positions, positions, window)


def attend(visible, cap):
    """The loss is of tokens that are no padding, as every model's is."""

    def loss(query, key, value):
        mixed = attention.attend(query, key, value, visible, cap=cap) * (SEGMENTS > 0)[..., None]
        return jnp.sum(jnp.sin(mixed)), mixed

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)


@pytest.mark.parametrize(
    ("causal", "window", "cap", "kv_heads"), [(True, None, None, 2), (True, 3, 2.0, 4), (False, None, None, 4)]
)
def test_blocks_give_the_numbers_and_gradients_of_all_queries_at_once(monkeypatch, causal, window, cap, kv_heads):
    found = []
    for scores in (attention.SCORES, BATCH * HEADS * LENGTH * 3):  # whole, and three queries at a time
        monkeypatch.setattr(attention, "SCORES", scores)
        found.append(jax.jit(attend(visible(causal, window), cap))(*inputs(kv_heads)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *found)
    assert np.abs(found[0][1][1]).max() > 1e-3


def test_no_array_of_the_program_holds_all_scores(monkeypatch):
    texts = []
    for scores in (attention.SCORES, BATCH * HEADS * LENGTH * 3):
        monkeypatch.setattr(attention, "SCORES", scores)
        texts.append(jax.jit(attend(visible(True, None), None)).lower(*inputs(2)).as_text())
    assert [bool(re.search(rf"x{LENGTH}x{LENGTH}x", text)) for text in texts] == [True, False]


def test_a_tpu_has_a_number_of_scores_for_each_of_its_chips(monkeypatch):
    monkeypatch.setattr(attention, "SCORES_OF_A_TPU", BATCH * HEADS * LENGTH * 3)
    loops = []
    for chips in (1, 2, 4):  # three, six and all queries at a time
        with traced_for("tpu", chips):
            fresh = lambda *args: attention.attend(*args)  # JAX remembers what a function was traced to
            text = str(jax.make_jaxpr(fresh)(*inputs(2), visible(True, None)))
        loops += re.findall(r"length=(\d+)", text) or ["none"]
    assert loops == ["4", "2", "none"]
