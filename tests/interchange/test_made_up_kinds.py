"""What a table may say of a place in PEFT, by methods made up for it: each is known as a method of the catalogue is."""

import json
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
import jlora.methods
from jlora.core.protocol.method import Method, Start
from jlora.core.protocol.peft import PeftKind, PeftSetting, PeftShared, PeftTensor

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODULES = ("up", "down", "lift")
PARAMS = {name: {"kernel": jnp.cos(jnp.arange(24.0) + n).reshape(4, 6)} for n, name in enumerate(MODULES)}
PARAMS |= {"norms": {"scale": jnp.ones((2, 3)), "bias": jnp.zeros((2, 3))}}
NAMES = {
    "(?P<m>up|down|lift)/kernel": "{m}",
    "norms/scale": jlora.TorchParameter("layers.{l}.norm.weight", "l out", "plain"),
    "norms/bias": jlora.TorchParameter("layers.{l}.norm.bias", "l out", "plain"),
}


@dataclass(frozen=True)
class Scaled(Method):
    """`(w * s) + signs` on one side, as IA3 is by its modules, with positions that are stored and signs that are not."""

    side: str = "out"
    form_of: str = "round"
    seed: int = 7

    peft_kind: ClassVar[PeftKind] = PeftKind(
        "SCALED",
        tensors=(
            PeftTensor("scaled_l", "s", "column", when=lambda method: method.side == "out"),
            PeftTensor("scaled_l", "s", "row", when=lambda method: method.side == "in"),
            PeftTensor("scaled_at.weight", "at", (lambda x: x.reshape(2, -1), lambda x: x.reshape(-1))),
            PeftTensor("scaled_more", "more"),
        ),
        settings=(
            PeftSetting("in_modules", "side", "out", listed="in"),
            PeftSetting("is_round", "form_of", True, values=(("round", True), ("square", False))),
            PeftSetting("loc_seed", "seed", 777, pattern="seed_pattern"),
        ),
        only={"fancy": False, "layout": "v2"},
        own_biases="scaled_only",
    )

    @property
    def axes(self):
        return {"s": (self.side,), "at": ("",), "signs": ("in",), "more": ("",)}

    def start(self, key, w, site):
        size = w.shape[self.side == "out"]
        signs = jax.random.rademacher(jax.random.key(self.seed), (w.shape[0],), jnp.float32)
        more = {"more": jnp.zeros(2)} if w.shape[0] > w.shape[1] else {}
        return Start({"s": jnp.ones(size), **more}, {"at": jnp.arange(4, dtype=jnp.int32), "signs": signs})

    def weight(self, view):
        s = view.params["s"]
        return view.w * (s if self.side == "out" else s[:, None]) + 0.1 * view.frozen["signs"][:, None]


@dataclass(frozen=True)
class Banked(Method):
    """`w + s * bank`, the bank being one for the whole model."""

    width: int = 6

    shared_fields = ("bank",)
    peft_kind: ClassVar[PeftKind] = PeftKind(
        "BANKED",
        tensors=(PeftTensor("banked_s", "s"),),
        settings=(PeftSetting("width", "width", 3),),
        shared=(PeftShared("banked_bank", "bank", "transposed", larger=(0,), repeated=True),),
    )

    @property
    def axes(self):
        return {"s": ("out",)}

    def shared(self, key, sites):
        return {"bank": jax.random.normal(key, (max(site.in_size for site in sites), self.width))}

    def start(self, key, w, site):
        return Start({"s": jnp.zeros(w.shape[1])})

    def weight(self, view):
        return view.w + view.params["s"] * view.shared["bank"][: view.w.shape[0]]


@dataclass(frozen=True)
class Norms(Method):
    """Trains the leaf."""

    matrix = False
    peft_kind: ClassVar[PeftKind] = PeftKind(
        "NORMS", tensors=(PeftTensor("norms_layers.weight", "w"), PeftTensor("norms_layers.bias", "w"))
    )

    @property
    def axes(self):
        return {"w": ()}

    def start(self, key, w, site):
        return Start({"w": w})

    def weight(self, view):
        return view.params["w"]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for cls in (Scaled, Banked, Norms):
        monkeypatch.setattr(jlora.methods, cls.__name__, cls, raising=False)


def adapted_of(spec, params=PARAMS):
    adapted = jlora.adapterize(params, spec, key=jax.random.key(0))
    return adapted.replace(
        params=jax.tree.map(lambda x: x + jnp.cos(jnp.arange(x.size)).reshape(x.shape), adapted.params)
    )


def written(folder, adapted):
    """The folder without its manifest; its settings and tensors."""
    jlora.save_peft(folder, adapted, NAMES)
    (folder / "jlora_manifest.json").unlink()
    return json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)


