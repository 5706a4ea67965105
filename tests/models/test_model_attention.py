"""Caches, packing and padding: other ways to give a model the same text give the same output."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models_data import GOLDEN, golden, quick_jit

import jlora.models as models


@functools.cache
def loaded(name: str, scan_layers: bool = True):
    model, params = models.load(GOLDEN / name, scan_layers=scan_layers)
    return quick_jit(model.apply), {"params": params}, golden(name)["tokens"]


@pytest.mark.once
@pytest.mark.parametrize(
    "name, scan_layers",
    [
        ("mistral_window", True),
        ("qwen2_window_tied", False),
        ("gemma3", True),
        ("gpt2_scaled", False),
        ("mixtral", True),
    ],
)
def test_reading_in_pieces_with_a_cache_equals_reading_at_once(name, scan_layers):
    apply, variables, tokens = loaded(name, scan_layers)
    cache, pieces = models.empty_cache(2, 30), []
    for start, stop in ((0, 14), (14, 23), (23, 24)):
        logits, cache = apply(variables, tokens[:, start:stop], cache=cache)
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, 1), apply(variables, tokens), atol=5e-5)
    assert int(cache.index) == 24


@pytest.mark.once
@pytest.mark.parametrize("name", ["mistral_window", "gemma2", "bert"])
def test_packed_segments_equal_separate_texts(name):
    apply, variables, tokens = loaded(name)
    segments = np.array([[1] * 10 + [2] * 10 + [0] * 4, [5] * 10 + [1] * 10 + [0] * 4])
    packed = apply(variables, tokens, segment_ids=segments)
    for start, stop in ((0, 10), (10, 20)):
        np.testing.assert_allclose(packed[:, start:stop], apply(variables, tokens[:, start:stop]), atol=1e-5)


@pytest.mark.once
def test_a_segment_after_padding_starts_at_position_0():
    apply, variables, tokens = loaded("bert")
    segments = np.array([[0] * 2 + [1] * 10 + [0] * 2 + [2] * 10] * 2)
    packed = apply(variables, tokens, segment_ids=segments)
    np.testing.assert_allclose(packed[:, 2:12], apply(variables, tokens[:, 2:12]), atol=1e-5)
    np.testing.assert_allclose(packed[:, 14:], apply(variables, tokens[:, 14:]), atol=1e-5)


@pytest.mark.once
def test_padding_on_the_left_equals_no_padding():
    apply, variables, tokens = loaded("mistral_window")
    mask = np.ones_like(tokens)
    mask[:, :14] = 0
    padded = apply(variables, tokens, attention_mask=mask)
    np.testing.assert_allclose(padded[:, 14:], apply(variables, tokens[:, 14:]), atol=1e-5)


@pytest.mark.once
def test_given_positions_are_used():
    apply, variables, tokens = loaded("bert")
    shifted = apply(variables, tokens[:, :10], positions=jnp.arange(10) + 3)
    assert np.abs(shifted - apply(variables, tokens[:, :10])).max() > 0.01


@pytest.mark.once
def test_hidden_states_give_the_logits_through_the_head():
    model, params = models.load(GOLDEN / "qwen3")
    tokens = golden("qwen3")["tokens"]
    apply = quick_jit(model.apply, static_argnames="return_hidden")
    hidden, logits = (apply({"params": params}, tokens, return_hidden=hidden) for hidden in (True, False))
    np.testing.assert_allclose(hidden @ params["lm_head"]["kernel"], logits, atol=1e-5)


@pytest.mark.once
def test_a_full_cache_says_so():
    apply, variables, tokens = loaded("qwen3")
    with pytest.raises(ValueError, match="KV cache: 8 slots, 0 used, 24 more tokens given"):
        apply(variables, tokens, cache=models.empty_cache(2, 8))


def test_gradients_reach_every_leaf_and_remat_keeps_them():
    tokens = golden("llama_llama3_biases")["tokens"]

    def gradient(remat):
        model, params = models.load(GOLDEN / "llama_llama3_biases", remat=remat)
        loss = lambda p: jnp.mean(jax.nn.log_softmax(model.apply({"params": p}, tokens))[..., 7])
        return quick_jit(jax.grad(loss))(params)

    plain, remat = gradient(False), gradient(True)
    for path, leaf in jax.tree_util.tree_leaves_with_path(plain):
        assert np.abs(leaf).max() > 1e-7, jax.tree_util.keystr(path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, remat)


@pytest.mark.once
@pytest.mark.parametrize(
    "name",
    [
        "mistral_window",
        "gpt2_scaled",
        *(pytest.param(each, marks=pytest.mark.long) for each in ("gemma3", "mixtral", "phi3")),
    ],
)
def test_rows_of_one_cache_need_not_be_equally_long(name):
    """Two rows of 9 and 14 tokens, side by side: each goes on where it is, and one of them rests for a step."""
    apply, variables, tokens = loaded(name)
    whole, lengths = np.asarray(apply(variables, tokens)), np.array([9, 14])
    cache = models.empty_cache(2, 30).replace(index=jnp.zeros(2, jnp.int32))
    _, cache = apply(variables, tokens[:, :14], attention_mask=np.arange(14) < lengths[:, None], cache=cache)
    cache = cache.replace(index=jnp.asarray(lengths))
    for step in range(4):
        active = np.array([True, step != 2])
        logits, after = apply(variables, tokens[[0, 1], lengths][:, None], attention_mask=active[:, None], cache=cache)
        assert after.index.tolist() == (lengths + 1).tolist()
        for row in np.flatnonzero(active):
            np.testing.assert_allclose(logits[row, 0], whole[row, lengths[row]], atol=5e-5)
        lengths = lengths + active
        cache = after.replace(index=jnp.asarray(lengths))
