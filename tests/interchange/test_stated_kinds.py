"""Every method that states its place in PEFT goes out and comes back bit for bit; damaged folders of it are refused by name."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora.core.protocol.method import stated_kind
from jlora.disk import catalog
from jlora.interchange.files.config import OFF

pytestmark = pytest.mark.once

# Those that train whole leaves have tests of their own (test_made_up_kinds.py, test_from_peft.py).
KINDS = {name.lower(): cls for name, cls in catalog.methods().items() if stated_kind(cls) is not None and cls.matrix}
PARAMS = {
    "layers": {"up": {"kernel": jnp.cos(jnp.arange(1024.0)).reshape(2, 16, 32)}},
    "heads": {"kernel": jnp.sin(jnp.arange(512.0)).reshape(16, 2, 16)},
    "qkv": {"kernel": jnp.sin(jnp.arange(768.0)).reshape(16, 48)},
    "embed": {"embedding": jnp.sin(jnp.arange(256.0)).reshape(16, 16)},
}
NAMES = {
    "layers/up/kernel": jlora.TorchParameter("layers.{layer}.up.weight", "layer in out"),
    "heads/kernel": jlora.TorchParameter("heads.weight", "in out out"),
    "qkv/kernel": jlora.TorchParameter(("q.weight", "k.weight", "v.weight"), "in out", sizes=(16, 16, 16)),
    "embed/embedding": "embed",
}
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def adapted_of(method):
    """A stacked leaf and one with axes for its heads, away from the start."""
    spec = {"layers/.*": jlora.Axes("batch in out", method), "heads/kernel": jlora.Axes("in out out", method)}
    return moved(jlora.adapterize(PARAMS, spec, key=jax.random.key(1)))


def moved(adapted):
    keys = iter(jax.random.split(jax.random.key(2), 100))
    return adapted.replace(
        params=jax.tree.map(lambda x: x + jax.random.normal(next(keys), x.shape, x.dtype) / 9, adapted.params)
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A function that gives for a kind its adapters and a folder of them, both made once."""
    made = {}

    def of(name):
        if name not in made:
            folder, adapted = tmp_path_factory.mktemp(name) / "out", adapted_of(KINDS[name].CASES[0])
            jlora.save_peft(folder, adapted, NAMES)
            made[name] = adapted, folder
        return made[name]

    return of


@pytest.fixture
def copy(written, tmp_path):
    """The same with a folder that may be changed, and no manifest."""

    def of(name):
        adapted, folder = written(name)
        shutil.copytree(folder, tmp_path / "copy")
        (tmp_path / "copy" / "jlora_manifest.json").unlink()
        return adapted, tmp_path / "copy"

    return of


def same(one, other):
    return jax.tree.structure(one) == jax.tree.structure(other) and jax.tree.all(
        jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), one, other)
    )


def configure(folder, **settings):
    config = json.loads((folder / CONFIG).read_text())
    config |= settings
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.mark.parametrize("name", KINDS)
def test_it_goes_out_as_itself_and_comes_back_bit_for_bit(name, written):
    adapted, folder = written(name)
    config = json.loads((folder / CONFIG).read_text())
    assert config["peft_type"] == stated_kind(KINDS[name]).peft_type
    assert config["target_modules"] == ["heads", "up"]
    again = jlora.load_peft(folder, PARAMS, NAMES)
    assert again.plan == adapted.plan
    assert same((again.params, again.frozen), (adapted.params, adapted.frozen))


@pytest.mark.parametrize("name", KINDS)
def test_without_the_manifest_it_comes_back_by_its_settings_as_the_same_weights_and_bytes(name, copy, tmp_path):
    adapted, folder = copy(name)
    again = jlora.load_peft(folder, PARAMS, NAMES)
    assert same((again.params, again.frozen), (adapted.params, adapted.frozen))
    jax.tree.map(np.testing.assert_array_equal, jlora.merge(again), jlora.merge(adapted))
    jlora.save_peft(tmp_path / "again", again, NAMES)
    before, after = (load_file(each / TENSORS) for each in (folder, tmp_path / "again"))
    assert same(before, after)
    assert json.loads((folder / CONFIG).read_text()) == json.loads((tmp_path / "again" / CONFIG).read_text())


