"""Checkpoints of bitsandbytes are read and written byte for byte, and never decoded on the way."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models_data import GOLDEN
from safetensors.numpy import load_file, save_file

import jlora
import jlora.models as models
from jlora.models.load import stored_dtypes
from jlora.stored import FP4, NF3, NF4, Int8

pytestmark = pytest.mark.once

FOLDER = GOLDEN.parent / "checkpoints_of_bitsandbytes"
CODES = {
    "nf4_double": NF4(double=True),
    "nf4": NF4(),
    "nf4_stored_as_bfloat16": NF4(),
    "fp4": FP4(),
    "int8": Int8(),
}
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("name", CODES)
def test_logits_are_those_of_the_weights_that_bitsandbytes_decodes(name):
    model, params = models.load(FOLDER / name)
    kept = {leaf.code for leaf in jlora.paths.leaves(params) if isinstance(leaf, jlora.Stored)}
    assert kept == {CODES[name]}
    with np.load(FOLDER / name / "expected.npz") as expected:
        logits = jax.jit(jlora.lift(model.apply))({"params": params}, expected["tokens"])
        np.testing.assert_allclose(logits, expected["logits"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["nf4_double", "nf4", "fp4", "int8"])
def test_what_was_read_is_written_with_the_same_bytes(name, tmp_path):
    model, params = models.load(FOLDER / name, scan_layers=name != "nf4")
    models.save(tmp_path / "out", model, params, FOLDER / name, format="bitsandbytes")
    before, after = (load_file(folder / "model.safetensors") for folder in (FOLDER / name, tmp_path / "out"))
    assert sorted(before) == sorted(after)
    for tensor, array in before.items():
        assert (array.dtype, array.shape) == (after[tensor].dtype, after[tensor].shape), tensor
        assert array.tobytes() == after[tensor].tobytes(), tensor
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (FOLDER / name, tmp_path / "out"))
    # The default, which is what transformers takes for the head, in words.
    assert old["quantization_config"] | {"llm_int8_skip_modules": ["lm_head"]} == new["quantization_config"]
    assert old | {"quantization_config": None} == new | {"quantization_config": None}


def test_bytes_that_are_stored_in_another_dtype_are_the_same():
    wanted, got = (models.load(FOLDER / name)[1] for name in ("nf4_double", "nf4_stored_as_bfloat16"))
    codes = [params["layers"]["mlp"]["down_proj"]["kernel"].fields["codes"] for params in (wanted, got)]
    np.testing.assert_array_equal(*codes)


def test_the_dtype_is_that_of_what_was_quantized():
    assert {str(dtype) for dtype in stored_dtypes(FOLDER / "nf4_double")} == {"bfloat16"}
    assert {str(dtype) for dtype in stored_dtypes(FOLDER / "int8")} == {"float16"}
    leaf = models.load(FOLDER / "fp4", param_dtype=jnp.float32)[1]["layers"]["mlp"]["up_proj"]["kernel"]
    assert (leaf.shape, leaf.dtype) == ((2, 64, 128), jnp.float32)


def test_a_plain_model_is_written_as_bitsandbytes_writes_it(tmp_path):
    """In shards; and layers that are not quantized are named in the config, since transformers would take them for such."""
    spec = {r".*/down_proj/kernel": None, jlora.ALL_LINEAR: NF4(double=True)}
    model, params = models.load(models.STORIES260K, quantize=spec)
    options = {"format": "bitsandbytes", "max_shard_bytes": 60_000}
    models.save(tmp_path / "out", model, params, models.STORIES260K, **options)
    # Five plain kernels of 44 KB; in float the others would make 9 files more.
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 8
    jax.tree.map(np.testing.assert_array_equal, params, models.load(tmp_path / "out")[1])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == [*(f"model.layers.{i}.mlp.down_proj" for i in range(5)), "lm_head"]
    assert (config["load_in_4bit"], config["bnb_4bit_use_double_quant"]) == (True, True)


@pytest.mark.parametrize(
    "spec, message",
    [
        (
            {r"layers/mlp/up_proj/kernel": NF3(32)},
            "mlp/up_proj/kernel is kept as NF3.* in a form that bitsandbytes has not",
        ),
        (
            {r".*/up_proj/kernel": NF4(), r".*/gate_proj/kernel": Int8()},
            "has one code, got Int8.*gate_proj.*, NF4.*up_proj",
        ),
        ({r".*/up_proj/kernel": jlora.Axes("batch out in", Int8())}, "in a form that bitsandbytes has not"),
    ],
)
def test_what_bitsandbytes_has_no_form_for_is_refused(spec, message, tmp_path):
    model, params = models.load(models.STORIES260K, quantize=spec)
    with pytest.raises(ValueError, match=message):
        models.save(tmp_path / "out", model, params, models.STORIES260K, format="bitsandbytes")
    with pytest.raises(ValueError, match="format: wanted None or 'bitsandbytes', got 'gguf'"):
        models.save(tmp_path / "out", model, params, models.STORIES260K, format="gguf")
    assert not (tmp_path / "out").exists()


def changed(tmp_path, name="nf4_double", **tensors):
    """A copy of a model with tensors of one weight changed (None: removed), by the end of their names."""
    folder = tmp_path / "changed"
    shutil.copytree(FOLDER / name, folder)
    kept = load_file(folder / "model.safetensors")
    for end, value in tensors.items():
        place = UP + (
            "" if end == "weight" else f".{end.replace('__', '.', 1) if end.startswith('quant_state') else end}"
        )
        place = UP.removesuffix(".weight") + ".SCB" if end == "SCB" else place
        del kept[place]
        if value is not None:
            kept[place] = value
    save_file(kept, folder / "model.safetensors")
    return folder


def state(**changes):
    told = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 64]}
    told |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5, **changes}
    return {"quant_state__bitsandbytes__nf4": np.frombuffer(json.dumps(told).encode(), np.uint8)}


@pytest.mark.parametrize(
    "tensors, message",
    [
        (state(shape=[128, 63]), "blocks of 64 run over the ends of its rows of 63"),
        (state(shape=[64, 64]), "has 4096 bytes, and its shape wants 2048"),
        (state(shape=[128, 64, 1]), "is not that of a matrix"),
        (state(blocksize=48), "block must be one of"),
        (state(dtype="int8"), "dtype 'int8' .* is none of"),
        (state(nested_blocksize=128), "second level has blocks of 128"),
        (state(nested_offset=None), "around None"),
        ({"quant_state__bitsandbytes__nf4": np.frombuffer(b"[1]", np.uint8)}, "is not as bitsandbytes keeps it"),
        ({"absmax": None}, "absmax' is missing"),
        ({"absmax": np.ones(128, np.float32)}, r"absmax' is F32 \[128\], wanted U8 \[128\]"),
        ({"quant_map": np.linspace(-1, 1, 16, dtype=np.float32)}, "quant_map' holds other levels"),
        ({"nested_quant_map": np.zeros(256, np.float32)}, "nested_quant_map' holds other levels"),
        ({"nested_absmax": np.array([np.nan], np.float32)}, "has nested_scales that are not finite"),
    ],
)
def test_a_damaged_weight_is_refused_by_name(tensors, message, tmp_path):
    with pytest.raises(ValueError, match=f"{UP}.*{message}"):
        models.load(changed(tmp_path, **tensors))


def test_damaged_scales_of_int8_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"up_proj.SCB' is F32 \[4\], wanted F32 \[128\]"):
        models.load(changed(tmp_path, "int8", SCB=np.ones(4, np.float32)))


def test_layers_in_different_forms_are_not_stacked(tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(FOLDER / "nf4", folder)
    kept = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in kept.items() if not name.startswith(UP)} | {
        UP: np.ones((128, 64), np.float32)
    }
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"kept in different forms \(NF4\(\), plain\).*load with scan_layers=False"):
        models.load(folder)
    params = models.load(folder, scan_layers=False)[1]
    assert isinstance(params["layers_0"]["mlp"]["up_proj"]["kernel"], jlora.Stored)
    assert not isinstance(params["layers_1"]["mlp"]["up_proj"]["kernel"], jlora.Stored)


def test_a_quantized_model_is_not_quantized_again():
    with pytest.raises(ValueError, match="quantized already, so that they can't be by quantize"):
        models.load(FOLDER / "nf4", quantize="int8")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_other_quantizations_are_refused_by_name(method, tmp_path):
    settings = json.loads((GOLDEN / "qwen3" / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"quantized by '{method}'.*, wanted plain weights or those of bitsandbytes"):
        models.load(tmp_path)
