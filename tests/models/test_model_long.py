"""Long texts: S² attention against its formula, in the model, in Flax, in memory; stretched positions."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models_data import GOLDEN

import jlora
from jlora import models
from jlora.models.rope import RopeConfig

LENGTH, GROUP = 16, 4


def drawn(heads=4, kv_heads=2, length=LENGTH):
    rng = np.random.default_rng(0)
    make = lambda heads: rng.standard_normal((2, length, heads, 3)).astype(np.float32)
    return make(heads), make(kv_heads), make(kv_heads)


def by_formula(query, key, value, seen):
    """Softmax attention with `seen [batch, heads, queries, keys]`; rows that see nothing are left out by the caller."""
    key, value = (np.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    scores = np.where(seen, np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(3), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), value)


def groups(heads=4, length=LENGTH, group=GROUP):
    """Who sees whom: blocks, of the second half of the heads cut half a group later, and causal."""
    at = np.arange(length)
    blocks = [at // group] * (heads // 2) + [(at + group // 2) // group] * (heads // 2)
    return np.stack([(block[:, None] == block) & (at[:, None] >= at) for block in blocks])[None]


def by_rolling(query, key, value):
    """The authors' formulation, with the mask by which the first tokens don't see the last ones."""
    key, value = (np.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    roll = lambda x, by: np.concatenate([x[:, :, :2], np.roll(x[:, :, 2:], by, axis=1)], axis=2)
    query, key, value = (roll(x, -GROUP // 2) for x in (query, key, value))
    fold = lambda x: x.reshape(-1, GROUP, *x.shape[2:])
    at = np.stack([np.arange(LENGTH)] * 2 + [np.roll(np.arange(LENGTH), -GROUP // 2)] * 2)  # [heads, length]
    at = at.reshape(4, -1, GROUP).swapaxes(0, 1)
    seen = (at[..., :, None] >= at[..., None, :]) & np.tri(GROUP, dtype=bool)
    mixed = by_formula(*(fold(x) for x in (query, key, value)), np.tile(seen, (2, 1, 1, 1)))
    return roll(mixed.reshape(2, LENGTH, 4, 3), GROUP // 2)


@pytest.mark.once
def test_both_formulations_are_the_formula():
    found = models.s2_attention(*drawn(), group=GROUP)
    np.testing.assert_allclose(found, by_formula(*drawn(), groups()), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found, by_rolling(*drawn()), rtol=1e-5, atol=1e-5)


@pytest.mark.once
def test_no_token_sees_one_behind_it():
    query, key, value = drawn()
    for at in (1, 7, 14):
        later = np.arange(LENGTH) > at
        changed = [np.where(later[:, None, None], 9.0, x).astype(np.float32) for x in (key, value)]
        both = [models.s2_attention(query, *each, group=GROUP)[:, : at + 1] for each in ((key, value), changed)]
        np.testing.assert_array_equal(*both)


@pytest.mark.once
@pytest.mark.parametrize(("kv_heads", "length", "group"), [(1, 16, 4), (4, 13, 6), (2, 10, None)])
def test_heads_of_keys_and_lengths_that_groups_do_not_divide(kv_heads, length, group):
    arrays = drawn(kv_heads=kv_heads, length=length)
    found = models.s2_attention(*arrays, group=group)
    np.testing.assert_allclose(
        found, by_formula(*arrays, groups(length=length, group=group or 4)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.once
def test_segments_and_masks():
    segments = np.array([[1] * 7 + [2] * 6 + [0] * 3, [1] * 16])
    same = (segments[:, None, :, None] == segments[:, None, None, :]) & (segments != 0)[:, None, None, :]
    wanted = by_formula(*drawn(), np.where((segments == 0)[:, None, :, None], True, groups() & same))
    found = models.s2_attention(*drawn(), group=GROUP, segments=segments)
    np.testing.assert_allclose(found[segments != 0], wanted[segments != 0], rtol=1e-5, atol=1e-5)
    by_mask = models.s2_attention(*drawn(), mask=jnp.asarray(same), group=GROUP)
    np.testing.assert_allclose(by_mask[segments != 0], wanted[segments != 0], rtol=1e-5, atol=1e-5)


def test_flax_takes_it_as_its_attention():
    attention = functools.partial(models.s2_attention, group=GROUP)
    layer = nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=attention)
    plain = nn.MultiHeadDotProductAttention(num_heads=4)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, LENGTH, 8)), jnp.float32)
    params = plain.init(jax.random.key(0), x)
    found = layer.apply(params, x)
    np.testing.assert_allclose(found, plain.apply(params, x, mask=jnp.asarray(groups())), rtol=1e-5, atol=1e-5)
    assert not np.allclose(found, plain.apply(params, x, mask=nn.make_causal_mask(x[..., 0])), atol=1e-3)


@pytest.mark.once
def test_what_it_is_not_for_is_refused():
    query, key, value = drawn()
    for options, told in (
        ({"bias": jnp.zeros(())}, "takes no bias"),
        ({"dropout_rate": 0.1}, "has no dropout"),
        ({"group": 3}, "positive even number"),
    ):
        with pytest.raises(ValueError, match=told):
            models.s2_attention(query, key, value, **options)
    with pytest.raises(ValueError, match="is for training: 1 queries with 16 keys"):
        models.s2_attention(query[:, :1], key, value)
    with pytest.raises(ValueError, match="even number of heads"):
        models.s2_attention(query[:, :, :3], key[:, :, :1], value[:, :, :1])


@functools.cache
def loaded():
    model, params = models.load(models.STORIES260K)
    return model, params


def with_attention(model, **changes):
    return models.Llama(dataclasses.replace(model.config, **changes))


@pytest.mark.once
def test_the_model_with_one_group_is_that_of_full_attention_for_unshifted_heads_and_its_gradients_reach_everything():
    model, params = loaded()
    ids = np.random.default_rng(0).integers(3, 500, (2, 12)).astype(np.int32)
    s2 = with_attention(model, attention="s2", group=4)
    segments = np.array([[1] * 5 + [2] * 7, [1] * 8 + [0] * 4])
    spec = {
        r".*/(q|k|v|o)_proj/kernel": jlora.LoRA(2, init="gaussian"),
        r".*norm/scale": jlora.Full(),
        r".*embed_tokens/embedding": jlora.Full(),
    }
    sites = jlora.sites(lambda params, ids: s2.apply({"params": params}, ids), params, ids)
    adapted = jlora.adapterize(params, spec, sites=sites)

    def loss(trained):
        logits = jlora.lift(s2.apply)({"params": adapted.replace(params=trained)}, ids, segment_ids=segments)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    gradient = jax.jit(jax.grad(loss))(adapted.params)
    named = {"/".join(keys): leaf for keys, leaf in jlora.paths.flatten_with_keys(gradient)[0]}
    assert all(np.any(leaf != 0) for name, leaf in named.items() if not name.endswith("kernel/a"))
    # A group that holds each text whole is full attention, whatever half of the heads is shifted by: its first tokens are one.
    whole = with_attention(model, attention="s2", group=24).apply({"params": params}, ids)
    np.testing.assert_allclose(whole[:, :12], model.apply({"params": params}, ids), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match='attention "s2" is for training'):
        s2.apply({"params": params}, ids, cache=models.empty_cache(2, 12))
    for changes, told in (
        ({"attention": "s3"}, '"full" or "s2"'),
        ({"attention": "s2", "windows": (2,) * 5}, "windows"),
    ):
        with pytest.raises(ValueError, match=told):
            with_attention(model, **changes)


@pytest.mark.once
def test_memory_grows_with_the_group_and_not_with_the_square_of_the_length():
    """Compiled: what a layer's forward and backward pass needs beside its arguments."""

    def temporary(fn, length):
        shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        step = jax.jit(jax.grad(lambda *x: fn(*x).sum(), argnums=(0, 1, 2)))
        return step.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    full = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)
    s2 = functools.partial(models.s2_attention, group=256)
    assert temporary(full, 4096) > 12 * temporary(s2, 4096)
    assert temporary(s2, 8192) < 2.2 * temporary(s2, 4096)