@pytest.mark.parametrize("name", KINDS)
def test_any_missing_tensor_is_named(name, copy):
    _, folder = copy(name)
    tensors = load_file(folder / TENSORS)
    for key in tensors:
        save_file({other: value for other, value in tensors.items() if other != key}, folder / TENSORS)
        last = key.split(".up.")[-1].split("heads.")[-1].removeprefix("base_model.")
        wanted = f"no {last}|{last}' is missing|only 1 of the 2 layers of layers/up/kernel"
        with pytest.raises(ValueError, match=wanted):
            jlora.load_peft(folder, PARAMS, NAMES)


@pytest.mark.parametrize("name", KINDS)
def test_a_tensor_of_another_shape_or_with_no_place_is_named(name, copy):
    _, folder = copy(name)
    tensors = load_file(folder / TENSORS)
    for key, value in tensors.items():
        save_file({**tensors, key: np.concatenate([value, value, value])}, folder / TENSORS)
        with pytest.raises(ValueError, match=f"{key}' has shape .*, wanted|'base_model.model.*no copy of"):
            jlora.load_peft(folder, PARAMS, NAMES)
        save_file({**tensors, f"{key}_more": value}, folder / TENSORS)
        with pytest.raises(ValueError, match=f"{key}_more'|begin with"):
            jlora.load_peft(folder, PARAMS, NAMES)


@pytest.mark.parametrize("name", KINDS)
def test_settings_of_another_type_unknown_ones_and_those_that_it_has_not_are_named(name, copy):
    _, folder = copy(name)
    kind, config = stated_kind(KINDS[name]), json.loads((folder / CONFIG).read_text())
    for setting in (setting for setting in kind.settings if setting.listed is None):
        configure(folder, **{**config, setting.name: [1]})
        with pytest.raises(ValueError, match=f"{setting.name} must be"):
            jlora.load_peft(folder, PARAMS, NAMES)
    for key, value in kind.only.items():
        configure(folder, **{**config, key: "other" if value in OFF else ...})
        with pytest.raises(ValueError, match=f"{key} is .*, and jlora has {kind.peft_type} only with"):
            jlora.load_peft(folder, PARAMS, NAMES)
    configure(folder, **config, a_switch=True)
    with pytest.raises(ValueError, match="'a_switch' = True is unknown"):
        jlora.load_peft(folder, PARAMS, NAMES)
    for key in kind.training:
        configure(folder, **{**config, **dict.fromkeys(kind.training), "a_switch": None, key: 0.5})
        with pytest.warns(UserWarning, match=f"{key} is 0.5, which acts in training only") as warned:
            jlora.load_peft(folder, PARAMS, NAMES)
        assert [each.filename for each in warned] == [__file__]


@pytest.mark.parametrize("name", KINDS)
def test_fused_kernels_and_a_second_kind_are_refused_by_name(name, tmp_path):
    method = KINDS[name].CASES[0]
    fused = jlora.adapterize(PARAMS, {"qkv/kernel": method})
    mixed = jlora.adapterize(PARAMS, {"qkv/kernel": jlora.LoRA(2), "heads/kernel": jlora.Axes("in out out", method)})
    is_lora = method.form is jlora.Factors or type(method).plain is not jlora.Method.plain
    for adapted, path in ((fused, "qkv/kernel"), (mixed, "heads/kernel")):
        if not is_lora:
            with pytest.raises(ValueError, match=f"{path}: .* has no place in a PEFT adapter .*svd_rank="):
                jlora.save_peft(tmp_path / "out", adapted, NAMES)
            assert not (tmp_path / "out").exists()
        report = jlora.save_peft(tmp_path / path, moved(adapted), NAMES, svd_rank=4)
        assert report.peft_type == "LORA" and (is_lora or 0 < report.residuals[path] < 1)
