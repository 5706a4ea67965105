"""Models whose linear weights are kept in the form of a code, from the first byte that is read."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from models_data import GOLDEN, copy_of
from safetensors.numpy import save_file

import jlora
import jlora.models as models
from jlora.core.tree import quantize as quantize_module
from jlora.models.checkpoint import Checkpoint
from jlora.models.load import FAMILIES, leaf_shapes, leaf_sources
from jlora.stored import NF4, Int8

NARROW = {r".*/down_proj/kernel": None, jlora.ALL_LINEAR: NF4(32)}
TOKENS = jnp.arange(1, 9, dtype=jnp.int32)[None]


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "name, scan_layers, quantize, param_dtype",
    [
        (models.STORIES260K, True, NARROW, jnp.bfloat16),
        (models.STORIES260K, False, NARROW, None),
        (GOLDEN / "bert", True, "int8", None),
        (GOLDEN / "qwen3", True, {r"layers/mlp/.*": jlora.Axes("batch out in", Int8())}, None),
        (GOLDEN / "qwen3", True, {r"layers/mlp/up_proj/kernel": jlora.Axes("in in out", Int8())}, None),
    ],
)
def test_a_model_is_encoded_while_it_is_read_as_it_would_be_afterwards(name, scan_layers, quantize, param_dtype):
    options = {"scan_layers": scan_layers, "param_dtype": param_dtype}
    model, params = models.load(name, **options)
    same, found = models.load(name, quantize=quantize, **options)
    sites = jlora.sites(model.apply, {"params": params}, TOKENS)
    spec = {jlora.ALL_LINEAR: Int8()} if quantize == "int8" else quantize
    assert same == model
    assert_same(found, jlora.quantize(params, spec, sites))


@pytest.mark.once
def test_a_name_means_all_linear_weights_but_the_head():
    _, params = models.load(GOLDEN / "qwen3", quantize="int8")
    kept = {path for path, leaf in flatten_dict(params).items() if isinstance(leaf, jlora.Stored)}
    assert {path[-2] for path in kept} == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert not isinstance(params["lm_head"]["kernel"], jlora.Stored)


@pytest.mark.once
def test_what_no_code_can_be_is_refused_before_a_tensor_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "read", None)
    with pytest.raises(ValueError, match="'nf5' is no name of a code; there are nf4, int8, int4, fp8, nf3, nf2"):
        models.load(GOLDEN / "qwen3", quantize="nf5")
    with pytest.raises(TypeError, match="wanted one of the names nf4, .* got int"):
        models.load(GOLDEN / "qwen3", quantize=4)
    with pytest.raises(
        ValueError, match=r"layers/mlp/down_proj/kernel, shape \(5, 172, 64\): block 64 must divide the 172"
    ):
        models.load(models.STORIES260K, quantize="nf4")


@pytest.mark.once
def test_values_that_are_not_finite_are_never_encoded(tmp_path):
    broken = np.full((24, 16), np.nan, np.float32)
    folder = copy_of("qwen3", tmp_path, add={"model.layers.1.mlp.up_proj.weight": broken})
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj.weight' holds NaN or infinity in 384"):
        models.load(folder, quantize="int8")
    with pytest.raises(ValueError, match="layers/mlp/up_proj/kernel holds values that are not finite, which Int8"):
        models.load(folder, quantize="int8", allow_nonfinite=True)


def deep_model(folder):
    """A directory of eight layers, whose largest matrices are of 512 KiB."""
    settings = json.loads((GOLDEN / "llama_headless" / "config.json").read_text())
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "head_dim": 64}
    config = settings | sizes
    (folder / "config.json").write_text(json.dumps(config))
    model = models.Llama(models.LlamaConfig.from_hf(config, language_head=False))
    shapes, draw = leaf_shapes(model), np.random.default_rng(0)
    sources = leaf_sources(model, shapes, FAMILIES["llama"], "")
    tensors = {
        name: draw.normal(size=made_of.tensor_shape(shapes[path])).astype(np.float32)
        for path, made_of in sources.items()
        for name in made_of.names
    }
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.once
def test_beside_what_is_stored_one_matrix_is_in_memory(tmp_path, monkeypatch):
    """Arrays of JAX are counted where some come and go; tracemalloc sees NumPy's, and those of safetensors."""
    deep_model(tmp_path)
    matrix = 512 * 256 * 4
    _, params = models.load(tmp_path, quantize="nf4")
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    del params
    arrays, before, encode, read = (
        [],
        sum(x.nbytes for x in jax.live_arrays()),
        quantize_module._encode,
        Checkpoint.read,
    )

    def count():
        arrays.append(sum(x.nbytes for x in jax.live_arrays()) - before)

    def counted_encode(code, w):
        found = encode(code, w)
        count()
        return found

    def counted_read(checkpoint, name):
        if not tracemalloc.is_tracing():
            tracemalloc.start()
        count()
        return read(checkpoint, name)

    monkeypatch.setattr(quantize_module, "_encode", counted_encode)
    monkeypatch.setattr(Checkpoint, "read", counted_read)
    try:
        models.load(tmp_path, quantize="nf4")
        host = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The matrix that JAX has, with its fields; the one in the file's order of axes and its transpose, with small objects.
    assert max(arrays) <= stored + 1.25 * matrix
    assert host <= 2.5 * matrix
    assert max(arrays) + host - stored < 8 * matrix / 2  # half of what a stack of the eight layers takes in float


