"""Models agree with transformers, on small random configs of every architecture (`make_golden.py`)."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from models_data import GOLDEN, golden, quick_jit

import jlora.models as models
from jlora.models.config import read_config
from jlora.models.families import FAMILIES

EVERY = sorted(folder.name for folder in GOLDEN.iterdir())
CASES = [name for name in EVERY if not name.startswith("vit")]  # of texts; test_model_vit.py has the others
DECODERS = [name for name in CASES if not name.startswith(("bert", "roberta"))]


def run(name: str, **options) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The output of our model, zero at padding, and the expected arrays."""
    expected = golden(name)
    model, params = models.load(GOLDEN / name, drop_heads=True, **options)
    inputs = {"attention_mask": expected["mask"]}
    if "token_types" in expected:
        inputs["token_types"] = expected["token_types"]
    output = quick_jit(model.apply)({"params": params}, expected["tokens"], **inputs)
    assert output.dtype == jnp.float32
    return np.asarray(output) * expected["mask"][..., None], expected


@pytest.mark.once
def test_every_architecture_has_a_golden_model():
    kinds = {name.split("_")[0] for name in EVERY}
    named = {name.removesuffix("_text").replace("_", "") for name in FAMILIES}
    assert kinds == named


@pytest.mark.parametrize("name", CASES)
def test_output_agrees_with_transformers(name):
    output, expected = run(name)
    np.testing.assert_allclose(output, expected["output"] * expected["mask"][..., None], atol=1e-4, rtol=0)


@pytest.mark.once
@pytest.mark.parametrize("name", ["qwen2_window_tied", "roberta"])
def test_unrolled_layers_and_remat_give_the_same_output(name):
    output, _ = run(name)
    np.testing.assert_allclose(run(name, scan_layers=False)[0], output, atol=1e-5)
    np.testing.assert_allclose(run(name, remat=True)[0], output, atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize("name", ["qwen3", "bert"])
def test_bfloat16_computes_near_the_float32_output(name):
    output, expected = run(name, dtype=jnp.bfloat16)
    scale = np.abs(expected["output"]).mean()
    error = np.abs(output - expected["output"] * expected["mask"][..., None]).mean()
    assert 1e-4 * scale < error < 0.1 * scale


@pytest.mark.once
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_the_pooler_agrees_with_transformers(name):
    expected = golden(name)
    model, params = models.load(GOLDEN / name)
    apply = quick_jit(functools.partial(model.apply, return_pooled=True))
    inputs = {"attention_mask": expected["mask"], "token_types": expected["token_types"]}
    _, pooled = apply({"params": params}, expected["tokens"], **inputs)
    np.testing.assert_allclose(pooled, expected["pooled"], atol=1e-4)


@pytest.mark.once
def test_asking_for_a_pooler_that_is_not_there_says_so():
    model, params = models.load(GOLDEN / "bert_masked_lm", drop_heads=True)
    with pytest.raises(ValueError, match="return_pooled: this checkpoint has no pooler"):
        model.apply({"params": params}, jnp.ones((1, 4), int), return_pooled=True)


@pytest.mark.once
def test_a_text_longer_than_the_positions_says_so():
    model, params = models.load(GOLDEN / "roberta")
    with pytest.raises(ValueError, match="tokens: length 39 is more than the 38 positions of the model"):
        model.apply({"params": params}, jnp.ones((1, 39), int))


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gemma3", {"use_bidirectional_attention": True}, "'use_bidirectional_attention' is True .* not supported"),
        ("gemma3", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping is not supported with .*gemma3_text"),
        ("gemma2", {"layer_types": ["full_attention"]}, "'layer_types' has 1 entries, wanted one for each of 3 layers"),
        ("gpt2", {"add_cross_attention": True}, "'add_cross_attention' is True .* not supported"),
        (
            "qwen3moe",
            {"mlp_only_layers": [1]},
            r"mlp_only_layers \[1\] is not supported: every layer must have experts",
        ),
        ("qwen3moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2 is not supported"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok 5 is more than the 4 experts"),
        ("llama_yarn", {"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1.0 is not supported"),
        ("phi3", {"partial_rotary_factor": 0.8}, r"numbers of a head turn, wanted an even number"),
    ],
)
def test_what_a_config_asks_for_and_is_not_built_is_refused_by_name(name, change, message):
    hf = read_config(GOLDEN / name) | change
    if "partial_rotary_factor" in change:
        hf["rope_parameters"] = {**hf["rope_parameters"], **change}
    with pytest.raises(ValueError, match=message):
        FAMILIES[hf["model_type"]].config.from_hf(hf)


@pytest.mark.once
@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_the_head_alone_makes_logits_of_hidden_states(name):
    expected = golden(name)
    model, params = models.load(GOLDEN / name)
    hidden = model.apply({"params": params}, expected["tokens"], return_hidden=True)
    logits = model.apply({"params": params}, from_hidden=hidden)
    np.testing.assert_allclose(logits[0], expected["output"][0], atol=1e-4)
    with pytest.raises(ValueError, match="reads tokens, or hidden states by from_hidden; got both"):
        model.apply({"params": params}, expected["tokens"], from_hidden=hidden)
    with pytest.raises(ValueError, match="reads tokens, or hidden states by from_hidden; got neither"):
        model.apply({"params": params})


@pytest.mark.once
def test_a_text_longer_than_the_positions_of_gpt2_says_so():
    model, params = models.load(GOLDEN / "gpt2")
    with pytest.raises(ValueError, match="tokens: length 65 is more than the 64 positions of the model"):
        model.apply({"params": params}, jnp.ones((1, 65), int))
