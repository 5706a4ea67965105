"""Names: stacks are split, fused parameters joined or cut, and what does not fit is told at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jlora
from jlora import TorchParameter

pytestmark = pytest.mark.once


def filled(tree):
    """Params of these shapes with values all their own."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree.unflatten(
        treedef, [jnp.cos(jnp.arange(float(np.prod(shape))) + n).reshape(shape) for n, shape in enumerate(leaves)]
    )


def moved(adapted):
    return adapted.replace(
        params=jax.tree.map(lambda x: x + jnp.sin(jnp.arange(x.size)).reshape(x.shape), adapted.params)
    )


def out_and_back(params, spec, names, tmp_path, **options):
    adapted = moved(jlora.adapterize(params, spec))
    jlora.save_peft(tmp_path / "out", adapted, names, **options)
    again = jlora.load_peft(tmp_path / "out", params, names)
    return adapted, again, load_file(tmp_path / "out" / "adapter_model.safetensors")


def same(adapted, again):
    assert again.plan == adapted.plan
    jax.tree.map(np.testing.assert_array_equal, (again.params, again.frozen), (adapted.params, adapted.frozen))


def delta(tensors, module):
    """The change of a torch weight, at scale 1."""
    return tensors[f"base_model.model.{module}.lora_B.weight"] @ tensors[f"base_model.model.{module}.lora_A.weight"]


LORA = jlora.LoRA(rank=2, alpha=2, init="random")


def test_two_stacked_axes_are_split_into_one_module_each(tmp_path):
    params = filled({"experts": {"up": (2, 3, 4, 5)}})
    names = {"experts/up": TorchParameter("layers.{layer}.experts.{e}.up.weight", "layer e in out")}
    spec = {"experts/up": jlora.Axes("batch batch in out", LORA)}
    adapted, again, tensors = out_and_back(params, spec, names, tmp_path)
    same(adapted, again)
    assert len(tensors) == 2 * 2 * 3
    merged = jlora.merge(adapted)["experts"]["up"] - params["experts"]["up"]
    np.testing.assert_allclose(delta(tensors, "layers.1.experts.2.up"), merged[1, 2].T, atol=1e-5)


def test_a_fused_leaf_is_cut_by_sizes_and_its_shared_factor_comes_back_once(tmp_path):
    params = filled({"qkv": (3, 6, 8)})
    modules = ("h.{layer}.q.weight", "h.{layer}.k.weight", "h.{layer}.v.weight")
    names = {"qkv": TorchParameter(modules, "layer in out", sizes=(4, 2, 2))}
    adapted, again, tensors = out_and_back(params, {"qkv": jlora.Axes("batch in out", LORA)}, names, tmp_path)
    same(adapted, again)
    merged = jlora.merge(adapted)["qkv"] - params["qkv"]
    np.testing.assert_allclose(delta(tensors, "h.1.k"), merged[1, :, 4:6].T, atol=1e-5)


@pytest.mark.parametrize("roles", ["in part out out", "in out part out"])
def test_a_fused_leaf_with_an_axis_of_parts_is_cut_along_it(roles, tmp_path):
    at = roles.split().index("part")
    shape = [6, 2, 2]
    shape.insert(at, 3)
    params = filled({"qkv": tuple(shape)})
    names = {"qkv": TorchParameter(("q.weight", "k.weight", "v.weight"), roles)}
    adapted, again, tensors = out_and_back(params, {"qkv": jlora.Axes("in out out out", LORA)}, names, tmp_path)
    same(adapted, again)
    merged = np.take(np.asarray(jlora.merge(adapted)["qkv"] - params["qkv"]), 2, axis=at).reshape(6, 4)
    np.testing.assert_allclose(delta(tensors, "v"), merged.T, atol=1e-5)


