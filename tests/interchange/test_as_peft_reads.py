"""Folders as they are found: what PEFT reads gives the weights that it gives there, and what it does not is refused by name.

What PEFT does with each was tried on PEFT 0.21; `test_parity.py` tries the same beside PEFT itself.
"""

import json
import random
import re
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora import TorchParameter
from jlora.interchange.files.patterns import matches
from jlora.interchange.files.targets import left_out

pytestmark = pytest.mark.once

LAYERS = ("layers.0", "layers.1", "layers.2")
PARAMS = {name: {"kernel": jnp.cos(jnp.arange(36.0) + n).reshape(6, 6)} for n, name in enumerate(LAYERS)}
PARAMS["cls"] = {"kernel": jnp.ones((6, 2))}
NAMES = {"(?P<m>.*)/kernel": "{m}"}


def factor(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("f4")


def a_and_b(module, rank, seed=0):
    stem = f"base_model.model.{module}"
    return {f"{stem}.lora_A.weight": factor(seed, rank, 6), f"{stem}.lora_B.weight": factor(seed + 1, 6, rank)}


def folder_of(directory, tensors, **config):
    """A folder as PEFT writes it; a setting that is `...` is left out."""
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    whole = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["layers.0", "layers.1", "layers.2"]}
    kept = {name: value for name, value in {**whole, **config}.items() if value is not ...}
    (directory / "adapter_config.json").write_text(json.dumps(kept))
    return directory


def scale_of(folder, module, params=PARAMS, names=NAMES):
    """The factor of `B A` in a module's weight, after loading."""
    tensors = {
        key: value for key, value in load_file(folder / "adapter_model.safetensors").items() if f".{module}." in key
    }
    a, b = (next(value for key, value in tensors.items() if f"lora_{x}" in key) for x in "AB")
    change = (jlora.merge(jlora.load_peft(folder, params, names))[module]["kernel"] - params[module]["kernel"]).T
    scale = float(np.sum(change * (b @ a)) / np.sum((b @ a) ** 2))
    np.testing.assert_allclose(change, scale * (b @ a), atol=1e-4)
    return scale


ATOMS = ["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "1", "(a|b1)", "(?:a.)"]
ATOMS += [r"\b", "^", "$", "(?=a)", "(?!b)", "(?<=a)", "(|a)"]
REPEATS = ["", "", "", "*", "+", "?", "{2}", "{1,2}", "{0,}", "*?", "{,3}"]


def random_pattern(draw, depth=0):
    parts = []
    for _ in range(draw.randint(1, 4)):
        inner = f"({random_pattern(draw, depth + 1)})" if depth < 2 and draw.random() < 0.2 else draw.choice(ATOMS)
        parts.append(inner + draw.choice(REPEATS))
    more = f"|{random_pattern(draw, depth + 1)}" if depth < 2 and draw.random() < 0.1 else ""
    return "".join(parts) + more


def test_a_pattern_matches_what_pefts_rule_matches():
    draw, agreed = random.Random(0), 0
    for _ in range(600):
        pattern, name = random_pattern(draw), "".join(draw.choice("ab1.") for _ in range(draw.randint(0, 7)))
        try:
            expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
        except re.error:
            with pytest.raises(ValueError):
                matches(pattern, name)
            continue
        assert matches(pattern, name) == expected, (pattern, name)
        agreed += expected
    assert agreed > 50


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(a|a)*b", "((.*)*)*b", ".*" * 300 + "b", "(((.{1,99}){1,99}){1,99}){1,99}b"]
)
def test_no_pattern_takes_long(pattern):
    start = time.process_time()
    assert not matches(pattern, "a" * 60)
    assert time.process_time() - start < 1


def test_a_pattern_that_would_take_too_long_is_refused():
    with pytest.raises(ValueError, match="it takes too long to match"):
        matches(".*" + "(?=.*)" * 200, "a" * 60)


@pytest.mark.parametrize(
    "pattern, reason",
    [
        ("(a", "missing \\)"),
        (r"(.*)\1", "groupref in a pattern"),
        ("(?a:a)", "flags in a pattern"),
        ("(?>a*)", "atomic_group in a pattern"),
        ("a" * 30_000, "more than"),
    ],
)
def test_what_is_no_pattern_is_refused_with_the_reason(pattern, reason, tmp_path):
    folder = folder_of(tmp_path / "a", a_and_b("layers.0", 2), alpha_pattern={pattern: 3})
    with pytest.raises(
        ValueError, match=rf"adapter_config.json: alpha_pattern holds .*is no pattern that jlora reads \(.*{reason}"
    ):
        jlora.load_peft(folder, PARAMS, NAMES)


