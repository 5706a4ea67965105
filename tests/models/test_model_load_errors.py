"""Every defect of a model directory gets one clear sentence that names tensor, file, wanted and got."""

import jax
import ml_dtypes
import numpy as np
import pytest
from models_data import GOLDEN, copy_of, shard
from safetensors.numpy import load_file, save_file

import jlora.models as models

pytestmark = pytest.mark.once

Q = "model.layers.1.self_attn.q_proj.weight"


def test_a_missing_tensor_is_named_with_its_leaf(tmp_path):
    folder = copy_of("qwen3", tmp_path, drop=(Q,))
    with pytest.raises(ValueError, match=f"{folder}: tensor '{Q}' .for layers/self_attn/q_proj/kernel. is missing"):
        models.load(folder)


def test_a_missing_embedding_is_named(tmp_path):
    folder = copy_of("bert", tmp_path, drop=("embeddings.word_embeddings.weight",))
    with pytest.raises(ValueError, match="tensor 'bert.embeddings.word_embeddings.weight' or 'embeddings.word_embedd"):
        models.load(folder)


def test_an_extra_tensor_is_named_with_its_file(tmp_path):
    folder = copy_of("qwen3", tmp_path, add={"model.layers.3.mlp.gate.weight": np.zeros((2, 2), np.float32)})
    message = "model.safetensors: tensor 'model.layers.3.mlp.gate.weight' has no place in the model of config.json"
    with pytest.raises(ValueError, match=message):
        models.load(folder)


def test_fewer_layers_in_the_config_than_in_the_file_is_an_error(tmp_path):
    folder = copy_of("llama_yarn", tmp_path, num_hidden_layers=2)
    with pytest.raises(ValueError, match="tensor 'model.layers.2.* and 8 more has no place"):
        models.load(folder)


def test_a_wrong_shape_names_tensor_file_wanted_and_got(tmp_path):
    folder = copy_of("qwen3", tmp_path, add={Q: np.zeros((16, 32), np.float32)})
    with pytest.raises(
        ValueError, match=r"model.safetensors: tensor 'model.layers.1.*' has shape \[16, 32\], wanted \[32, 16\]"
    ):
        models.load(folder)


def test_a_quantized_tensor_is_an_error(tmp_path):
    folder = copy_of("qwen3", tmp_path, add={Q: np.zeros((32, 16), np.int8)})
    with pytest.raises(ValueError, match=f"tensor '{Q}' has dtype I8, wanted one of F64, F32, F16, BF16"):
        models.load(folder)