@pytest.mark.once
def test_stretched_positions():
    model, params = loaded()
    longer = models.stretched(model, 3 * 512 - 1)
    assert longer.config.rope == RopeConfig("linear", model.config.rope.theta, 3.0, 1535)
    assert longer.config.max_position_embeddings == 1535 and longer.config.attention == "full"
    np.testing.assert_allclose(
        longer.config.rope.inverse_frequencies(8), model.config.rope.inverse_frequencies(8) / 3, rtol=1e-6
    )
    ids = np.arange(3, 9)[None]
    third = model.apply({"params": params}, ids, positions=np.arange(6)[None])
    far = longer.apply({"params": params}, ids, positions=3 * np.arange(6)[None])
    np.testing.assert_allclose(third, far, rtol=1e-4, atol=1e-4)
    yarn = models.stretched(model, 2048, "yarn", attention="s2").config
    hf = {"rope_theta": model.config.rope.theta, "max_position_embeddings": 2048}
    told = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert yarn.rope == RopeConfig.from_hf(hf | {"rope_scaling": told}) and yarn.attention == "s2"
    with pytest.raises(ValueError, match="reads 512 tokens as it is"):
        models.stretched(model, 512)
    with pytest.raises(ValueError, match="stretched already, by 'linear'"):
        models.stretched(longer, 4096)
    with pytest.raises(ValueError, match="rope_type must be one of"):
        models.stretched(model, 1024, "llama3")


