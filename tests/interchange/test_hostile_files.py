"""Damaged and hostile adapter folders get one clear sentence, before a tensor is read."""

import json
import pickle
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora.interchange.files.folder import AdapterFolder

pytestmark = pytest.mark.once

PARAMS = {"up": {"kernel": jnp.ones((6, 5)), "bias": jnp.ones(5)}, "head": {"kernel": jnp.ones((5, 3))}}
NAMES = {"(?P<module>.*)/(kernel|bias)": "{module}"}
STEM = "base_model.model.up"


@pytest.fixture
def folder(tmp_path):
    adapted = jlora.adapterize(PARAMS, {"up/kernel": jlora.LoRA(2, init="random"), "head/kernel": jlora.Full()})
    jlora.save_peft(tmp_path / "adapter", adapted, NAMES)
    (tmp_path / "adapter" / "jlora_manifest.json").unlink()
    return tmp_path / "adapter"


@pytest.fixture
def unread(monkeypatch):
    """Reading any tensor is an error."""

    def refuse(self, key):
        raise AssertionError(f"{key} was read")

    monkeypatch.setattr(AdapterFolder, "read", refuse)


def refused(folder, message, error=ValueError):
    with pytest.raises(error, match=message) as caught:
        jlora.load_peft(folder, PARAMS, NAMES)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def with_tensors(folder, change):
    file = Path(folder) / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def with_config(folder, **changes):
    file = Path(folder) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


A, B = f"{STEM}.lora_A.weight", f"{STEM}.lora_B.weight"
TENSORS = {
    "a factor is missing": (lambda t: t.pop(B), "has no lora B; the file is not whole"),
    "another rank": (lambda t: t.update({A: np.zeros((3, 6), "f4")}), r"shape \[3, 6\], wanted \[2, 6\] for rank 2"),
    "another width": (lambda t: t.update({A: np.zeros((2, 7), "f4")}), r"shape \[2, 7\], wanted \[2, 6\]"),
    "too few axes": (lambda t: t.update({A: np.zeros(12, "f4")}), r"shape \[12\], wanted \[2, 6\]"),
    "no numbers": (lambda t: t.update({A: np.zeros((2, 6), "i8")}), "has dtype I64, wanted one of F64, F32, F16, BF16"),
    "a module that is not there": (
        lambda t: t.update({A.replace("up", "down"): t[A], B.replace("up", "down"): t[B]}),
        "no leaf of the params is 'down'",
    ),
    "a parameter that is not there": (
        lambda t: t.update({"base_model.model.head.bias": t[A]}),
        "no leaf .* 'head.bias'",
    ),
    "no prefix": (lambda t: t.update({"up.lora_A.weight": t[A]}), "doesn't begin with 'base_model.model.'"),
    "a path in a name": (lambda t: t.update({"base_model.model.../../up.weight": t[A]}), "no name of a tensor"),
    "an absolute path": (lambda t: t.update({"/etc/passwd": t[A]}), "is no name of a tensor"),
    "a magnitude without DoRA": (
        lambda t: t.update({f"{STEM}.lora_magnitude_vector": np.zeros(5, "f4")}),
        "use_dora is False, but 'up' has a magnitude",
    ),
    "a saved module is missing": (
        lambda t: t.pop("base_model.model.head.weight"),
        "modules_to_save names 'head', of which there is no tensor",
    ),
    "a saved module of another shape": (
        lambda t: t.update({"base_model.model.head.weight": np.zeros((5, 3), "f4")}),
        r"shape \[5, 3\], wanted \[3, 5\]",
    ),
}


@pytest.mark.parametrize("change, message", TENSORS.values(), ids=TENSORS)
def test_tensors_that_are_wrong_are_refused_before_any_is_read(change, message, folder, unread):
    with_tensors(folder, change)
    refused(folder, message)