@pytest.fixture(scope="module")
def stories():
    """The shipped model, quantized, and what its weights are when decoded."""
    model, params = models.load(models.STORIES260K, quantize=NARROW)
    return model, params, jlora.dequantize(params)


@pytest.mark.once
def test_a_model_that_is_not_lifted_says_what_to_do(stories):
    model, params, _ = stories
    for apply in (model.apply, jax.jit(model.apply)):
        with pytest.raises(TypeError, match=r"is kept as NF4\(block=32\) and is no array: run .* by jlora.lift"):
            apply({"params": params}, TOKENS)
    model, params = models.load(GOLDEN / "bert", quantize="int8")
    with pytest.raises(TypeError, match="is kept as Int8.* run the function by jlora.lift"):
        model.apply({"params": params}, TOKENS)


@pytest.mark.once
def test_text_is_written_from_codes_with_and_without_a_lift(stories):
    model, params, plain = stories
    wanted = models.generate(model.apply, plain, [[1, 2, 3]], max_new_tokens=8)
    assert models.generate(model.apply, params, [[1, 2, 3]], max_new_tokens=8) == wanted
    adapted = jlora.adapterize(params, {r".*/q_proj/kernel": jlora.LoRA(2)})
    assert models.generate(jlora.lift(model.apply), adapted, [[1, 2, 3]], max_new_tokens=8) == wanted


@pytest.mark.once
def test_a_classifier_keeps_its_backbone_as_codes_and_is_saved_plain(tmp_path):
    model, params = models.make_classifier(*models.load(GOLDEN / "bert", quantize="int8"), 3, jax.random.key(0))
    scores = jlora.lift(model.apply)({"params": params}, TOKENS)
    models.save_classifier(tmp_path / "out", model, params, GOLDEN / "bert", ["a", "b", "c"])
    again, plain, _ = models.load_classifier(tmp_path / "out")
    np.testing.assert_allclose(scores, again.apply({"params": plain}, TOKENS), atol=1e-5, rtol=0)
    _, coded, _ = models.load_classifier(tmp_path / "out", quantize="int8")
    assert_same(coded["backbone"], params["backbone"])


@pytest.mark.once
@pytest.mark.parametrize("scan_layers", [True, False])
def test_saving_decodes_layer_by_layer(scan_layers, tmp_path):
    model, params = models.load(models.STORIES260K, quantize=NARROW, scan_layers=scan_layers)
    models.save(tmp_path / "out", model, params, source=models.STORIES260K)
    assert_same(models.load(tmp_path / "out", scan_layers=scan_layers)[1], jlora.dequantize(params))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
