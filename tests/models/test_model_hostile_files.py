"""Model directories by a stranger or from a failing disk: refused before anything is built, never read beyond their folder."""

import json
import os
import shutil
import sys

import ml_dtypes
import numpy as np
import pytest
from models_data import GOLDEN, copy_of, shard
from safetensors.numpy import save_file

import jlora.models as models
from jlora.models import finite
from jlora.models.checkpoint import Checkpoint

pytestmark = pytest.mark.once

Q = "model.layers.1.self_attn.q_proj.weight"
HEADER = GOLDEN / "qwen3" / "model.safetensors"


@pytest.fixture
def unbuilt(monkeypatch):
    """Nothing of the model may be built."""

    def build(*arguments):
        raise AssertionError("the model was built")

    monkeypatch.setattr(sys.modules["jlora.models.load"], "leaf_shapes", build)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(value, dtype, monkeypatch):
    monkeypatch.setattr(finite, "_BLOCK", 8)
    array = np.asarray([[-1.0, 0.0, 2.0**-14, 3e4]] * 8).astype(dtype)
    assert finite.all_finite(array)
    for place in ((0, 0), (3, 1), (7, 3)):
        changed = array.copy()
        changed[place] = value
        assert not finite.all_finite(changed)
        assert not finite.all_finite(changed.T)


def test_a_tensor_with_nan_or_infinity_is_named_with_its_file(tmp_path):
    tensor = np.zeros((32, 16), np.float32)
    tensor[3, 4], tensor[5, 6] = np.nan, -np.inf
    folder = copy_of("qwen3", tmp_path, add={Q: tensor})
    message = (
        f"{folder}/model.safetensors: tensor '{Q}' holds NaN or infinity in 2 of its 512 values; copy the file again"
    )
    with pytest.raises(ValueError, match=message):
        models.load(folder)
    _, params = models.load(folder, allow_nonfinite=True)
    np.testing.assert_array_equal(params["layers"]["self_attn"]["q_proj"]["kernel"][1], tensor.T)


def test_a_value_beyond_the_range_of_the_asked_dtype_is_named(tmp_path):
    folder = copy_of("qwen3", tmp_path, add={Q: np.full((32, 16), 1e5, np.float32)})
    with pytest.raises(
        ValueError, match=f"tensor '{Q}' holds values beyond the range of float16; give a wider param_dty"
    ):
        models.load(folder, param_dtype=np.float16)
    wide = copy_of("bert", tmp_path, add={"embeddings.LayerNorm.bias": np.full(16, 1e300)})
    with pytest.raises(ValueError, match="tensor 'embeddings.LayerNorm.bias' holds values beyond the range of float32"):
        models.load(wide)


def test_the_head_of_a_classifier_must_be_finite_too(tmp_path):
    folder = copy_of("bert", tmp_path)
    (folder / "classifier.json").write_text('{"labels": ["no", "yes"], "pooling": "mean"}')
    head = {"weight": np.zeros((2, 16), np.float32), "bias": np.array([0, np.nan], np.float32)}
    save_file(head, folder / "classifier.safetensors")
    with pytest.raises(ValueError, match=f"{folder}/classifier.safetensors: tensor 'bias' holds NaN or infinity"):
        models.load_classifier(folder)
    assert models.load_classifier(folder, allow_nonfinite=True)[2] == ["no", "yes"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "num_hidden_layers",
            10**7,
            "num_hidden_layers is 10000000, but the safetensors hold no tensor of layer 3, only",
        ),
        ("num_hidden_layers", 10**30, "'num_hidden_layers' must be a whole number from 1 to 2147483647, got 1000000"),
        (
            "vocab_size",
            2**31 - 1,
            r"'model.embed_tokens.weight' has shape \[60, 16\], wanted \[2147483647, 16\] by config",
        ),
        ("hidden_size", 2**31 - 1, r"has shape \[60, 16\], wanted \[60, 2147483647\] by config.json"),
        (
            "intermediate_size",
            2**31 - 1,
            r"gate_proj.weight' has shape \[24, 16\], wanted \[2147483647, 16\] by config",
        ),
        ("head_dim", 2**16, r"q_proj.weight' has shape \[32, 16\], wanted \[262144, 16\] by config.json"),
        ("head_dim", 2**30, "'head_dim' must be a whole number from 1 to 65536, got 1073741824"),
        (
            "num_attention_heads",
            2**30,
            r"q_proj.weight' has shape \[32, 16\], wanted \[8589934592, 16\] by config.json",
        ),
    ],
)
def test_absurd_sizes_are_refused_by_the_names_and_shapes_in_the_files(key, value, message, unbuilt, tmp_path):
    folder = copy_of("qwen3", tmp_path, **{key: value})
    with pytest.raises(ValueError, match=message) as caught:
        models.load(folder, scan_layers=False)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("key", ["max_position_embeddings", "type_vocab_size", "vocab_size"])
