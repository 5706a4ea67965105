"""Classifiers: head, pooling, padding, and files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models_data import GOLDEN, golden, quick_jit

import jlora.models as models

pytestmark = pytest.mark.once


def made(name: str):
    model, params = models.load(GOLDEN / name, drop_heads=True)
    return models.make_classifier(model, params, 3, jax.random.key(0))


@pytest.mark.parametrize("name", ["bert", "llama_yarn", "llama_linear_tied"])
def test_made_params_are_those_of_the_module(name):
    model, params = made(name)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 4), int))["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    assert set(params) == {"backbone", "classifier"}
    assert not {"pooler", "lm_head"} & set(params["backbone"])


@pytest.mark.parametrize("name", ["bert", "llama_yarn"])
def test_padding_on_either_side_changes_nothing(name):
    model, params = made(name)
    apply = quick_jit(model.apply)
    tokens = golden(name)["tokens"][:, :10]
    plain = apply({"params": params}, tokens)
    assert plain.shape == (2, 3)
    mask = np.pad(np.ones_like(tokens), ((0, 0), (0, 6)))
    right = apply({"params": params}, np.pad(tokens, ((0, 0), (0, 6))), mask)
    left = apply({"params": params}, np.pad(tokens, ((0, 0), (6, 0))), mask[:, ::-1])
    np.testing.assert_allclose(right, plain, atol=1e-5)
    np.testing.assert_allclose(left, plain, atol=1e-5)


def test_pooling_takes_the_mean_or_the_last_of_the_kept_tokens():
    hidden = jnp.arange(12.0).reshape(2, 3, 2)
    mask = jnp.array([[1, 1, 0], [0, 1, 1]])
    np.testing.assert_array_equal(models.mean_pool(hidden, mask), [[1, 2], [9, 10]])
    np.testing.assert_array_equal(models.last_pool(hidden, mask), [[2, 3], [10, 11]])


@pytest.mark.parametrize("name", ["bert_masked_lm", "llama_yarn"])
def test_a_saved_classifier_loads_again(name, tmp_path):
    model, params = made(name)
    models.save_classifier(tmp_path / "out", model, params, GOLDEN / name, ["no", "yes", "perhaps"])
    again, params_again, labels = models.load_classifier(tmp_path / "out")
    assert labels == ["no", "yes", "perhaps"]
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, params, params_again)


def test_bad_classifiers_are_named(tmp_path):
    model, params = models.load(GOLDEN / "bert")
    with pytest.raises(ValueError, match="num_labels: wanted 2 or more, got 1"):
        models.make_classifier(model, params, 1, jax.random.key(0))
    with pytest.raises(TypeError, match="model: wanted a Bert, a decoder or a ViT, got a Classifier"):
        models.make_classifier(made("bert")[0], params, 2, jax.random.key(0))
    with pytest.raises(ValueError, match="labels: wanted 3 names, got 2"):
        models.save_classifier(tmp_path / "out", *made("bert"), GOLDEN / "bert", ["no", "yes"])
    with pytest.raises(FileNotFoundError, match=r"classifier.json: no such file; the directory holds no classifier"):
        models.load_classifier(GOLDEN / "bert")


def test_a_head_that_does_not_fit_is_named(tmp_path):
    model, params = made("bert")
    models.save_classifier(tmp_path / "out", model, params, GOLDEN / "bert", ["no", "yes", "perhaps"])
    (tmp_path / "out" / "classifier.json").write_text('{"labels": ["no", "yes"], "pooling": "mean"}')
    with pytest.raises(ValueError, match=r"classifier.safetensors: wanted tensors .*\(2, 16\).* got .*\(3, 16\)"):
        models.load_classifier(tmp_path / "out")
