"""The two profiles: what servers read alike, truncation with its residual, and refusals that change nothing."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import jlora
from jlora import TorchParameter
from jlora.core.protocol.peft import Peft

pytestmark = pytest.mark.once

PARAMS = {
    "up": {"kernel": jnp.cos(jnp.arange(80.0)).reshape(10, 8), "bias": jnp.ones(8)},
    "down": {"kernel": jnp.sin(jnp.arange(80.0)).reshape(8, 10)},
    "embed": {"embedding": jnp.cos(jnp.arange(120.0) ** 2).reshape(12, 10)},
    "experts": {"up": jnp.ones((2, 6, 7))},
}
NAMES = {
    "(?P<m>up|down)/(kernel|bias)": "{m}",
    "embed/embedding": TorchParameter("embed.weight", "in out", "embedding", also=()),
    "experts/up": TorchParameter("experts.up_proj", "expert in out", "experts"),
}
LORA = jlora.LoRA(rank=2, alpha=3, init="random")


def moved(adapted):
    return adapted.replace(
        params=jax.tree.map(lambda x: x + jnp.sin(jnp.arange(x.size)).reshape(x.shape), adapted.params)
    )


def adapted_of(spec):
    return moved(jlora.adapterize(PARAMS, spec))


def saved(folder):
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def test_for_servers_ranks_are_padded_and_scales_are_in_b(tmp_path):
    odd = jlora.LoRA(rank=3, alpha=5, scaling="rslora", init="random")
    adapted = adapted_of({"up/kernel": LORA, "down/kernel": odd})
    report = jlora.save_peft(tmp_path / "out", adapted, NAMES, profile="serving")
    config, tensors = saved(tmp_path / "out")
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["bias"]) == (3, 3, False, "none")
    assert not config["rank_pattern"] and not config["alpha_pattern"] and config["modules_to_save"] is None
    assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {3}
    assert not np.any(tensors["base_model.model.up.lora_A.weight"][2:])
    np.testing.assert_array_equal(
        tensors["base_model.model.down.lora_B.weight"], np.float32(5 / 3**0.5) * adapted.params["down"]["kernel"]["b"].T
    )
    assert "vLLM needs --max-lora-rank 8 or more" in str(report)
    again = jlora.load_peft(tmp_path / "out", PARAMS, NAMES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), jlora.merge(again), jlora.merge(adapted))


def test_a_chain_ships_with_the_links_that_it_has(tmp_path):
    adapted = moved(jlora.adapterize(PARAMS, {"up/kernel": jlora.Chain(jlora.LoRA(3), links=3, ranks=(3, 2, 1))}))
    tx = optax.sgd(0.1)
    for done, rank in enumerate((3, 5, 6)):
        jlora.save_peft(tmp_path / str(done), adapted, NAMES)
        config, tensors = saved(tmp_path / str(done))
        assert config["r"] == rank and tensors["base_model.model.up.lora_A.weight"].shape == (rank, 10)
        again = jlora.load_peft(tmp_path / str(done), PARAMS, NAMES)
        np.testing.assert_allclose(jlora.merge(again)["up"]["kernel"], jlora.merge(adapted)["up"]["kernel"], atol=1e-5)
        if done < 2:
            adapted = moved(jlora.restart(adapted, tx.init(adapted.params), tx, jax.random.key(done))[0])


REFUSED = {
    "DoRA": ({"up/kernel": jlora.DoRA(LORA)}, "up/kernel: servers reject DoRA; pass svd_rank="),
    "a bias": ({"up/kernel": LORA, "up/bias": jlora.Full()}, r"up/bias: Full\(\) is no low-rank adapter"),
    "a trained leaf": ({"up/kernel": jlora.Full()}, r"up/kernel: Full\(\) is no low-rank adapter, .*jlora merge"),
    "SHiRA": ({"up/kernel": jlora.SHiRA("weight", rank=1)}, "up/kernel: SHiRA.* is no low-rank adapter"),
    "rows": ({"embed/embedding": jlora.Axes("in out", jlora.Rows((1,)), "gather")}, None),
    "experts": (
        {"experts/up": jlora.Axes("batch in out", LORA)},
        "experts/up: servers read no LoRA of the kind 'experts'",
    ),
}


@pytest.mark.parametrize("spec, message", REFUSED.values(), ids=REFUSED)
def test_what_servers_ignore_or_reject_is_refused_by_name_and_nothing_is_written(spec, message, tmp_path):
    adapted = adapted_of(spec)
    if message is None:  # the change of some rows is a LoRA of that rank
        jlora.save_peft(tmp_path / "out", adapted, NAMES, profile="serving")
        assert saved(tmp_path / "out")[0]["r"] == 1
        return
    with pytest.raises(ValueError, match=message):
        jlora.save_peft(tmp_path / "out", adapted, NAMES, profile="serving")
    assert list(tmp_path.iterdir()) == []


def test_a_rank_above_every_server_s_is_refused(tmp_path):
    params = {"up": {"kernel": jnp.ones((600, 600))}}
    adapted = jlora.adapterize(params, {"up/kernel": jlora.LoRA(rank=520)})
    with pytest.raises(ValueError, match="up/kernel has rank 520, and servers take up to 512; pass svd_rank="):
        jlora.save_peft(tmp_path / "out", adapted, {"up/kernel": "up"}, profile="serving")


def test_a_tied_embedding_is_refused_for_servers(tmp_path):
    names = {"embed/embedding": TorchParameter("embed.weight", "in out", "embedding", also=("head.weight",))}
    adapted = adapted_of({"embed/embedding": jlora.Axes("in out", LORA, "gather")})
    with pytest.raises(ValueError, match="embed/embedding is also 'head.weight' .tied weights."):
        jlora.save_peft(tmp_path / "out", adapted, names, profile="serving")


TRUNCATED = [jlora.SHiRA("weight", rank=2), jlora.DoRA(LORA), jlora.LoRA(6, 4.0, init="random"), jlora.Full()]


@pytest.mark.parametrize("profile", ["peft", "serving"])
@pytest.mark.parametrize("method", TRUNCATED, ids=str)
def test_a_truncation_is_the_best_of_its_rank_and_says_what_is_lost(method, profile, tmp_path):
    native = profile == "peft" and isinstance(method, jlora.DoRA | jlora.Full | jlora.SHiRA)
    adapted = adapted_of({"up/kernel": method})
    report = jlora.save_peft(tmp_path / "out", adapted, NAMES, profile, svd_rank=3)
    again = jlora.load_peft(tmp_path / "out", PARAMS, NAMES)
    change, kept = (np.asarray(jlora.merge(a)["up"]["kernel"] - PARAMS["up"]["kernel"]) for a in (adapted, again))
    if native:
        assert report.residuals == {} and again.plan == adapted.plan
        return
    u, s, v = np.linalg.svd(change)
    np.testing.assert_allclose(kept, (u[:, :3] * s[:3]) @ v[:3], atol=1e-4)
    lost = np.linalg.norm(s[3:]) / np.linalg.norm(s)
    np.testing.assert_allclose(report.residuals["up/kernel"], lost, rtol=1e-3)
    told = json.loads((tmp_path / "out" / "jlora_manifest.json").read_text())["leaves"][0]["residual"]
    np.testing.assert_allclose(told, lost, rtol=1e-3)
    assert f"up/kernel: truncated, relative residual {report.residuals['up/kernel']:.3g}" in str(report)


def test_methods_that_no_folder_holds_together_go_out_as_exact_lora(tmp_path):
    adapted = adapted_of(
        {"up/kernel": jlora.AdaLoRA(rank=3, target=2, alpha=5, steps=10), "down/kernel": jlora.VeRA(4)}
    )
    report = jlora.save_peft(tmp_path / "out", adapted, NAMES)
    assert report.peft_type == "LORA" and report.residuals == {}
    again = jlora.load_peft(tmp_path / "out", PARAMS, NAMES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), jlora.merge(again), jlora.merge(adapted))


MIXED = {
    "SHiRA beside LoRA": (
        {"up/kernel": jlora.SHiRA("weight", rank=1), "down/kernel": LORA},
        "up/kernel: SHiRA.* has no place in a PEFT adapter that holds the others too",
    ),
    "DoRA beside LoRA": (
        {"up/kernel": jlora.DoRA(LORA), "down/kernel": LORA},
        "up/kernel has DoRA and down/kernel has not; a PEFT adapter has it everywhere or nowhere",
    ),
    "DoRA of experts": (
        {"experts/up": jlora.Axes("batch in out", jlora.DoRA(LORA))},
        "experts/up: PEFT has no DoRA of '.*', which it adapts by target_parameters; pass svd_rank=",
    ),
}


@pytest.mark.parametrize("spec, message", MIXED.values(), ids=MIXED)
def test_what_peft_cannot_hold_is_refused_by_name(spec, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        jlora.save_peft(tmp_path / "out", adapted_of(spec), NAMES)
    assert list(tmp_path.iterdir()) == []


def test_every_tensor_is_in_the_manifest_with_the_leaves_it_holds(tmp_path):
    adapted = adapted_of({".*kernel": LORA, "up/bias": jlora.Full()})
    jlora.save_peft(tmp_path / "out", adapted, NAMES)
    told = json.loads((tmp_path / "out" / "jlora_manifest.json").read_text())
    lines = {line["key"]: line["from"] for line in told["tensors"]}
    assert set(lines) == set(saved(tmp_path / "out")[1])
    assert lines["base_model.model.up.lora_A.weight"] == [{"leaf": "up/kernel", "fields": ["a"]}]
    assert lines["base_model.model.up.base_layer.bias"] == [{"leaf": "up/bias", "fields": ["w"]}]
    assert told["leaves"][-1] == {
        "leaf": "up/kernel",
        "method": jlora.method_to_dict(LORA),
        "form": "lora",
        "parameters": ["up.weight"],
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tensors_can_be_written_in_16_bits_and_come_back_in_32(dtype, tmp_path):
    adapted = adapted_of({".*kernel": LORA})
    jlora.save_peft(tmp_path / "out", adapted, NAMES, dtype=dtype)
    assert {str(t.dtype) for t in saved(tmp_path / "out")[1].values()} == {dtype}
    again = jlora.load_peft(tmp_path / "out", PARAMS, NAMES)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(dtype).astype("f4")), again.params, adapted.params
    )


def test_the_scale_of_entries_goes_out_in_their_values(tmp_path):
    adapted = adapted_of({"up/kernel": jlora.SHiRA("weight", rank=1, scale=0.5)})
    jlora.save_peft(tmp_path / "out", adapted, NAMES)
    again = jlora.load_peft(tmp_path / "out", PARAMS, NAMES)
    np.testing.assert_allclose(jlora.merge(again)["up"]["kernel"], jlora.merge(adapted)["up"]["kernel"], atol=1e-6)


def test_targets_are_named_by_their_last_word_only_where_all_of_that_word_are_meant(tmp_path):
    params = {name: {"up": {"kernel": jnp.ones((4, 4))}} for name in "ab"}
    names = {r"(?P<m>[ab])/up/kernel": "{m}.up"}
    for pattern, targets in (("a/.*", ["a.up"]), (".*", ["up"])):
        adapted = jlora.adapterize(params, {pattern: LORA})
        jlora.save_peft(tmp_path / targets[0], adapted, names)
        assert saved(tmp_path / targets[0])[0]["target_modules"] == targets


def test_integers_stay_integers_in_16_bits(tmp_path):
    adapted = adapted_of({"up/kernel": jlora.SHiRA("weight", rank=1)})
    jlora.save_peft(tmp_path / "out", adapted, NAMES, dtype="bfloat16")
    kinds = {key.rpartition("_")[2]: str(tensor.dtype) for key, tensor in saved(tmp_path / "out")[1].items()}
    assert kinds == {"weight": "bfloat16", "indices": "int32"}
    again = jlora.load_peft(tmp_path / "out", PARAMS, NAMES)
    np.testing.assert_array_equal(again.frozen["up"]["kernel"]["index"], adapted.frozen["up"]["kernel"]["index"])


@pytest.mark.parametrize("profile", ["peft", "serving"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_adapters_that_are_not_finite_are_refused_by_their_path(value, profile, tmp_path):
    adapted = adapted_of({"up/kernel": LORA, "down/kernel": LORA})
    adapted.params["down"]["kernel"]["b"] = adapted.params["down"]["kernel"]["b"].at[1, 2].set(value)
    with pytest.raises(
        ValueError, match=rf"down/kernel \(b\): 'base_model.model.down.lora_B.weight' holds {value}, which no"
    ):
        jlora.save_peft(tmp_path / "out", adapted, NAMES, profile)
    assert list(tmp_path.iterdir()) == []


def test_values_that_16_bits_do_not_hold_are_refused(tmp_path):
    adapted = adapted_of({"up/kernel": LORA})
    adapted.params["up"]["kernel"]["a"] = adapted.params["up"]["kernel"]["a"].at[0, 0].set(1e6)
    with pytest.raises(ValueError, match=r"up/kernel \(a\): '.*lora_A.weight' holds values too large for float16"):
        jlora.save_peft(tmp_path / "out", adapted, NAMES, dtype="float16")
    jlora.save_peft(tmp_path / "out", adapted, NAMES, dtype="bfloat16")


def test_a_folder_in_use_is_left_alone_and_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    adapted = adapted_of({"up/kernel": LORA})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(FileExistsError, match="already there and not empty"):
        jlora.save_peft(tmp_path / "mine", adapted, NAMES)
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    import jlora.interchange.files.manifest as manifest

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "describe", full)
    with pytest.raises(OSError, match="can't be written, and nothing was left there .*No space left"):
        jlora.save_peft(tmp_path / "out", adapted, NAMES)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"profile": "vllm"}, "profile must be one of .'peft', 'serving'., got 'vllm'"),
        ({"svd_rank": 0}, "svd_rank must be a positive integer, got 0"),
        ({"dtype": "int8"}, "dtype must be one of float64, float32, float16, bfloat16, got 'int8'"),
    ],
)
def test_options_that_are_wrong_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        jlora.save_peft(tmp_path / "out", adapted_of({"up/kernel": LORA}), NAMES, **options)


def test_adapters_of_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is nothing to save: no leaf is adapted"):
        jlora.save_peft(tmp_path / "out", jlora.Adapted(PARAMS, {}, {}, {}, jlora.core.tree.adapted.Plan(())), NAMES)


def test_a_trained_array_without_a_place_is_an_error(tmp_path, monkeypatch):
    def forgetful(self, params, frozen, shared):
        return Peft("lora", params, {"a": ("a",), "b": ("a",)})

    monkeypatch.setattr(jlora.LoRA, "peft", forgetful)
    with pytest.raises(ValueError, match="up/kernel: its trained array 'b' has no place in the adapter"):
        jlora.save_peft(tmp_path / "out", adapted_of({"up/kernel": LORA}), NAMES)
    assert list(tmp_path.iterdir()) == []


def test_an_array_that_is_not_contiguous_is_written_by_its_values(tmp_path):
    adapted = jlora.adapterize(PARAMS, {"up/kernel": LORA})
    a = np.asarray(adapted.params["up"]["kernel"]["a"])
    strided = np.asfortranarray(a)
    assert not strided.flags.c_contiguous
    adapted.params["up"]["kernel"]["a"] = strided
    jlora.save_peft(tmp_path / "out", adapted, NAMES)
    np.testing.assert_array_equal(saved(tmp_path / "out")[1]["base_model.model.up.lora_A.weight"], a.T)


class Halved(jlora.LoRA):
    @property
    def scale(self):
        return super().scale / 2


class OnlyWeight(jlora.LoRA):
    """The change of its parent's weight, halved, in `weight` alone."""

    def weight(self, view):
        return (super().weight(view) + view.w) / 2