def test_absurd_sizes_of_an_encoder_are_refused_too(key, unbuilt, tmp_path):
    with pytest.raises(ValueError, match=r"wanted \[2147483647, 16\] by config.json"):
        models.load(copy_of("bert", tmp_path, **{key: 2**31 - 1}))


NO_SIZES = [0, -1, "16", 16.0, True, [16], {"a": 1}]


@pytest.mark.parametrize(
    ("name", "key", "values"),
    [
        *[("qwen3", key, NO_SIZES) for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
          "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")],
        *[("bert", key, NO_SIZES) for key in ("num_attention_heads", "type_vocab_size", "max_position_embeddings")],
        ("roberta", "pad_token_id", ["1", -1, 1.0, True, [1]]),
        ("mistral_window", "sliding_window", NO_SIZES),
        ("qwen2_window_tied", "max_window_layers", ["1", -1, 1.5, True]),
        ("qwen2_window_tied", "layer_types", ["sliding_attention", [1], ["chunked_attention"] * 3, {"a": 1}]),
        ("qwen2_window_tied", "use_sliding_window", ["false", 1]),
        ("qwen3", "tie_word_embeddings", ["false", 0, [True]]),
        ("qwen3", "attention_bias", ["no", 1]),
        ("qwen3", "rms_norm_eps", ["1e-5", 0, -1.0, True, float("nan"), float("inf"), 10**400, [1]]),
        ("bert", "layer_norm_eps", ["1e-5", 0, float("nan")]),
        ("qwen3", "hidden_act", [["silu"], {"a": 1}, 3]),
        ("qwen3", "architectures", ["Qwen3ForCausalLM", "", False, [None], {"a": 1}, 5]),
        ("qwen3", "model_type", [["qwen3"], {"a": 1}, 3, "", "swin"]),
        ("qwen3", "rope_parameters", [[1], "", False, "linear", {"full_attention": {"rope_type": "default"}},
          {"rope_type": ["linear"]}, {"rope_theta": "1e4"}, {"rope_theta": 0}, {"rope_theta": float("inf")},
          {"rope_type": "linear", "factor": 0}, {"rope_type": "linear", "factor": "2"},
          {"rope_type": "yarn", "factor": 2, "rope_theta": 1.0}, {"rope_type": "yarn", "factor": 2, "beta_fast": 0},
          {"rope_type": "yarn", "factor": 2, "mscale": "1", "mscale_all_dim": 1},
          {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": -4},
          {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}]),
        ("bert", "is_decoder", ["no", 1]),
    ],
)  # fmt: skip
def test_a_value_of_config_json_that_is_none_names_the_file_and_the_value(name, key, values, unbuilt, tmp_path):
    folder = copy_of(name, tmp_path, layer_types=None)
    settings = json.loads((folder / "config.json").read_text())
    for value in values:
        (folder / "config.json").write_text(json.dumps(settings | {key: value}))
        with pytest.raises(ValueError) as caught:
            models.load(folder)
        assert str(caught.value).startswith(f"{folder}/config.json: "), value


@pytest.mark.parametrize(
    "content",
    [
        "[" * 10**5,
        '{"a":' * 10**5,
        '{"a": ' + "[" * 70 + "]" * 70 + "}",
        "",
        "[]",
        "null",
        "\ufeff{}",
        '{"a": "\\ud800"}',
        '{"a": 1' + "0" * 5000 + "}",
    ],
)
def test_files_that_hold_no_json_object_are_named(content, tmp_path):
    folder = copy_of("qwen3", tmp_path)
    shard(folder)
    for name in ("model.safetensors.index.json", "config.json"):
        (folder / name).write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=f"^{folder}/{name}: (not valid JSON|wanted a JSON object)"):
            models.load(folder)


def test_a_file_of_settings_that_is_too_large_is_not_read(tmp_path):
    folder = copy_of("qwen3", tmp_path)
    os.truncate(folder / "config.json", 2**40)
    with pytest.raises(ValueError, match="config.json: 1099511627776 bytes are too many"):
        models.load(folder)