def test_leaves_that_are_columns_of_one_parameter_are_joined_and_come_back_as_they_were(tmp_path):
    params = filled({"q": (6, 4), "k": (6, 2), "v": (6, 2)})
    columns = {"q": (0, 4, 8), "k": (4, 6, 8), "v": (6, 8, 8)}
    names = {name: TorchParameter("c_attn.weight", "in out", columns=at) for name, at in columns.items()}
    spec = {"q|v": LORA}
    adapted, again, tensors = out_and_back(params, spec, names, tmp_path)
    same(adapted, again)
    assert tensors["base_model.model.c_attn.lora_A.weight"].shape == (4, 6)
    merged = np.concatenate([jlora.merge(adapted)[name] - params[name] for name in "qkv"], axis=1)
    scale = 4 / 4  # alpha 4, rank 4: as each had 2 and 2
    np.testing.assert_allclose(scale * delta(tensors, "c_attn"), merged.T, atol=1e-5)
    (tmp_path / "out" / "jlora_manifest.json").unlink()
    plain = jlora.load_peft(tmp_path / "out", params, names)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), jlora.merge(plain), jlora.merge(adapted))


def test_joined_leaves_of_different_scales_give_the_same_weight(tmp_path):
    params = filled({"q": (6, 4), "k": (6, 4)})
    names = {n: TorchParameter("qk.weight", "in out", columns=c) for n, c in (("q", (0, 4, 8)), ("k", (4, 8, 8)))}
    spec = {"q": LORA, "k": jlora.LoRA(3, alpha=5, scaling="rslora", init="random")}
    adapted, again, _ = out_and_back(params, spec, names, tmp_path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), jlora.merge(again), jlora.merge(adapted))


def test_a_trained_leaf_is_split_and_joined_too(tmp_path):
    params = filled({"qkv": (2, 6, 8), "q": (6, 4), "k": (6, 4), "up": {"w": (6, 6)}})
    names = {
        "qkv": TorchParameter(("h.{n}.a.weight", "h.{n}.b.weight"), "n in out", sizes=(5, 3)),
        "q": TorchParameter("qk.weight", "in out", columns=(0, 4, 8)),
        "k": TorchParameter("qk.weight", "in out", columns=(4, 8, 8)),
        "up/w": "up",
    }
    adapted, again, tensors = out_and_back(params, {"qkv|q": jlora.Full(), "up/w": LORA}, names, tmp_path)
    same(adapted, again)
    np.testing.assert_array_equal(tensors["base_model.model.h.1.b.weight"], adapted.params["qkv"]["w"][1, :, 5:].T)
    np.testing.assert_array_equal(tensors["base_model.model.qk.weight"][4:], params["k"].T)