class OnlyFactors(jlora.LoRA):
    """What the contract forbids: factors that are not of the weight."""

    def factors(self, view):
        f = super().factors(view)
        return dataclasses.replace(f, b=2 * f.b)


class HalfDoRA(jlora.DoRA):
    def weight(self, view):
        return super().weight(view) / 2


class HalfFull(jlora.Full):
    def weight(self, view):
        return super().weight(view) / 2


class HalfAdaLoRA(jlora.AdaLoRA):
    @property
    def scale(self):
        return super().scale / 2


class HalfChain(jlora.Chain):
    def factors(self, view):
        f = super().factors(view)
        return dataclasses.replace(f, b=f.b / 2)

    def weight(self, view):
        f = self.factors(view)
        return view.w + f.a @ f.b


EXACT = [
    Halved(2, 3),
    jlora.DoRA(Halved(2, 3)),
    HalfAdaLoRA(3, 2, steps=9),
    HalfChain(jlora.LoRA(2, 3), 2),
    jlora.RMLoRA(2, updated=1),
]
BY_WEIGHT = [OnlyWeight(2, 3), OnlyFactors(2, 3), HalfDoRA(LORA), HalfFull(), jlora.DoRA(OnlyWeight(2, 3))]


@pytest.mark.parametrize("method", EXACT, ids=str)
def test_a_derived_class_ships_what_it_computes_and_not_what_its_parent_would(method, tmp_path):
    adapted = adapted_of({"up/kernel": method})
    assert jlora.save_peft(tmp_path / "out", adapted, NAMES).residuals == {}
    again = jlora.load_peft(tmp_path / "out", PARAMS, NAMES)
    np.testing.assert_allclose(jlora.merge(again)["up"]["kernel"], jlora.merge(adapted)["up"]["kernel"], atol=1e-5)
    kept = again.plan.sites[0].method
    assert type(kept) in (jlora.LoRA, jlora.DoRA) or kept == method == jlora.RMLoRA(2, updated=1)