def test_a_truncated_file_is_named(tmp_path):
    folder = copy_of("qwen3", tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{file}: not a whole safetensors file .*copy it again"):
        models.load(folder)


def test_a_directory_without_weights_says_what_it_wants(tmp_path):
    folder = copy_of("qwen3", tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor model.safetensors.index.json"):
        models.load(folder)


def test_shards_load_as_the_single_file_does(tmp_path):
    folder = copy_of("llama_llama3_biases", tmp_path)
    _, whole = models.load(folder)
    shard(folder)
    _, sharded = models.load(folder)
    jax.tree.map(np.testing.assert_array_equal, whole, sharded)


def test_a_missing_shard_is_named(tmp_path):
    shards = shard(copy_of("qwen3", tmp_path))
    shards[1].unlink()
    with pytest.raises(
        FileNotFoundError, match=f"{shards[1]}: this shard is named in model.safetensors.index.json but"
    ):
        models.load(tmp_path / "qwen3")


def test_a_shard_without_a_tensor_of_the_index_is_an_error(tmp_path):
    first, _ = shard(copy_of("qwen3", tmp_path))
    tensors = load_file(first)
    name = sorted(tensors)[0]
    tensors.pop(name)
    save_file(tensors, first)
    with pytest.raises(
        ValueError, match=f"index.json: says that tensor '{name}' is in {first.name}, but it is not there"
    ):
        models.load(tmp_path / "qwen3")


def test_a_shard_with_a_tensor_beyond_the_index_is_an_error(tmp_path):
    first, _ = shard(copy_of("qwen3", tmp_path))
    save_file(load_file(first) | {"another": np.zeros(2, np.float32)}, first)
    with pytest.raises(ValueError, match=f"{first}: tensor 'another' is not in model.safetensors.index.json"):
        models.load(tmp_path / "qwen3")


@pytest.mark.parametrize(
    "name, key",
    [("qwen3", "head_dim"), ("llama_yarn", "hidden_size"), ("bert", "layer_norm_eps"), ("roberta", "pad_token_id")],
)
def test_a_missing_config_key_is_named(name, key, tmp_path):
    folder = copy_of(name, tmp_path, **{key: None})
    with pytest.raises(ValueError, match=f"config.json: key '{key}' is missing"):
        models.load(folder)


def test_a_missing_rope_setting_is_named(tmp_path):
    folder = copy_of("llama_linear_tied", tmp_path, rope_parameters={"rope_type": "linear", "rope_theta": 1e4})
    with pytest.raises(ValueError, match="config.json: key 'factor' is missing in its rope settings"):
        models.load(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"model_type": "gpt_neox"},
            "model_type 'gpt_neox' is not supported; supported: llama, mistral, qwen2, qwen3, gemma, gem",
        ),
        (
            {"rope_parameters": {"rope_type": "ntk"}},
            "rope type 'ntk' is not supported; supported: default, linear",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor other than 1.0 is not supported"),
        ({"hidden_act": "swish7"}, "hidden_act 'swish7' is not supported; supported: gelu, gelu_new"),
        ({"quantization_config": {"bits": 4}}, "the checkpoint is quantized"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
    ],
)
def test_an_unsupported_config_is_named(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        models.load(copy_of("llama_yarn", tmp_path, **change))


def test_an_unsupported_encoder_is_named(tmp_path):
    with pytest.raises(ValueError, match="position_embedding_type 'relative_key' is not supported"):
        models.load(copy_of("bert", tmp_path, position_embedding_type="relative_key"))


def test_a_config_that_is_no_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not valid JSON"):
        models.load(tmp_path)


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere/config.json: no such file; a model is a Hugging Face directory"
    ):
        models.load(tmp_path / "nowhere")


def test_a_head_of_another_task_is_left_out_on_request_alone():
    with pytest.raises(ValueError, match=r"the tensors cls.predictions.bias, .* load with drop_heads=True"):
        models.load(GOLDEN / "bert_masked_lm")
    _, params = models.load(GOLDEN / "bert_masked_lm", drop_heads=True)
    assert set(params) == {"embeddings", "encoder"}


def test_listed_buffers_of_older_checkpoints_are_accepted(tmp_path):
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    assert models.load(copy_of("qwen3", tmp_path, add=buffers))
    assert models.load(copy_of("bert", tmp_path, add={"embeddings.position_ids": np.arange(40)[None]}))


def test_a_tied_head_in_the_file_must_equal_the_embedding(tmp_path):
    embedding = load_file(GOLDEN / "llama_linear_tied" / "model.safetensors")["model.embed_tokens.weight"]
    folder = copy_of("llama_linear_tied", tmp_path, add={"lm_head.weight": embedding})
    assert "lm_head" not in models.load(folder)[1]
    (tmp_path / "other").mkdir()
    folder = copy_of("llama_linear_tied", tmp_path / "other", add={"lm_head.weight": embedding + 1})
    with pytest.raises(ValueError, match="tensor 'lm_head.weight' differs from the embedding"):
        models.load(folder)


def test_older_names_of_norms_are_read(tmp_path):
    names = {
        "embeddings.LayerNorm.weight": "embeddings.LayerNorm.gamma",
        "embeddings.LayerNorm.bias": "embeddings.LayerNorm.beta",
    }
    tensors = load_file(GOLDEN / "bert" / "model.safetensors")
    renamed = {new: tensors[old] for old, new in names.items()}
    _, params = models.load(copy_of("bert", tmp_path, drop=tuple(names), add=renamed))
    np.testing.assert_array_equal(params["embeddings"]["LayerNorm"]["bias"], tensors["embeddings.LayerNorm.bias"])


def test_older_rope_settings_are_read_as_the_newer(tmp_path):
    newer, _ = models.load(GOLDEN / "llama_llama3_biases")
    scaling = {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    folder = copy_of("llama_llama3_biases", tmp_path, rope_parameters=None, rope_theta=10000.0, rope_scaling=scaling)
    assert models.load(folder)[0] == newer


def test_windows_by_settings_equal_windows_by_layer_types(tmp_path):
    by_types, _ = models.load(GOLDEN / "qwen2_window_tied")
    by_settings, _ = models.load(copy_of("qwen2_window_tied", tmp_path, layer_types=None))
    assert by_settings == by_types
    assert by_types.config.windows == (None, 5, 5)


def test_params_keep_the_dtype_of_the_file_unless_another_is_asked_for(tmp_path):
    tensors = load_file(GOLDEN / "qwen3" / "model.safetensors")
    half = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    folder = copy_of("qwen3", tmp_path, add=half)
    _, params = models.load(folder)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    np.testing.assert_array_equal(params["layers"]["self_attn"]["q_proj"]["kernel"][1], half[Q].T)
    _, params = models.load(folder, param_dtype=np.float32)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}


def test_layers_of_different_dtypes_can_be_stacked_only_on_request(tmp_path):
    folder = copy_of("qwen3", tmp_path, add={Q: np.zeros((32, 16), np.float16)})
    with pytest.raises(
        ValueError, match=r"have different dtypes .float16, float32. and can't be stacked; give param_dtype"
    ):
        models.load(folder)
    assert models.load(folder, param_dtype=np.float32)
    assert models.load(folder, scan_layers=False)
