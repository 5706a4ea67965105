"""Saved directories load again, and nothing half-written or overwritten is ever left."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models_data import GOLDEN, copy_of
from safetensors.numpy import load_file

import jlora.models as models

pytestmark = pytest.mark.once

# The name jlora.models.save is the function.
save_module = importlib.import_module("jlora.models.save")


@pytest.mark.parametrize(
    "name, scan_layers",
    [
        ("llama_llama3_biases", True),
        ("qwen3", False),
        ("bert", True),
        ("llama_headless", True),
        ("gpt2", True),
        ("mixtral", True),
        ("qwen3moe", False),
        ("gemma3", True),
    ],
)
def test_saving_what_was_loaded_gives_the_same_tensors(name, scan_layers, tmp_path):
    model, params = models.load(GOLDEN / name, scan_layers=scan_layers)
    models.save(tmp_path / "out", model, params, source=GOLDEN / name)
    before, after = (load_file(folder / "model.safetensors") for folder in (GOLDEN / name, tmp_path / "out"))
    assert sorted(before) == sorted(after)
    for tensor in before:
        np.testing.assert_array_equal(before[tensor], after[tensor])
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (GOLDEN / name / "config.json").read_text()
    )


def test_an_encoder_loaded_without_its_head_is_saved_as_an_encoder(tmp_path):
    model, params = models.load(GOLDEN / "bert_masked_lm", drop_heads=True)
    models.save(tmp_path / "out", model, params, source=GOLDEN / "bert_masked_lm")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["BertModel"]
    again, params_again = models.load(tmp_path / "out")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, params, params_again)


def test_a_large_model_is_cut_in_shards_that_load(tmp_path):
    model, params = models.load(models.STORIES260K)
    models.save(tmp_path / "out", model, params, source=models.STORIES260K, max_shard_bytes=300_000)
    shards = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert all((tmp_path / "out" / shard).stat().st_size < 310_000 for shard in shards)
    jax.tree.map(np.testing.assert_array_equal, params, models.load(tmp_path / "out")[1])
    assert (
        models.load_tokenizer(tmp_path / "out").encode("a").ids
        == models.load_tokenizer(models.STORIES260K).encode("a").ids
    )


def test_bfloat16_params_are_saved_as_such(tmp_path):
    model, params = models.load(GOLDEN / "qwen3")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    models.save(tmp_path / "out", model, half, source=GOLDEN / "qwen3")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    jax.tree.map(np.testing.assert_array_equal, half, models.load(tmp_path / "out")[1])


def test_a_directory_in_use_is_refused_and_left_alone(tmp_path):
    model, params = models.load(GOLDEN / "qwen3")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="already there and not empty; give another directory"):
        models.save(tmp_path, model, params, source=GOLDEN / "qwen3")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_directory_is_used(tmp_path):
    model, params = models.load(GOLDEN / "qwen3")
    (tmp_path / "out").mkdir()
    models.save(tmp_path / "out", model, params, source=GOLDEN / "qwen3")
    assert models.load(tmp_path / "out")[0] == model


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise save_module.SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(save_module, "save_file", full)
    model, params = models.load(GOLDEN / "qwen3")
    with pytest.raises(
        OSError, match=r"out: can't be written, and nothing was left there .*model.safetensors.*No space left"
    ):
        models.save(tmp_path / "out", model, params, source=GOLDEN / "qwen3")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p.pop("norm"), "params: leaf norm/scale is missing"),
        (
            lambda p: p.update(adapter={"a": np.zeros(2)}),
            "params: leaf adapter/a has no place in the model; merge adapters",
        ),
        (lambda p: p.update(norm={"scale": np.zeros(3)}), r"params: leaf norm/scale has shape \(3,\), wanted \(16,\)"),
    ],
)
def test_params_of_another_shape_are_refused(change, message, tmp_path):
    model, params = models.load(GOLDEN / "qwen3")
    params = dict(params)
    change(params)
    with pytest.raises(ValueError, match=message):
        models.save(tmp_path / "out", model, params, source=GOLDEN / "qwen3")
    assert list(tmp_path.iterdir()) == []


def test_the_source_of_another_model_is_refused(tmp_path):
    model, params = models.load(GOLDEN / "llama_yarn")
    other = copy_of("llama_yarn", tmp_path, rms_norm_eps=1e-6)
    with pytest.raises(ValueError, match="is another model's: rms_norm_eps is 1e-06, the model's is 1e-05"):
        models.save(tmp_path / "out", model, params, source=other)
    with pytest.raises(ValueError, match="holds a bert, the model is a Llama"):
        models.save(tmp_path / "out", model, params, source=GOLDEN / "bert")
    with pytest.raises(TypeError, match="model: wanted a model of jlora.models or its config, got a Classifier"):
        models.save(tmp_path / "out", models.Classifier(model, 2, "last"), params, source=GOLDEN / "llama_yarn")