OUTSIDE = [
    "../other/model-00001-of-00002.safetensors", "/etc/passwd", "sub/../../other/a", "..\\other\\a", "C:\\a", "..", ".. ", "",
    "a\0b", None, 3, ["a"], {"a": 1}, True,
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_may_not_lead_out_of_its_folder(name, tmp_path):
    (tmp_path / "other").mkdir()
    shutil.copy(HEADER, tmp_path / "other" / "model-00001-of-00002.safetensors")
    folder = copy_of("qwen3", tmp_path)
    shard(folder)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {Q: name}}))
    with pytest.raises(
        ValueError, match=f"^{index}: says that tensor '{Q}' is in .*, wanted the name of a file in the same"
    ):
        models.load(folder)
    index.write_text(json.dumps({"weight_map": [weight_map]}))
    with pytest.raises(ValueError, match=f"^{index}: key 'weight_map' must be an object from tensors to files"):
        models.load(folder)


def test_shards_in_a_folder_of_the_model_are_read(tmp_path):
    folder = copy_of("qwen3", tmp_path)
    index = folder / "model.safetensors.index.json"
    (folder / "parts").mkdir()
    for part in shard(folder):
        part.rename(folder / "parts" / part.name)
    weight_map = {name: f"parts/{part}" for name, part in json.loads(index.read_text())["weight_map"].items()}
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert models.load(folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_link_out_of_the_folder_is_followed_on_request_alone(sharded, tmp_path):
    folder = copy_of("qwen3", tmp_path)
    file = shard(folder)[0] if sharded else folder / "model.safetensors"
    (tmp_path / "elsewhere").mkdir()
    file.rename(tmp_path / "elsewhere" / file.name)
    file.symlink_to(tmp_path / "elsewhere" / file.name)
    with pytest.raises(
        ValueError, match=f"^{file}: links to {tmp_path}/elsewhere/.*, outside of the model's directory"
    ):
        models.load(folder)
    assert models.load(folder, follow_links=True)


def test_a_linked_folder_and_a_link_within_it_are_read(tmp_path):
    folder = copy_of("qwen3", tmp_path)
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(folder)
    assert models.load(tmp_path / "link")


def test_the_cache_of_the_hub_is_read_and_links_out_of_it_are_not(tmp_path):
    shard(copy_of("qwen3", tmp_path))
    repository = tmp_path / "hub" / "models--org--qwen3"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted((tmp_path / "qwen3").iterdir())):
        file.rename(repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert models.load(snapshot)
    (tmp_path / "link").symlink_to(snapshot)
    assert models.load(tmp_path / "link")
    other = tmp_path / "hub" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    first = snapshot / "model-00001-of-00002.safetensors"
    shutil.move(first.resolve(), other / "0")
    first.unlink()
    first.symlink_to("../../../models--org--other/blobs/0")
    with pytest.raises(ValueError, match=f"^{first}: links to {other}/0, outside of the model's directory"):
        models.load(snapshot)


@pytest.mark.parametrize("kind", ["swin", "phi", "gemma3"])
def test_the_type_of_the_model_is_looked_at_first(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "quantization_config": {"bits": 4}}))
    with pytest.raises(ValueError) as caught:
        models.load(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/config.json: model_type '{kind}' is not supported; supported: llama, mistral, qwen2, qwen3, gemma, "
        "gemma2, gemma3_text, phi3, gpt2, mixtral, qwen3_moe, bert, roberta, vit; for any other model "
        "bring its JAX function, which jlora adapts whatever it is (docs/frameworks.md)."
    )
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json: model_type is missing; supported: llama"):
        models.load(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["org/Some-Model_1.5B", "https://huggingface.co/org/Some-Model_1.5B/", "https:/huggingface.co/org/Some-Model_1.5B"],
)
def test_a_name_of_the_hub_says_how_to_download_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        models.load(name)
    assert "`hf download org/Some-Model_1.5B --local-dir Some-Model_1.5B`" in str(caught.value)
    assert "snapshot_download('org/Some-Model_1.5B', local_dir='Some-Model_1.5B')" in str(caught.value)
    (tmp_path / "org" / "Some-Model_1.5B").mkdir(parents=True)
    if name.startswith("org"):  # a folder of that name is a folder
        with pytest.raises(FileNotFoundError, match="a model is a Hugging Face directory with a config.json"):
            models.load(name)


def test_a_file_or_an_adapter_in_the_place_of_a_model_is_told_apart(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="model.safetensors is a file, wanted the directory of a Hugging Face model"
    ):
        models.load(HEADER)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match="config.json: no such file; the directory holds an adapter of PEFT, not a"
    ):
        models.load(tmp_path)


def test_links_in_a_circle_are_no_directory(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/a: neither model.safetensors nor"):
        Checkpoint(tmp_path / "a")