@pytest.mark.once
@pytest.mark.parametrize(
    ("source", "rope_type"),
    [
        (models.STORIES260K, "linear"),
        (models.STORIES260K, "yarn"),
        (GOLDEN / "gemma2", "linear"),
        (GOLDEN / "mixtral", "yarn"),
        (GOLDEN / "phi3", "linear"),
        (GOLDEN / "phi3", "yarn"),
    ],
)
def test_a_stretched_model_is_saved_with_its_positions(source, rope_type, tmp_path):
    model, params = models.load(source)
    longer = models.stretched(model, 4 * model.config.max_position_embeddings, rope_type, attention="full")
    models.save(tmp_path / "longer", longer, params, source)
    again, _ = models.load(tmp_path / "longer")
    assert type(again) is type(longer) is type(model) and again.config == longer.config


@pytest.mark.once
@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
def test_a_stretched_phi3_turns_as_others_do_in_the_form_that_its_files_have(rope_type):
    model, llama = (models.load(source)[0] for source in (GOLDEN / "phi3", GOLDEN / "mistral_full"))
    plain = dataclasses.replace(llama.config, rope=model.config.rope, max_position_embeddings=64)
    wanted = models.stretched(llama.clone(config=plain), 200, rope_type).config.rope
    found = models.stretched(model, 200, rope_type).config.rope
    width = model.config.head_dim
    assert found.rope_type == "longrope" and found.attention_factor == wanted.attention_factor
    for length in (1, 200):
        np.testing.assert_allclose(
            found.inverse_frequencies(width, length), wanted.inverse_frequencies(width), rtol=1e-6
        )


@pytest.mark.once
def test_what_has_no_rotary_positions_or_several_is_not_stretched():
    with pytest.raises(TypeError, match="wanted a Llama or a family built on it, got a GPT2"):
        models.stretched(models.load(GOLDEN / "gpt2")[0], 4096)
    model, _ = models.load(GOLDEN / "gemma3")
    model = model.clone(config=dataclasses.replace(model.config, rope=RopeConfig()))
    with pytest.raises(ValueError, match="local layers turn by other positions"):
        models.stretched(model, 4096)