CONFIGS = {
    "another method": ({"peft_type": "BONE"}, "peft_type 'BONE' is not read; known are LORA, ADALORA, VERA, SHIRA"),
    "no method": ({"peft_type": None}, "peft_type None is not read"),
    "a text for r": ({"r": "4"}, "r must be a positive integer, got '4'"),
    "r of 0": ({"r": 0}, "r must be a positive integer, got 0"),
    "a huge r": ({"r": 10**9}, r"wanted \[1000000000, 6\]"),
    "alpha is no number": ({"lora_alpha": "x"}, "must be a finite number, got 'x'"),
    "alpha is infinite": ({"lora_alpha": float("inf")}, "must be a finite number, got inf"),
    "a flag that is none": ({"use_dora": "yes"}, "use_dora must be true or false, got 'yes'"),
    "patterns that are no table": ({"rank_pattern": [1]}, r"rank_pattern must be a table, got \[1\]"),
    "a pattern that is none": ({"rank_pattern": {"(up": 1}}, "rank_pattern holds .* is no pattern"),
    "an unknown setting": ({"use_magic": True}, "the setting 'use_magic' = True is unknown"),
    "an unknown table": ({"magic_config": {"spell": 1}}, "the setting 'magic_config' = .'spell': 1. is unknown"),
    "r of null": ({"r": None}, "adapter_config.json: r must be a positive integer, got None"),
    "alpha of null": ({"lora_alpha": None}, "adapter_config.json: lora_alpha must be a finite number, got None"),
    "alpha of true": ({"lora_alpha": True}, "lora_alpha must be a finite number, got True"),
    "alpha without end": ({"lora_alpha": 10**400}, r"lora_alpha must be a finite number, got 1000+\.\.\."),
    "a rank of null": ({"rank_pattern": {"up": None}}, "rank_pattern of 'up' must be a positive integer, got None"),
    "an alpha of text": ({"alpha_pattern": {"up": "8"}}, "alpha_pattern of 'up' must be a finite number, got '8'"),
    "a dropout above 1": ({"lora_dropout": 1.5}, "lora_dropout must be at least 0 and below 1, got 1.5"),
    "a start that is none": ({"init_lora_weights": ["pissa"]}, "init_lora_weights must be true, false or a name"),
    "another case": ({"peft_type": "lora"}, "peft_type 'lora' is not read; known are LORA"),
    "a list for a method": ({"peft_type": ["LORA"]}, r"peft_type \['LORA'\] is not read"),
    "activated LoRA": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is .* which jlora has not"),
    "an edited base": ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda', whose base differs"),
    "a random start": ({"init_lora_weights": "pissa_niter_4"}, "took a part out of the base that can't be found again"),
    "rows that are not there": ({"trainable_token_indices": {"embed": [1]}}, "names .*'embed'.*, but only"),
}


@pytest.mark.parametrize("changes, message", CONFIGS.values(), ids=CONFIGS)
def test_settings_that_are_wrong_are_refused(changes, message, folder):
    with_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        jlora.load_peft(folder, PARAMS, NAMES)


NO_OBJECTS = {
    "empty": "",
    "a list": "[1]",
    "cut off": "{",
    "nested": '{"a":' * 5000,
    "nested and whole": '{"x": ' + "[" * 300 + "]" * 300 + "}",
    "twins": '{"r": 2, "r": 4}',
}


@pytest.mark.parametrize("file", ["adapter_config.json", "jlora_manifest.json"])
@pytest.mark.parametrize("content", NO_OBJECTS.values(), ids=NO_OBJECTS)
def test_what_is_no_json_object_is_refused(content, file, folder):
    (folder / file).write_text(content)
    refused(folder, rf"{file}: (not valid JSON|wanted a JSON object)")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f4", "bfloat16"])
def test_values_that_are_not_finite_are_refused_by_file_and_tensor(value, dtype, folder):
    with_tensors(folder, lambda t: t.update({A: np.where(np.arange(12).reshape(2, 6) == 8, value, t[A]).astype(dtype)}))
    refused(
        folder, rf"adapter_model.safetensors: '{A}' holds {value} at \[1, 2\], and 1 of its 12 values are not finite"
    )


def test_a_trained_module_that_is_not_finite_is_refused_too(folder):
    with_tensors(folder, lambda t: t.update({"base_model.model.head.weight": np.full((3, 5), np.nan, "f4")}))
    refused(folder, "adapter_model.safetensors: 'base_model.model.head.weight' holds nan at .*15 of its 15 values")


def test_settings_of_absurd_size_are_refused_unread(folder):
    with (folder / "adapter_config.json").open("ab") as file:
        file.truncate(20_000_000)
    refused(folder, "20000000 bytes are too many for settings")


HEADERS = {
    "empty": b"",
    "cut off": b"\x10\x00\x00",
    "a header longer than the file": struct.pack("<Q", 2**62) + b"{}",
    "a header of garbage": struct.pack("<Q", 4) + b"\xff\xff\xff\xff",
    "tensors beyond the end": struct.pack("<Q", 64)
    + json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).ljust(64).encode(),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_a_damaged_file_is_refused(content, folder):
    (folder / "adapter_model.safetensors").write_bytes(content)
    refused(folder, "not a whole safetensors file .*; copy it again")


def test_a_huge_header_is_refused_unread(folder):
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 60_000_000))
        file.truncate(60_000_008)
    refused(folder, "a header of 60000000 bytes is too large for an adapter")


def test_a_pickle_is_never_read(folder):
    (folder / "adapter_model.safetensors").unlink()

    class Trap:
        def __reduce__(self):
            return (Path(folder / "sprung").write_text, ("x",))

    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    refused(
        folder, "adapter_model.safetensors is missing; adapter_model.bin is a pickle, .* never read", FileNotFoundError
    )
    assert not (folder / "sprung").exists()


