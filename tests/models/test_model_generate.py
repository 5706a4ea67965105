"""Generation: the cached program writes what the model says, for prompts of any length."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models_data import GOLDEN, quick_jit

import jlora
import jlora.models as models
from jlora.models.generate import Sampling

PROMPTS = [[5], [7, 9, 30, 12, 8, 44, 3, 21, 10], [11, 50]]


@functools.cache
def loaded():
    return models.load(GOLDEN / "mistral_window")


@functools.cache
def compiled():
    return quick_jit(loaded()[0].apply)


def write(prompts=PROMPTS, max_new_tokens=12, **settings):
    model, params = loaded()
    return models.generate(model.apply, params, prompts, max_new_tokens=max_new_tokens, **settings)


def greedy_without_cache(prompt: list[int], steps: int) -> list[int]:
    # What follows a token has no say in its logits, so one shape serves all lengths.
    tokens = np.zeros((1, 24), np.int32)
    tokens[0, : len(prompt)] = prompt
    for at in range(len(prompt), len(prompt) + steps):
        tokens[0, at] = np.argmax(compiled()({"params": loaded()[1]}, tokens)[0, at - 1])
    return tokens[0, len(prompt) : len(prompt) + steps].tolist()


def test_greedy_rows_of_different_lengths_equal_the_model_without_a_cache():
    assert write() == [greedy_without_cache(prompt, 12) for prompt in PROMPTS]


@pytest.mark.once
def test_a_row_ends_before_its_end_token():
    free = write()
    end = free[1][4]
    wanted = [row[: row.index(end)] if end in row else row for row in free]
    assert write(eos_id=end) == wanted
    assert len(wanted[1]) <= 4


@pytest.mark.once
def test_the_same_key_draws_the_same_and_another_key_another_text():
    draw = functools.partial(write, temperature=1.5)
    first = draw(key=jax.random.key(0))
    assert draw(key=jax.random.key(0)) == first
    assert draw(key=jax.random.key(1)) != first


@pytest.mark.once
def test_every_token_is_drawn_by_a_key_of_its_own():
    def apply(variables, tokens, attention_mask=None, cache=None):
        return jnp.zeros((*tokens.shape, 1000)), cache

    key = jax.random.key(3)
    written = models.generate(apply, {}, [[5], [6]], max_new_tokens=8, temperature=1.0, key=key)
    wanted = [jax.random.categorical(jax.random.fold_in(key, step), jnp.zeros((2, 1000))) for step in range(8)]
    assert written == np.stack(wanted, axis=1).tolist()
    assert len(set(written[0] + written[1])) > 12


@pytest.mark.once
def test_top_k_of_one_is_greedy():
    assert write(temperature=1.0, top_k=1, key=jax.random.key(0)) == write()


def test_a_lifted_function_on_adapted_params_writes_what_the_merged_model_writes():
    model, params = loaded()
    spec = {r".*_proj/kernel": jlora.LoRA(rank=2, alpha=8)}
    sites = jlora.sites(lambda p: model.apply({"params": p}, jnp.ones((1, 4), int)), params)
    adapted = jlora.adapterize(params, spec, key=jax.random.key(0), sites=sites)
    adapted = adapted.replace(params=jax.tree.map(lambda leaf: leaf + 0.3, adapted.params))
    settings = {"max_new_tokens": 12, "temperature": 0.7, "key": jax.random.key(2)}
    written = models.generate(jlora.lift(model.apply, strict=True), adapted, PROMPTS, **settings)
    assert written == models.generate(model.apply, jlora.merge(adapted), PROMPTS, **settings)
    assert written != models.generate(model.apply, params, PROMPTS, **settings)


@pytest.mark.once
def test_the_temperature_divides_the_logits():
    key, logits = jax.random.key(0), np.random.default_rng(1).standard_normal((64, 9)).astype(np.float32)
    drawn = Sampling(temperature=0.25, top_k=None, top_p=None).choose(logits, key)
    assert drawn.tolist() == jax.random.categorical(key, logits / 0.25).tolist()
    assert drawn.tolist() != jax.random.categorical(key, logits).tolist()


@pytest.mark.once
def test_draws_stay_in_the_top_k_and_the_nucleus():
    logits = np.log(np.float32([[0.1, 0.4, 0.05, 0.3, 0.15]]))
    keys = jax.random.split(jax.random.key(0), 200)

    def drawn(**settings):
        choose = Sampling(**{"temperature": 1.0, "top_k": None, "top_p": None} | settings).choose
        return set(quick_jit(jax.vmap(lambda key: choose(logits, key)[0]))(keys).tolist())

    assert drawn() == {0, 1, 2, 3, 4}
    assert drawn(top_k=2) == {1, 3}
    assert drawn(top_p=0.5) == {1, 3}
    assert drawn(top_p=0.75) == {1, 3, 4}
    assert drawn(top_p=1e-6) == {1}
    assert drawn(temperature=0.0) == {1}


@pytest.mark.once
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens: wanted 1 or more, got 0"),
        ({"temperature": -1.0}, "temperature: wanted 0 or more, got -1.0"),
        ({"temperature": 1.2e-38}, "temperature: wanted 0 or a number from 2.-100 and below 2.127, got 1.2e-38"),
        ({"temperature": 1.0}, "key: a temperature above 0 draws at random; give a key"),
        ({"top_k": 0}, "top_k: wanted 1 or more"),
        ({"top_p": 1.5}, "top_p: wanted a number above 0 and at most 1"),
        ({"prompts": [[1], []]}, "prompt_tokens: every prompt wants at least one token"),
        ({"prompts": []}, "prompt_tokens: every prompt wants at least one token"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        write(**settings)


@pytest.mark.once
def test_a_stream_yields_what_is_generated_whatever_its_chunks():
    model, params = loaded()
    prompt, given = PROMPTS[1], {"temperature": 1.5, "top_k": 30, "key": jax.random.key(4)}
    wanted = write([prompt], **given)[0]
    # The one that ends it is the second of them.
    ends = [wanted[9], wanted[7]]
    cut = wanted.index(ends[1])
    assert cut < wanted.index(ends[0])
    assert write([prompt], eos_id=ends, **given)[0] == wanted[:cut]
    for chunk in (1, 5):
        found = models.stream(model.apply, params, prompt, max_new_tokens=12, chunk=chunk, eos_id=ends, **given)
        assert list(found) == wanted[:cut]


@pytest.mark.once
def test_a_stream_refuses_what_can_not_be_before_it_begins():
    with pytest.raises(ValueError, match="chunk: wanted 1 or more, got 0"):
        models.stream(None, None, [1], max_new_tokens=1, chunk=0)
    with pytest.raises(ValueError, match="key: a temperature above 0"):
        models.stream(None, None, [1], max_new_tokens=1, temperature=1.0)


@pytest.mark.once
@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (None, {}),
        ({"eos_token_id": 2}, {"ends": (2,)}),
        ({"eos_token_id": [2, 7], "stop_strings": "END"}, {"ends": (2, 7), "stop": ("END",)}),
        ({"do_sample": False, "temperature": 0.3}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}),
        ({"do_sample": True, "temperature": 0.6, "top_k": 0, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        ({"repetition_penalty": 1.1, "num_beams": 1}, {"unknown": ("repetition_penalty=1.1",)}),
    ],
)
def test_how_a_model_is_sampled_is_read_as_transformers_understands_it(content, wanted, tmp_path):
    if content is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert models.read_generation_config(tmp_path) == models.GenerationConfig(**wanted)


@pytest.mark.once
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id must be the id of a token"),
        ({"stop_strings": [""]}, "stop_strings must be a text"),
        ({"do_sample": True, "top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"do_sample": True, "temperature": "hot"}, "temperature must be a number from 2"),
        ({"do_sample": True, "temperature": 1e-39}, "temperature must be a number from 2"),
    ],
)
def test_a_generation_config_that_has_no_meaning_is_named(content, message, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        models.read_generation_config(tmp_path)