@pytest.mark.parametrize(
    "pattern, hit",
    [
        (r"layers\.\d{1}", "012"), (r"layers\.(?:0|2)", "02"), (r"^layers\.[12]", "12"), (r".*\.(?!0)\d", "12"),
        ("2", "2"), ("layers", ""), (r"(\w+\.)+1", "1"), ("0|1", "01"),
    ],
)  # fmt: skip
def test_patterns_of_ranks_and_alphas_hit_the_modules_that_they_hit_in_peft(pattern, hit, tmp_path):
    tensors = {}
    for n in range(3):
        tensors |= a_and_b(f"layers.{n}", 4 if str(n) in hit else 2)
    folder = folder_of(tmp_path / "a", tensors, rank_pattern={pattern: 4}, alpha_pattern={pattern: 12})
    scales = [scale_of(folder, f"layers.{n}") for n in range(3)]
    np.testing.assert_allclose(scales, [3 if str(n) in hit else 1 for n in range(3)], rtol=1e-5)


@pytest.mark.parametrize(
    "change, scale",
    [
        ({"lora_dropout": None}, 1), ({"use_rslora": None}, 1), ({"use_dora": None, "lora_bias": None}, 1),
        ({"rank_pattern": None, "alpha_pattern": None}, 1), ({"modules_to_save": None, "task_type": None}, 1),
        ({"init_lora_weights": None}, 1), ({"init_lora_weights": "gaussian"}, 1), ({"lora_alpha": 3.0}, 1.5),
        ({"lora_alpha": -3}, -1.5), ({"lora_alpha": ...}, 4), ({"use_rslora": 1}, 2**0.5), ({"target_modules": ...}, 1),
        ({"merge_weights": True, "enable_lora": None}, 1), ({"runtime_config": {"a": 1}}, 1), ({"loftq_config": {"b": 4}}, 1),
    ],
)  # fmt: skip
def test_settings_that_are_null_absent_or_of_another_kind_mean_what_they_mean_in_peft(change, scale, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scale_of(folder_of(tmp_path / "a", a_and_b("layers.0", 2), **change), "layers.0") == pytest.approx(scale)


@pytest.mark.parametrize("value", [0.5, 3, "cosine"])
def test_a_setting_of_a_later_release_is_left_out_with_a_warning_that_names_it(value, tmp_path):
    folder = folder_of(tmp_path / "a", a_and_b("layers.0", 2), future_setting=value, other_setting=None)
    with pytest.warns(
        UserWarning, match=rf"adapter_config.json: the setting 'future_setting' = {value!r} is unknown"
    ) as caught:
        jlora.load_peft(folder, PARAMS, NAMES)
    assert len(caught) == 1


def renamed(tensors, **words):
    return {re.sub("|".join(words), lambda match: words[match[0]], key): value for key, value in tensors.items()}


def test_keys_that_hold_the_adapters_name_are_those_without_it(tmp_path):
    tensors = a_and_b("layers.0", 2) | {"base_model.model.cls.weight": factor(5, 2, 6)}
    plain = folder_of(tmp_path / "a", tensors, modules_to_save=["cls"])
    words = {"lora_A": "lora_A.default", "lora_B": "lora_B.default", "cls": "cls.modules_to_save.default"}
    named = folder_of(tmp_path / "b", renamed(tensors, **words), modules_to_save=["cls"])
    one, other = (jlora.load_peft(folder, PARAMS, NAMES) for folder in (plain, named))
    assert one.plan == other.plan
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_two_adapters_or_two_tensors_for_one_place_are_refused(tmp_path):
    tensors = a_and_b("layers.0", 2)
    two = renamed(tensors, lora_A="lora_A.mine", lora_B="lora_B.yours")
    with pytest.raises(ValueError, match="adapter_model.safetensors holds the adapters 'mine' and 'yours'"):
        jlora.load_peft(folder_of(tmp_path / "a", two), PARAMS, NAMES)
    twice = tensors | renamed(tensors, lora_A="lora_A.default", lora_B="lora_B.default")
    with pytest.raises(ValueError, match="lora_A.default.weight' and .*lora_A.weight' are the same tensor"):
        jlora.load_peft(folder_of(tmp_path / "b", twice), PARAMS, NAMES)


def test_a_tensor_that_peft_ignores_for_its_targets_is_refused(tmp_path):
    tensors = a_and_b("layers.0", 2) | a_and_b("layers.1", 2)
    with pytest.raises(
        ValueError, match=r"adapter_config.json: target_modules \['layers.0'\] does not name 'layers.1'"
    ):
        jlora.load_peft(folder_of(tmp_path / "a", tensors, target_modules=["layers.0"]), PARAMS, NAMES)


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"target_modules": ["ers.1", "layers.0"]}, r"target_modules .* does not name 'layers.1'"),
        ({"target_modules": r"layers\.[02]"}, r"target_modules .* does not name 'layers.1'"),
        ({"exclude_modules": ["1"]}, r"exclude_modules \['1'\] names 'layers.1'"),
        ({"exclude_modules": r".*\.1"}, r"exclude_modules .* names 'layers.1'"),
        ({"modules_to_save": ["layers.1"]}, r"modules_to_save holds 'layers.1', which 'layers.1' is in"),
        (
            {"layers_to_transform": [0], "layers_pattern": "layers", "target_modules": ["0", "1"]},
            r"layers_to_transform",
        ),
        ({"exclude_modules": 3}, "exclude_modules must be of the type str or a list of such, got 3"),
        ({"layers_to_transform": "0"}, "layers_to_transform must be of the type int or a list of such, got '0'"),
        ({"target_modules": "(a"}, r"target_modules holds '\(a', which is no pattern that"),
    ],
)
def test_settings_by_which_peft_ignores_a_tensor_are_refused(settings, reason, tmp_path):
    tensors = a_and_b("layers.0", 2) | a_and_b("layers.1", 2)
    with pytest.raises(ValueError, match=f"adapter_config.json: {reason}"):
        jlora.load_peft(folder_of(tmp_path / "a", tensors, **settings), PARAMS, NAMES)