def test_a_folder_that_is_none_is_refused(tmp_path):
    refused(tmp_path / "nothing", "no such folder; an adapter is a folder with", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no such file; an adapter is a folder with", FileNotFoundError)


def test_a_copy_of_another_base_is_refused(folder):
    with_tensors(folder, lambda t: t.update({f"{STEM}.base_layer.weight": np.full((5, 6), 2, "f4")}))
    refused(folder, "is a copy of up/kernel, but not of the one in these params")
    # On shapes there are no values to compare with.
    assert len(jlora.load_peft(folder, jax.eval_shape(lambda: PARAMS), NAMES).plan.sites) == 2


def test_a_manifest_of_other_tensors_is_refused(tmp_path):
    adapted = jlora.adapterize(PARAMS, {"up/kernel": jlora.LoRA(2, init="random")})
    jlora.save_peft(tmp_path / "adapter", adapted, NAMES)
    with_tensors(tmp_path / "adapter", lambda t: t.update({A: t[A] + 1}))
    refused(tmp_path / "adapter", "describes other tensors than adapter_model.safetensors holds; delete it")
    (tmp_path / "adapter" / "jlora_manifest.json").write_text('{"format": 9}')
    refused(tmp_path / "adapter", "is damaged or from another version")


EDITS = {
    "lora_alpha": (8, "lora_alpha is 8, but jlora_manifest.json says that it was written as 2"),
    "lora_dropout": (0.1, "lora_dropout is 0.1, but jlora_manifest.json says that it was written as 0.0"),
    "use_rslora": (True, "use_rslora is True, but .* False"),
    "alpha_pattern": ({"up": 3}, "alpha_pattern is {'up': 3}, but .* {}"),
}


@pytest.mark.parametrize("name", EDITS)
def test_settings_that_were_edited_are_refused_with_both_values(name, tmp_path):
    adapted = jlora.adapterize(PARAMS, {"up/kernel": jlora.LoRA(2, alpha=2, init="random")})
    jlora.save_peft(tmp_path / "adapter", adapted, NAMES)
    jlora.load_peft(tmp_path / "adapter", PARAMS, NAMES)
    value, message = EDITS[name]
    with_config(tmp_path / "adapter", **{name: value})
    refused(tmp_path / "adapter", f"adapter_config.json: {message}")


def with_manifest(folder, change):
    file = folder / "jlora_manifest.json"
    told = json.loads(file.read_text())
    change(told)
    file.write_text(json.dumps(told))


def at_origin(**values):
    return lambda told: told["tensors"][0]["from"][0].update(values)


MANIFESTS = {
    "another alpha": (
        lambda told: told["leaves"][0]["method"].update(alpha=9),
        "says that 'up.weight' has LoRA.rank=2, alpha=9.*rank 2 and scale 4.5, but by adapter_config.json it has .* scale 1",
    ),
    "an older one": (
        lambda told: (told.pop("settings"), told["leaves"][0]["method"].update(rank=3, alpha=3)),
        "rank 3 and scale 1, but by adapter_config.json it has rank 2 and scale 1",
    ),
    "half of the ranks": (at_origin(ranks=[0, 1]), r"the ranks \[\(0, 1\)\] of '.*lora_A.weight' are not all of its 2"),
    "ranks of null": (at_origin(ranks=None), "damaged or from another version .ranks is None"),
    "an index of null": (at_origin(index=None), "damaged or from another version .index is None"),
    "an origin of text": (lambda told: told["tensors"][0].update({"from": ["x"]}), "from is .'x'"),
    "no leaf": (lambda told: told["leaves"][0].pop("leaf"), "damaged .* .KeyError: 'leaf'."),
    "no profile": (lambda told: told.pop("profile"), "damaged .* .KeyError: 'profile'."),
    "leaves of null": (lambda told: told.update(leaves=None), "leaves is None"),
    "an unknown method": (
        lambda told: told["leaves"][0].update(method={"method": "Nope"}),
        "damaged .*a method table needs",
    ),
    "a rank of text": (lambda told: told["leaves"][0]["method"].update(rank="x"), "damaged .*, got 'x'"),
    "a rank of tables": (lambda told: told["leaves"][0]["method"].update(rank=[{}]), "damaged .*, got ...,"),
}


@pytest.mark.parametrize("change, message", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_was_edited_is_refused_by_name(change, message, tmp_path):
    adapted = jlora.adapterize(PARAMS, {"up/kernel": jlora.LoRA(2, alpha=2, init="random")})
    jlora.save_peft(tmp_path / "adapter", adapted, NAMES)
    with_manifest(tmp_path / "adapter", change)
    refused(tmp_path / "adapter", f"jlora_manifest.json.*{message}")


def test_values_wider_than_the_base_s_adapters_are_refused(folder):
    with_tensors(folder, lambda t: t.update({A: t[A].astype("f8")}))
    refused(folder, "has dtype float64, more than the float32 that its base's adapters have")