def test_a_function_and_bare_module_names_do_for_plain_trees(tmp_path):
    params = filled({"block": {"up": {"kernel": (4, 5), "bias": (5,)}}})
    spec = {".*kernel": LORA, ".*bias": jlora.Full()}
    adapted, again, tensors = out_and_back(
        params, spec, lambda path: path.rpartition("/")[0].replace("/", "."), tmp_path
    )
    same(adapted, again)
    stem = "base_model.model.block.up"
    assert sorted(tensors) == [f"{stem}.base_layer.bias", f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"]


def test_layers_of_different_ranks_and_scales_become_one_stack(tmp_path):
    flat = filled({f"layers_{n}": {"w": (6, 6)} for n in range(3)})
    spec = {"layers_0/w": LORA, "layers_2/w": jlora.LoRA(rank=4, alpha=6, init="random")}
    adapted = moved(jlora.adapterize(flat, spec))
    jlora.save_peft(tmp_path / "out", adapted, {r"layers_(?P<n>\d)/w": "layers.{n}"})
    stacked = {"layers": {"w": jnp.stack([flat[f"layers_{n}"]["w"] for n in range(3)])}}
    again = jlora.load_peft(tmp_path / "out", stacked, {"layers/w": TorchParameter("layers.{n}.weight", "n in out")})
    assert again.params["layers"]["w"]["a"].shape == (3, 6, 4)
    for n in range(3):
        expected = jlora.merge(adapted)[f"layers_{n}"]["w"]
        np.testing.assert_allclose(jlora.merge(again)["layers"]["w"][n], expected, atol=1e-5)


def test_layers_without_a_magnitude_have_the_norms_of_the_base(tmp_path):
    flat = filled({f"layers_{n}": {"w": (6, 6)} for n in range(3)})
    adapted = moved(jlora.adapterize(flat, {"layers_1/w": jlora.DoRA(LORA)}))
    jlora.save_peft(tmp_path / "out", adapted, {r"layers_(?P<n>\d)/w": "layers.{n}"})
    stacked = {"layers": {"w": jnp.stack([flat[f"layers_{n}"]["w"] for n in range(3)])}}
    again = jlora.load_peft(tmp_path / "out", stacked, {"layers/w": TorchParameter("layers.{n}.weight", "n in out")})
    merged = jlora.merge(adapted)
    for n in range(3):
        np.testing.assert_allclose(jlora.merge(again)["layers"]["w"][n], merged[f"layers_{n}"]["w"], atol=1e-5)


WRONG = {
    "an adapted leaf without a name": ({}, "w is adapted but has no torch name"),
    "a leaf of more axes than told": ({"w": TorchParameter("w.weight", "layer in out")}, "w has 2 axes"),
    "an axis that no brace holds": ({"w": TorchParameter("w.weight", "in out")}, None),
    "a brace that nothing fills": (
        {"w": TorchParameter("l.{n}.w.weight", "in out")},
        "{n} in 'l.{n}.w.weight' is neither",
    ),
    "a kind of vectors": ({"w": TorchParameter("w.weight", "in out", "plain")}, "adapted as a matrix, but its kind is"),
    "the axes the other way round": (
        {"w": TorchParameter("w.weight", "out in")},
        "the axes are in .* by the names, but",
    ),
    "an embedding that is none": (
        {"w": TorchParameter("w.weight", "in out", "embedding")},
        "the function contracts it",
    ),
    "no regular expression": ({"(": "w"}, "'\\(' is no regular expression"),
    "something else": ({"w": 3}, "w must lead to a torch name or a TorchParameter, got 3"),
}


@pytest.mark.parametrize("names, message", WRONG.values(), ids=WRONG)
def test_names_that_do_not_fit_are_refused(names, message, tmp_path):
    adapted = jlora.adapterize(filled({"w": (4, 5)}), {"w": LORA})
    if message is None:
        jlora.save_peft(tmp_path / "out", adapted, names)
        assert (tmp_path / "out").is_dir()
        return
    with pytest.raises((ValueError, TypeError), match=message):
        jlora.save_peft(tmp_path / "out", adapted, names)
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_no_names_are_refused(tmp_path):
    adapted = jlora.adapterize(filled({"w": (4, 5)}), {"w": LORA})
    with pytest.raises(TypeError, match="must be a mapping from regex to torch name, or a function; got list"):
        jlora.save_peft(tmp_path / "out", adapted, ["w"])


def test_two_leaves_on_one_place_are_refused(tmp_path):
    adapted = jlora.adapterize(filled({"a": (4, 5), "b": (4, 5)}), {"a": LORA})
    with pytest.raises(ValueError, match="a and b are both the torch parameter 'w.weight'"):
        jlora.save_peft(tmp_path / "out", adapted, {"a|b": "w"})


def test_two_leaves_that_write_one_tensor_are_refused(tmp_path):
    spec = {"a": LORA, "e": jlora.Axes("in out", LORA, "gather")}
    names = {"a": "w", "e": TorchParameter("e.weight", "in out", "embedding", also=("w.weight",))}
    with pytest.raises(ValueError, match="both lead to 'base_model.model.w.lora_A.weight'"):
        jlora.save_peft(tmp_path / "out", jlora.adapterize(filled({"a": (4, 5), "e": (5, 4)}), spec), names)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "w", "kind": "dense"}, "kind must be one of"),
        ({"name": "w", "roles": "in in"}, 'name "in" and "out"'),
        ({"name": ("q", "k")}, "several names need sizes, or one axis with the role 'part'"),
        ({"name": ("q", "k"), "sizes": (1, 2, 3)}, "are not one for each of the names"),
        ({"name": "w", "columns": (3, 2, 9)}, r"columns are \(start, stop, width\)"),
    ],
)
def test_a_torch_parameter_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TorchParameter(**arguments)


def test_the_axes_of_three_axes_are_not_guessed(tmp_path):
    params = filled({"query": (6, 2, 3)})
    adapted = jlora.adapterize(params, {"query": jlora.Axes("in out out", LORA)})
    with pytest.raises(ValueError, match="its axes can't be told from 'query.weight' alone; name them, for example"):
        jlora.save_peft(tmp_path / "out", adapted, {"query": "query"})
    jlora.save_peft(tmp_path / "out", adapted, {"query": TorchParameter("query.weight", "in out out")})