@pytest.mark.parametrize(
    "config, module",
    [
        ({"target_modules": "(?i).*Q_PROJ"}, "h.0.q_proj"),
        ({"target_modules": "|".join(f"h.{n}.q" for n in range(500))}, "h.499.q"),
        ({"target_modules": "all-linear"}, "anything"),
        ({"target_modules": ["q"], "layers_to_transform": 1}, "model.layers.1.experts.0.q"),
        ({"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ["no", "h"]}, "m.h.1.q"),
        ({"target_modules": ["h.0.q"], "layers_to_transform": [1]}, "h.0.q"),
        ({"target_modules": ["q"], "exclude_modules": ["0.q"]}, "h.10.q"),
    ],
)
def test_modules_that_peft_adapts_are_known_by_its_rule(config, module):
    assert left_out(config, module) is None


@pytest.mark.parametrize(
    "pattern, name, same",
    [
        ("(?i:H)\\.q", "h.q", True),
        ("(?i:H)\\.Q", "h.q", False),
        ("(?i:[^A])", "a", False),
        ("(?i:[G-I](?-i:q))", "hq", True),
    ],
)
def test_patterns_may_say_that_case_makes_no_difference(pattern, name, same):
    assert matches(pattern, name) is same is bool(re.match(rf"(.*\.)?({pattern})$", name))


def test_saved_modules_that_this_model_has_not_are_no_matter(tmp_path):
    tensors = a_and_b("layers.0", 2) | {"base_model.model.cls.weight": factor(5, 2, 6)}
    folder = folder_of(tmp_path / "a", tensors, modules_to_save=["classifier", "score", "cls"])
    assert len(jlora.load_peft(folder, PARAMS, NAMES).plan.sites) == 2
    missing = folder_of(tmp_path / "b", a_and_b("layers.0", 2), modules_to_save=["classifier", "cls"])
    with pytest.raises(ValueError, match="modules_to_save names 'cls', of which there is no tensor"):
        jlora.load_peft(missing, PARAMS, NAMES)


def test_a_saved_module_may_hold_others(tmp_path):
    tensors = {f"base_model.model.{module}.weight": factor(n, 6, 6) for n, module in enumerate(LAYERS)}
    folder = folder_of(tmp_path / "a", tensors, modules_to_save=["layers"], target_modules="dummy-target-modules")
    assert [site.path for site in jlora.load_peft(folder, PARAMS, NAMES).plan.sites] == [
        f"{name}/kernel" for name in LAYERS
    ]


ATTENTION = {"in": {"kernel": jnp.ones((6, 18))}, "out": {"kernel": jnp.ones((6, 6))}}
ATTENTION_NAMES = {
    "in/kernel": TorchParameter("mha.in_proj_weight", "in out"),
    "out/kernel": TorchParameter("mha.out_proj.weight", "in out"),
}


def test_attentions_out_proj_counts_twice_as_in_peft_and_has_the_attentions_rank_and_alpha(tmp_path):
    stem = "base_model.model.mha"
    tensors = {f"{stem}.lora_A.weight": factor(0, 3, 6), f"{stem}.lora_B.weight": factor(1, 18, 3)}
    inner = {
        f"{stem}.base_layer.out_proj.lora_{x}.weight": factor(n, *s) for n, x, s in ((2, "A", (3, 6)), (3, "B", (6, 3)))
    }
    config = {"target_modules": ["mha"], "rank_pattern": {"mha": 3}, "alpha_pattern": {"mha": 12, "out_proj": 7}}
    adapted = jlora.load_peft(folder_of(tmp_path / "a", tensors | inner, **config), ATTENTION, ATTENTION_NAMES)
    merged = jlora.merge(adapted)
    expected = 4 * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
    np.testing.assert_allclose(merged["in"]["kernel"] - 1, expected.T, atol=1e-4)
    a, b = inner.values()
    np.testing.assert_allclose(merged["out"]["kernel"] - 1, 8 * (b @ a).T, atol=1e-4)


def test_an_adapter_of_attentions_out_proj_alone_is_refused_on_both_ways(tmp_path):
    folder = folder_of(tmp_path / "a", a_and_b("mha.out_proj", 2), target_modules=["out_proj"])
    with pytest.raises(
        ValueError, match="adapts the out_proj of torch's MultiheadAttention 'mha', which PEFT never uses"
    ):
        jlora.load_peft(folder, ATTENTION, ATTENTION_NAMES)
    adapted = jlora.adapterize(ATTENTION, {"out/kernel": jlora.LoRA(2)})
    with pytest.raises(ValueError, match="out/kernel: PEFT does not use an adapter of 'mha.out_proj.weight'"):
        jlora.save_peft(tmp_path / "b", adapted, ATTENTION_NAMES)


def convolve(params, x, groups=2):
    return jax.lax.conv_general_dilated(
        x, params["k"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups
    )


CONV = {"k": TorchParameter("c.weight", "in in out", "conv")}


@pytest.mark.parametrize("dora", [False, True])
def test_a_convolution_in_groups_is_refused_by_name_on_the_way_in(dora, tmp_path):
    stem = "base_model.model.c"
    tensors = {f"{stem}.lora_A.weight": factor(0, 2, 4, 3), f"{stem}.lora_B.weight": factor(1, 8, 1, 1)}
    tensors |= {f"{stem}.lora_magnitude_vector": factor(2, 1, 8, 1)} if dora else {}
    folder = folder_of(tmp_path / "a", tensors, target_modules=["c"], use_dora=dora)
    with pytest.raises(
        ValueError, match="'base_model.model.c.lora_A.weight' reads 4 channels .* a convolution in 2 groups"
    ):
        jlora.load_peft(folder, {"k": jnp.ones((3, 2, 8))}, CONV)


@pytest.mark.parametrize(
    "method, named",
    [(jlora.LoRA(2), True), (jlora.DoRA(jlora.LoRA(2)), False), (jlora.AdaLoRA(rank=2, target=1, steps=9), False)],
)
def test_a_convolution_in_groups_is_refused_by_name_on_the_way_out(method, named, tmp_path):
    params = {"k": jnp.ones((3, 2, 8))}
    sites = jlora.sites(convolve, params, jnp.ones((1, 5, 4)))
    spec = {"k": jlora.Axes("in in out", method, "conv") if named else method}
    adapted = jlora.adapterize(params, spec, sites=sites)
    with pytest.raises(ValueError, match="k: the LoRA of a convolution in feature groups is another function in PEFT"):
        jlora.save_peft(tmp_path / "a", adapted, CONV)
    assert list(tmp_path.iterdir()) == []


def test_a_convolution_in_groups_that_is_said_by_hand_is_refused_and_trained_whole_goes_out(tmp_path):
    params = {"k": jnp.ones((3, 2, 8))}
    adapted = jlora.adapterize(params, {"k": jlora.Axes("in in out", jlora.LoRA(2), "grouped conv")})
    with pytest.raises(ValueError, match="k: the LoRA of a convolution in feature groups"):
        jlora.save_peft(tmp_path / "a", adapted, CONV)
    jlora.save_peft(tmp_path / "a", jlora.adapterize(params, {"k": jlora.Full()}), CONV)
    assert jlora.load_peft(tmp_path / "a", params, CONV).params["k"]["w"].shape == (3, 2, 8)


def test_a_convolution_without_groups_goes_out_from_a_trace(tmp_path):
    params = {"k": jnp.ones((3, 2, 8))}
    sites = jlora.sites(lambda p, x: convolve(p, x, 1), params, jnp.ones((1, 5, 2)))
    adapted = jlora.adapterize(params, {"k": jlora.LoRA(2)}, sites=sites)
    jlora.save_peft(tmp_path / "a", adapted, CONV)
    assert jlora.load_peft(tmp_path / "a", params, CONV).plan == adapted.plan


def test_fused_q_k_and_v_with_different_alphas_come_in_as_one_leaf(tmp_path):
    tensors = a_and_b("q", 2, 0) | a_and_b("k", 2, 2) | a_and_b("v", 3, 4)
    config = {"rank_pattern": {"v": 3}, "alpha_pattern": {"k": 5, "v": 0.6}, "target_modules": ["q", "k", "v"]}
    params = {"qkv": {"kernel": jnp.cos(jnp.arange(108.0)).reshape(6, 18)}}
    names = {"qkv/kernel": TorchParameter(("q.weight", "k.weight", "v.weight"), "in out", sizes=(6, 6, 6))}
    adapted = jlora.load_peft(folder_of(tmp_path / "a", tensors, **config), params, names)
    change = jlora.merge(adapted)["qkv"]["kernel"] - params["qkv"]["kernel"]
    for n, (module, scale) in enumerate({"q": 1, "k": 2.5, "v": 0.2}.items()):
        stem = f"base_model.model.{module}"
        expected = scale * (tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]).T
        np.testing.assert_allclose(change[:, 6 * n : 6 * n + 6], expected, atol=1e-5)


def test_tied_weights_that_an_adapter_changes_differently_are_refused(tmp_path):
    names = {"embed/embedding": TorchParameter("embed.weight", "in out", "embedding", also=("head.weight",))}
    params = {"embed": {"embedding": jnp.cos(jnp.arange(72.0)).reshape(12, 6)}}
    spec = {".*": jlora.Axes("in out", jlora.LoRA(2, init="random"), "gather")}
    jlora.save_peft(tmp_path / "a", jlora.adapterize(params, spec), names)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for n, (tensor, settings) in enumerate([(1.5, {}), (1, {"alpha_pattern": {"head": 3}}), (1, {})]):
        (folder := tmp_path / str(n)).mkdir()
        changed = {key: value * np.float32(tensor if "head.lora_B" in key else 1) for key, value in tensors.items()}
        save_file(changed, folder / "adapter_model.safetensors")
        config = json.loads((tmp_path / "a" / "adapter_config.json").read_text()) | settings
        (folder / "adapter_config.json").write_text(json.dumps(config))
        if n < 2:
            with pytest.raises(ValueError, match="'embed.weight' and 'head.weight' are one array .* differently"):
                jlora.load_peft(folder, params, names)
    assert jlora.load_peft(folder, params, names).params["embed"]["embedding"]["a"].shape == (12, 2)


def test_modules_may_have_names_of_any_letters(tmp_path):
    params = {"größe": {"kernel": jnp.ones((6, 6))}, "层": {"kernel": jnp.ones((6, 6))}}
    adapted = jlora.adapterize(params, {".*": jlora.LoRA(rank=2, init="random")})
    jlora.save_peft(tmp_path / "out", adapted, NAMES)
    again = jlora.load_peft(tmp_path / "out", params, NAMES)
    jax.tree.map(np.testing.assert_array_equal, again.params, adapted.params)


def test_a_manifest_that_is_no_file_is_not_passed_over(tmp_path):
    folder = folder_of(tmp_path / "a", a_and_b("layers.0", 2))
    (folder / "jlora_manifest.json").symlink_to("blobs/gone")
    with pytest.raises(ValueError, match="jlora_manifest.json is a folder, or a link to no file; delete it"):
        jlora.load_peft(folder, PARAMS, NAMES)