@pytest.mark.parametrize("method", BY_WEIGHT, ids=str)
def test_a_derived_class_without_factors_of_its_weight_is_refused_or_goes_out_by_its_weight(method, tmp_path):
    adapted = adapted_of({"up/kernel": method})
    with pytest.raises(
        ValueError, match="up/kernel: .*no exact LoRA; pass svd_rank= to turn its change of the weight into"
    ):
        jlora.save_peft(tmp_path / "out", adapted, NAMES)
    report = jlora.save_peft(tmp_path / "out", adapted, NAMES, svd_rank=8)
    again = jlora.load_peft(tmp_path / "out", PARAMS, NAMES)
    np.testing.assert_allclose(jlora.merge(again)["up"]["kernel"], jlora.merge(adapted)["up"]["kernel"], atol=1e-4)
    assert report.residuals["up/kernel"] < 1e-5


def test_a_folder_of_a_class_that_is_not_imported_is_read_as_pefts_own(tmp_path):
    adapted = adapted_of({"up/kernel": Halved(2, 3)})
    jlora.save_peft(tmp_path / "out", adapted, NAMES)
    manifest = tmp_path / "out" / "jlora_manifest.json"
    manifest.write_text(manifest.read_text().replace(f"{__name__}.Halved", "elsewhere.Mine"))
    again = jlora.load_peft(tmp_path / "out", PARAMS, NAMES)
    np.testing.assert_allclose(jlora.merge(again)["up"]["kernel"], jlora.merge(adapted)["up"]["kernel"], atol=1e-5)