def assert_equal(again, adapted):
    assert again.plan.sites == adapted.plan.sites
    jax.tree.map(np.testing.assert_array_equal, (again.params, again.frozen), (adapted.params, adapted.frozen))


def test_layouts_words_lists_patterns_and_constants_that_are_made_again(tmp_path):
    spec = {"up/.*": Scaled(), "down/.*": Scaled("in"), "lift/.*": Scaled(seed=9)}
    adapted = adapted_of(spec)
    config, tensors = written(tmp_path / "out", adapted)
    assert config["in_modules"] == ["down"] and config["target_modules"] == ["down", "lift", "up"]
    assert (config["is_round"], config["loc_seed"], config["seed_pattern"]) == (True, 7, {"lift": 9})
    assert (config["fancy"], config["layout"], config["bias"]) == (False, "v2", "none")
    shapes = {key.removeprefix("base_model.model."): value.shape for key, value in tensors.items()}
    assert shapes == {
        "up.scaled_l": (6, 1), "lift.scaled_l": (6, 1), "down.scaled_l": (1, 4),
        "up.scaled_at.weight": (2, 2), "lift.scaled_at.weight": (2, 2), "down.scaled_at.weight": (2, 2),
    }  # fmt: skip
    assert tensors["base_model.model.up.scaled_at.weight"].dtype == np.int32
    assert_equal(jlora.load_peft(tmp_path / "out", PARAMS, NAMES), adapted)


def test_a_field_that_only_some_matrices_have_is_written_and_wanted_for_these(tmp_path):
    params = {"up": {"kernel": PARAMS["up"]["kernel"].T}, "down": PARAMS["down"]}
    adapted = adapted_of({".*": Scaled()}, params)
    _, tensors = written(tmp_path / "out", adapted)
    assert "base_model.model.up.scaled_more" in tensors and "base_model.model.down.scaled_more" not in tensors
    assert_equal(jlora.load_peft(tmp_path / "out", params, NAMES), adapted)
    more = tensors["base_model.model.up.scaled_more"]
    save_file({**tensors, "base_model.model.down.scaled_more": more}, tmp_path / "out" / TENSORS)
    with pytest.raises(
        ValueError, match=r"down.scaled_more' has no place: Scaled\(side=out\) has scaled_at.weight, scaled_l there"
    ):
        jlora.load_peft(tmp_path / "out", params, NAMES)


SETTINGS = {
    "another value of only": ({"fancy": True}, "fancy is True, and jlora has SCALED only with False"),
    "a missing value of only": ({"layout": None}, "layout is None, and jlora has SCALED only with 'v2'"),
    "a wrong type in a pattern": (
        {"seed_pattern": {"up": "x"}},
        "seed_pattern of 'up' must be of the type int, got 'x'",
    ),
    "a list of no names": ({"in_modules": [3]}, "in_modules must be a list of names"),
    "a pattern that it has not": ({"rank_pattern": {"up": 2}}, "the setting 'rank_pattern' = {'up': 2} is unknown"),
    "a value without a word": ({"is_round": "yes"}, "is_round must be of the type bool, got 'yes'"),
}


