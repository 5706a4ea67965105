"""The number format of the base: that of its files unless another is asked for, and the job says what it takes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from models_data import GOLDEN, copy_of
from safetensors.numpy import load_file

from jlora.training.model.subject import load_subject, memory, number_formats
from jlora.training.settings.fields import Settings

TENSORS = load_file(GOLDEN / "llama_linear_tied" / "model.safetensors")


def stored_in(dtype, folder):
    return copy_of("llama_linear_tied", folder, add={name: tensor.astype(dtype) for name, tensor in TENSORS.items()})


@pytest.mark.parametrize(
    ("stored", "asked", "base", "computed", "words"),
    [
        (np.float32, None, "float32", "float32", "float32 (as in its files), 0.03 MB"),
        (ml_dtypes.bfloat16, None, "bfloat16", "bfloat16", "bfloat16 (as in its files), 0.01 MB"),
        (np.float16, None, "float16", "float32", "float16 (as in its files), 0.01 MB"),
        (np.float64, None, "float32", "float32", "float32 (its files hold float64), 0.03 MB"),
        (ml_dtypes.bfloat16, "float32", "float32", "float32", "float32 (its files hold bfloat16), 0.03 MB"),
        (np.float32, "bfloat16", "bfloat16", "bfloat16", "bfloat16 (its files hold float32), 0.01 MB"),
    ],
)
def test_the_base_stays_as_its_files_have_it_unless_asked_otherwise(stored, asked, base, computed, words, tmp_path):
    settings = Settings(model=str(stored_in(stored, tmp_path)), dtype=asked)
    subject = load_subject(settings, None, {"model_type": "llama"})
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(subject.params)} == {base}
    assert jnp.dtype(subject.model.config.dtype) == computed
    assert memory(subject, settings) == words


def test_files_of_several_formats_make_a_base_in_float32(tmp_path):
    norm = {"model.norm.weight": TENSORS["model.norm.weight"].astype(ml_dtypes.bfloat16)}
    settings = Settings(model=str(copy_of("llama_linear_tied", tmp_path, add=norm)))
    assert set(number_formats(settings).values()) == {jnp.dtype("float32")}
    assert memory(load_subject(settings, None, {}), settings).startswith("float32 (its files hold bfloat16, float32)")


def test_indices_in_older_files_have_no_say(tmp_path):
    add = {
        name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in load_file(GOLDEN / "bert/model.safetensors").items()
    }
    folder = copy_of("bert", tmp_path, add=add | {"embeddings.position_ids": np.arange(40)[None]})
    assert number_formats(Settings(model=str(folder)))["param_dtype"] == jnp.bfloat16
