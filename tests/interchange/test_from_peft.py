"""Adapters that PEFT 0.21 made: they come in, compute what PEFT computes, and go out as they came."""

import jax
import numpy as np
import peft_cases
import pytest
from safetensors.numpy import load_file

import jlora

pytestmark = pytest.mark.once

# What PEFT stores in a form that jlora holds otherwise, so that it goes out as another, equal adapter.
REWRITTEN = {"lora_bias", "olora", "pissa", "gpt2", "experts", "experts_transposed", "adalora_pruned"}


@pytest.mark.parametrize("case", peft_cases.cases())
def test_an_adapter_of_peft_computes_what_peft_computes(case):
    function, params, names, x, y = peft_cases.load_case(case)
    adapted = jlora.load_peft(peft_cases.FOLDER / case, params, names)
    assert adapted.base is params
    np.testing.assert_allclose(jlora.lift(function, strict=True)(adapted, x), y, rtol=1e-5, atol=1e-5)
    assert not np.allclose(function(params, x), y, atol=1e-2)
    np.testing.assert_allclose(function(jlora.merge(adapted), x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", sorted(set(peft_cases.cases()) - REWRITTEN))
def test_an_adapter_of_peft_goes_out_with_the_same_bytes(case, tmp_path):
    _, params, names, _, _ = peft_cases.load_case(case)
    adapted = jlora.load_peft(peft_cases.FOLDER / case, params, names)
    jlora.save_peft(tmp_path / "out", adapted, names)
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (peft_cases.FOLDER / case, tmp_path / "out")
    )
    assert sorted(before) == sorted(after)
    for key, tensor in before.items():
        assert tensor.tobytes() == after[key].tobytes() and tensor.shape == after[key].shape, key
    ours, theirs = peft_cases.config_of(tmp_path / "out"), peft_cases.config_of(peft_cases.FOLDER / case)
    assert ours["peft_type"] == theirs["peft_type"]
    assert {key for key in ours if key not in theirs} <= {"inference_mode"}


@pytest.mark.parametrize("case", sorted(REWRITTEN))
def test_what_jlora_holds_otherwise_goes_out_and_comes_back_as_the_same_function(case, tmp_path):
    function, params, names, x, y = peft_cases.load_case(case)
    adapted = jlora.load_peft(peft_cases.FOLDER / case, params, names)
    jlora.save_peft(tmp_path / "out", adapted, names)
    again = jlora.load_peft(tmp_path / "out", params, names)
    assert again.plan == adapted.plan
    jax.tree.map(np.testing.assert_array_equal, (again.params, again.frozen), (adapted.params, adapted.frozen))
    (tmp_path / "out" / "jlora_manifest.json").unlink()
    np.testing.assert_allclose(
        jlora.lift(function)(jlora.load_peft(tmp_path / "out", params, names), x), y, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("case", ["linear", "dora", "conv2d", "experts", "adalora", "vera", "shira", "tokens"])
def test_an_imported_adapter_trains_and_only_its_arrays_get_gradients(case):
    function, params, names, x, _ = peft_cases.load_case(case)
    adapted = jlora.load_peft(peft_cases.FOLDER / case, params, names)
    lifted = jlora.lift(function)
    gradients = jax.grad(lambda p: (lifted(adapted.replace(params=p), x) ** 2).sum())(adapted.params)
    assert jax.tree.structure(gradients) == jax.tree.structure(adapted.params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("case", peft_cases.cases())
def test_on_shapes_an_adapter_is_the_shapes_of_what_it_is_on_values(case):
    _, params, names, _, _ = peft_cases.load_case(case)
    adapted = jlora.load_peft(peft_cases.FOLDER / case, params, names)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    found = jlora.load_peft(peft_cases.FOLDER / case, shapes, names)
    assert found.plan == adapted.plan and found.base is shapes
    told = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (each.params, each.frozen)) for each in (found, adapted)
    ]
    assert told[0] == told[1]
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((found.params, found.frozen)))
