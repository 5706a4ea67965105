"""Vision Transformers: what transformers computes of images, saved again, adapted, and refused by name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from models_data import GOLDEN, copy_of, golden, quick_jit
from safetensors.numpy import load_file

import jlora
import jlora.models as models
from jlora.interchange.leaves.names import resolve
from jlora.training.model.subject import open_codec
from jlora.training.settings.fields import Settings

LINEAR = {f"attention/{name}_proj" for name in "qkvo"} | {"mlp/fc1", "mlp/fc2"}
LORA = jlora.LoRA(rank=2, alpha=8)


@functools.cache
def loaded(name, **options):
    return models.load(GOLDEN / name, **options)


def moved(adapted):
    return adapted.replace(params=jax.tree.map(lambda leaf: leaf + 0.1, adapted.params))


@functools.cache
def adapted_of(name, *patterns, **options):
    model, params = loaded(name, **options)
    sites = jlora.sites(lambda p: model.apply({"params": p}, golden(name)["images"]), params)
    return model, jlora.adapterize(params, dict.fromkeys(patterns, LORA), sites=sites)


@pytest.mark.parametrize("name, scan_layers", [("vit", True), ("vit", False), ("vit_pooled", True)])
def test_output_agrees_with_transformers(name, scan_layers):
    model, params = loaded(name, scan_layers=scan_layers)
    output = quick_jit(model.apply)({"params": params}, golden(name)["images"])
    assert output.dtype == jnp.float32
    np.testing.assert_allclose(output, golden(name)["output"], atol=1e-4, rtol=0)


@pytest.mark.once
def test_hidden_states_and_the_pooler_agree_with_transformers():
    model, params = loaded("vit_pooled")
    apply = quick_jit(functools.partial(model.apply, return_pooled=True))
    hidden, pooled = apply({"params": params}, golden("vit_pooled")["images"])
    np.testing.assert_allclose(hidden, golden("vit_pooled")["hidden"], atol=1e-4)
    np.testing.assert_allclose(pooled, golden("vit_pooled")["pooled"], atol=1e-4)
    model, params = loaded("vit")
    images = golden("vit")["images"]
    hidden = model.apply({"params": params}, images, return_hidden=True)
    np.testing.assert_allclose(hidden, golden("vit")["hidden"], atol=1e-4)
    with pytest.raises(ValueError, match="return_pooled: this checkpoint has no pooler; take the first of the hidden"):
        model.apply({"params": params}, images, return_pooled=True)


@pytest.mark.once
def test_without_its_head_it_gives_hidden_states_and_is_saved_as_a_backbone(tmp_path):
    model, params = models.load(GOLDEN / "vit", drop_heads=True)
    assert "classifier" not in params
    np.testing.assert_allclose(
        quick_jit(model.apply)({"params": params}, golden("vit")["images"]), golden("vit")["hidden"], atol=1e-4
    )
    models.save(tmp_path / "out", model, params, GOLDEN / "vit")
    assert models.load(tmp_path / "out")[0] == model
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if name.startswith("vit.")]


@pytest.mark.once
@pytest.mark.parametrize("name, scan_layers", [("vit", True), ("vit", False), ("vit_pooled", True)])
def test_saving_what_was_loaded_gives_the_same_tensors(name, scan_layers, tmp_path):
    model, params = loaded(name, scan_layers=scan_layers)
    models.save(tmp_path / "out", model, params, source=GOLDEN / name)
    before, after = (load_file(folder / "model.safetensors") for folder in (GOLDEN / name, tmp_path / "out"))
    assert sorted(before) == sorted(after)
    for tensor in before:
        np.testing.assert_array_equal(before[tensor], after[tensor])
    assert (tmp_path / "out" / "config.json").read_text().split() == (GOLDEN / name / "config.json").read_text().split()


@pytest.mark.once
def test_a_new_head_for_other_classes_is_saved_with_their_number(tmp_path):
    model, params = models.make_classifier(*loaded("vit_pooled"), 3, jax.random.key(0))
    assert params["classifier"]["kernel"].shape == (16, 3) and "pooler" not in params
    assert quick_jit(model.apply)({"params": params}, golden("vit_pooled")["images"]).shape == (2, 3)
    models.save(tmp_path / "out", model, params, GOLDEN / "vit_pooled")
    again, params_again = models.load(tmp_path / "out")
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, params, params_again)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_all_linear_is_every_projection_but_neither_patches_nor_head(scan_layers):
    _, adapted = adapted_of("vit", jlora.ALL_LINEAR, scan_layers=scan_layers)
    stacks = ["layers"] if scan_layers else ["layers_0", "layers_1"]
    found = {"/".join(path[:-1]) for path in flatten_dict(adapted.params)}
    assert found == {f"{stack}/{layer}/kernel" for stack in stacks for layer in LINEAR}


def test_the_lifted_model_with_adapted_patches_equals_the_merged_model_under_remat():
    model, adapted = adapted_of("vit", jlora.ALL_LINEAR, ".*/projection/kernel", remat=True)
    adapted, images = moved(adapted), golden("vit")["images"]
    lifted = quick_jit(jlora.lift(model.apply, strict=True))({"params": adapted}, images)
    merged = quick_jit(model.apply)({"params": jlora.merge(adapted)}, images)
    np.testing.assert_allclose(lifted, merged, atol=1e-4)
    assert np.abs(lifted - golden("vit")["output"]).max() > 0.1


@pytest.mark.once
@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("former", [False, True])
def test_adapters_in_pefts_format_have_the_names_of_torchs_modules(former, scan_layers, tmp_path):
    patterns = (".*/(q|v)_proj/kernel", ".*/fc2/kernel", ".*/projection/kernel")
    model, adapted = adapted_of("vit", *patterns, scan_layers=scan_layers)
    names, adapted = models.peft_names(model, former=former), moved(adapted)
    jlora.save_peft(tmp_path / "out", adapted, names)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    layers = {"attention.q_proj", "attention.v_proj", "mlp.fc2"}
    if former:
        layers = {"attention.attention.query", "attention.attention.value", "output.dense"}
    stack = "encoder.layer" if former else "layers"
    modules = {f"{stack}.{number}.{layer}" for number in range(2) for layer in layers}
    modules |= {"embeddings.patch_embeddings.projection"}
    assert set(tensors) == {f"base_model.model.vit.{each}.lora_{ab}.weight" for each in modules for ab in "AB"}
    assert tensors["base_model.model.vit.embeddings.patch_embeddings.projection.lora_A.weight"].shape == (2, 3, 2, 4)
    again = jlora.load_peft(tmp_path / "out", adapted.base, names)
    jax.tree.map(np.testing.assert_array_equal, again.params, adapted.params)


@pytest.mark.once
def test_only_models_whose_modules_were_renamed_have_former_names():
    for name in ("qwen3", "mixtral"):
        with pytest.raises(ValueError, match="former: the modules of a (Llama|Mixtral) have no other names"):
            models.peft_names(models.load(GOLDEN / name)[0], former=True)


@pytest.mark.once
def test_every_leaf_has_a_name_in_torch():
    model, params = loaded("vit")
    for former in (False, True):
        names = [slot.name for slots in resolved(model, params, former).values() for slot in slots]
        checkpoint = set(load_file(GOLDEN / "vit" / "model.safetensors"))
        assert len(names) == len(set(names)) == len(checkpoint)
        assert not former or set(names) == checkpoint


def resolved(model, params, former):
    found = resolve(models.peft_names(model, former=former), list(flatten_dict(params).items()))
    assert set(found) == set(flatten_dict(params))
    return found


@pytest.mark.once
def test_linear_weights_are_kept_as_8_bit_numbers_and_patches_as_they_are():
    model, params = models.load(GOLDEN / "vit", quantize=jlora.Int8())
    kept = {"/".join(path) for path, leaf in flatten_dict(params).items() if isinstance(leaf, jlora.Stored)}
    assert kept == {f"layers/{layer}/kernel" for layer in LINEAR}
    images = golden("vit")["images"]
    with pytest.raises(TypeError, match="lift"):
        model.apply({"params": params}, images)
    assert jlora.lift(model.apply)({"params": params}, images).shape == (2, 5)


@pytest.mark.once
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (2, 3, 7, 12),
            r"\[batch, 7, 12, 3\] by the model's config, got shape \[2, 3, 7, 12\], which has its channels in",
        ),
        ((2, 12, 7, 3), r"images: wanted .* got shape \[2, 12, 7, 3\]\.(\n|$)"),
        ((2, 7, 12, 1), r"got shape \[2, 7, 12, 1\]\.(\n|$)"),
        ((7, 12, 3), r"got shape \[7, 12, 3\]\.(\n|$)"),
    ],
)
def test_images_of_another_shape_are_refused(shape, message):
    model, params = loaded("vit")
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params}, np.zeros(shape, np.float32))


@pytest.mark.once
def test_images_of_bytes_are_refused():
    model, params = loaded("vit")
    with pytest.raises(TypeError, match="images: wanted floating numbers, scaled as in training, got uint8"):
        model.apply({"params": params}, np.zeros((2, 7, 12, 3), np.uint8))


PATCHES = "embeddings.patch_embeddings.projection.weight"


@pytest.mark.once
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 2}, rf"'vit.{PATCHES}' has shape \[16, 3, 2, 4\], wanted \[16, 3, 2, 2\] by config.json"),
        ({"num_channels": 1}, r"has shape \[16, 3, 2, 4\], wanted \[16, 1, 2, 4\] by config.json"),
        ({"image_size": 12}, r"position_embeddings' has shape \[1, 10, 16\], wanted \[1, 19, 16\] by config.json"),
        ({"image_size": [2**31 - 1, 12]}, r"has shape \[1, 10, 16\], wanted \[1, 3221225470, 16\] by config.json"),
        (
            {"image_size": [7, 12, 3]},
            "config.json: 'image_size' must be a whole number from 1, or a list of height and",
        ),
        ({"patch_size": "4"}, "'patch_size' must be a whole number from 1, or a list of height and width, got '4'"),
        ({"image_size": 1}, r"config.json: image_size \[1, 1\] is less than patch_size \[2, 4\]"),
        ({"num_attention_heads": 3}, "config.json: hidden_size 16 is no multiple of num_attention_heads 3"),
        ({"hidden_act": "quick_gelu"}, "config.json: hidden_act 'quick_gelu' is not supported; supported: gelu,"),
        ({"head_dim": 8}, "config.json: 'head_dim' is 8 .int., which is not supported"),
        ({"id2label": {"0": "a"}}, r"'classifier.bias' has shape \[5\], wanted \[1\] by config.json"),
        ({"id2label": ["a"]}, r"'id2label' must be an object from numbers to names, got \['a'\]"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, but the safetensors hold no tensor of layer 2"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused_with_its_path(change, message, tmp_path):
    folder = copy_of("vit", tmp_path, **change)
    with pytest.raises(ValueError, match=message) as caught:
        models.load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.once
def test_a_head_that_is_missing_or_for_another_task_is_named(tmp_path):
    lost = copy_of("vit", tmp_path, drop=("classifier.weight", "classifier.bias"))
    with pytest.raises(ValueError, match=r"tensor 'classifier.bias' \(for classifier/bias\) is missing"):
        models.load(lost)
    masked = copy_of("vit_pooled", tmp_path, add={"embeddings.mask_token": np.zeros((1, 1, 16), np.float32)})
    with pytest.raises(ValueError, match="the tensors embeddings.mask_token are a head for another task"):
        models.load(masked)
    assert "pooler" in models.load(masked, drop_heads=True)[1]


@pytest.mark.once
def test_the_command_line_says_that_it_reads_no_images():
    with pytest.raises(
        ValueError, match="model .*golden/vit is a vit, which reads images, and the command line trains"
    ):
        open_codec(Settings(model=str(GOLDEN / "vit")))