@pytest.mark.parametrize("change, message", SETTINGS.values(), ids=SETTINGS)
def test_settings_that_it_has_not_are_refused_by_name(change, message, tmp_path):
    config, _ = written(tmp_path / "out", adapted_of({"up/.*": Scaled()}))
    (tmp_path / "out" / CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        jlora.load_peft(tmp_path / "out", PARAMS, NAMES)


def test_a_setting_that_is_missing_has_the_default_of_peft(tmp_path):
    config, _ = written(tmp_path / "out", adapted_of({"up/.*": Scaled(form_of="square", seed=9)}))
    for name in ("is_round", "loc_seed", "seed_pattern"):
        del config[name]
    (tmp_path / "out" / CONFIG).write_text(json.dumps(config))
    (site,) = jlora.load_peft(tmp_path / "out", PARAMS, NAMES).plan.sites
    assert site.method == Scaled(form_of="round", seed=777)


def test_a_list_may_be_a_pattern_and_a_value_of_another_module_changes_its_meaning(tmp_path):
    config, _ = written(tmp_path / "out", adapted_of({"(up|down)/.*": Scaled("in")}))
    (tmp_path / "out" / CONFIG).write_text(json.dumps({**config, "in_modules": "up|d.*"}))
    again = jlora.load_peft(tmp_path / "out", PARAMS, NAMES)
    assert [site.method.side for site in again.plan.sites] == ["in", "in"]
    (tmp_path / "out" / CONFIG).write_text(json.dumps({**config, "in_modules": ["up"]}))
    with pytest.raises(
        ValueError, match=r"down.scaled_l' has shape \[1, 4\], wanted \[6, 1\] for Scaled\(side=out\) of 'down.weight'"
    ):
        jlora.load_peft(tmp_path / "out", PARAMS, NAMES)


def test_a_constant_that_nobody_can_make_again_has_no_place(tmp_path):
    adapted = adapted_of({"up/.*": Scaled()})
    adapted.frozen["up"]["kernel"]["signs"] = -adapted.frozen["up"]["kernel"]["signs"]
    with pytest.raises(ValueError, match=r"up/kernel: Scaled\(side=out\) has no place in a PEFT adapter"):
        jlora.save_peft(tmp_path / "out", adapted, NAMES)


def test_settings_that_no_one_folder_holds_have_no_place(tmp_path):
    adapted = adapted_of({"up/.*": Scaled(), "down/.*": Scaled(form_of="square")})
    with pytest.raises(ValueError, match="has no place in a PEFT adapter that holds the others too"):
        jlora.save_peft(tmp_path / "out", adapted, NAMES)


def test_tensors_of_the_whole_model_go_out_once_and_with_every_module_and_may_be_larger(tmp_path):
    adapted = adapted_of({"(up|down)/.*": Banked()})
    _, tensors = written(tmp_path / "out", adapted)
    bank = np.asarray(adapted.frozen["~shared"]["Banked"]["bank"])
    for key in ("base_model.banked_bank", "base_model.model.up.banked_bank", "base_model.model.down.banked_bank"):
        np.testing.assert_array_equal(tensors[key], bank.T)
    assert_equal(jlora.load_peft(tmp_path / "out", PARAMS, NAMES), adapted)
    save_file({**tensors, "base_model.model.up.banked_bank": bank.T + 1}, tmp_path / "out" / TENSORS)
    with pytest.raises(ValueError, match="'base_model.model.up.banked_bank' is no copy of 'base_model.banked_bank'"):
        jlora.load_peft(tmp_path / "out", PARAMS, NAMES)
    short = {key: value[:, :3].copy() if value.ndim == 2 else value for key, value in tensors.items()}
    save_file(short, tmp_path / "out" / TENSORS)
    with pytest.raises(ValueError, match="banked_bank' has shape .* for all modules of the file"):
        jlora.load_peft(tmp_path / "out", PARAMS, NAMES)


def test_leaves_of_a_norm_go_out_with_a_copy_of_the_one_that_is_not_trained(tmp_path):
    adapted = adapted_of({"norms/scale": Norms()})
    jlora.save_peft(tmp_path / "out", adapted, NAMES)
    tensors = load_file(tmp_path / "out" / TENSORS)
    assert sorted(key.removeprefix("base_model.model.layers.") for key in tensors) == [
        "0.norm.norms_layers.bias", "0.norm.norms_layers.weight", "1.norm.norms_layers.bias", "1.norm.norms_layers.weight",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["target_modules"] == ["norm"]
    assert_equal(jlora.load_peft(tmp_path / "out", PARAMS, NAMES), adapted)
    (tmp_path / "out" / "jlora_manifest.json").unlink()
    again = jlora.load_peft(tmp_path / "out", PARAMS, NAMES)
    assert [site.path for site in again.plan.sites] == ["norms/bias", "norms/scale"]
    jax.tree.map(np.testing.assert_array_equal, jlora.merge(again), jlora.merge(adapted))
    del tensors["base_model.model.layers.1.norm.norms_layers.bias"]
    save_file(tensors, tmp_path / "out" / TENSORS)
    with pytest.raises(ValueError, match="'layers.1.norm' has no norms_layers.bias; the file is not whole"):
        jlora.load_peft(tmp_path / "out", PARAMS, NAMES)


def test_a_class_derived_from_it_has_no_part_in_its_place(tmp_path):
    @dataclass(frozen=True)
    class Other(Scaled):
        pass

    with pytest.raises(ValueError, match="Other.* has no place in a PEFT adapter"):
        jlora.save_peft(tmp_path / "out", adapted_of({"up/.*": Other()}), NAMES)


def test_two_methods_of_one_place_are_an_error(monkeypatch, tmp_path):
    @dataclass(frozen=True)
    class Again(Banked):
        peft_kind: ClassVar[PeftKind] = Banked.peft_kind

    monkeypatch.setattr(jlora.methods, "Again", Again, raising=False)
    with pytest.raises(ValueError, match="PEFT's BANKED is stated by Banked and by Again; one must state it"):
        jlora.save_peft(tmp_path / "out", adapted_of({"up/.*": Scaled()}), NAMES)