def test_a_linear_weight_of_another_module_than_a_linear_is_named_as_a_parameter(tmp_path):
    """As the routers of experts are; PEFT has no dropout of these, and where they are a Linear it names a module."""
    names = {"up/kernel": TorchParameter("mlp.gate.weight", "in out", "parameter"), **NAMES}
    adapted = adapted_of({"up/kernel": jlora.LoRA(rank=3, alpha=3, dropout=0.1), "down/kernel": LORA})
    jlora.save_peft(tmp_path / "out", adapted, names)
    config, tensors = saved(tmp_path / "out")
    assert config["target_parameters"] == ["mlp.gate.weight"] and config["target_modules"] == ["down"]
    assert (config["r"], config["rank_pattern"], config["lora_dropout"]) == (2, {"mlp.gate.weight": 3}, 0.0)
    assert tensors["base_model.model.mlp.gate.lora_A.weight"].shape == (3, 10)
    for of_linear in (False, True):
        if of_linear:
            (tmp_path / "out" / "jlora_manifest.json").unlink()
            linear = {
                **config,
                "target_parameters": None,
                "target_modules": ["down", "gate"],
                "rank_pattern": {"gate": 3},
            }
            (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(linear))
        again = jlora.load_peft(tmp_path / "out", PARAMS, names)
        for leaf, fields in (("up", "ab"), ("down", "ab")):
            ours, theirs = (each.params[leaf]["kernel"] for each in (adapted, again))
            assert all(np.array_equal(ours[name], theirs[name]) for name in fields)
    with pytest.raises(
        ValueError, match="up/kernel: PEFT has no DoRA of 'mlp.gate.weight', which it adapts by target_param"
    ):
        jlora.save_peft(tmp_path / "dora", adapted_of({"up/kernel": jlora.DoRA(LORA)}), names)
    with pytest.raises(ValueError, match="up/kernel: servers read no LoRA of the kind 'parameter'"):
        jlora.save_peft(tmp_path / "served", adapted, names, profile="serving")
