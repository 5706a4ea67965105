"""Damaged and hostile adapter folders get one clear sentence, before a tensor is read."""

import json
import pickle
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora.interchange.folder import AdapterFolder

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
    "another method": ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not read; known are LORA, ADALORA, VERA, SHIRA"),
    "no method": ({"peft_type": None}, "peft_type None is not read"),
    "a text for r": ({"r": "4"}, "r must be a positive integer, got '4'"),
    "r of 0": ({"r": 0}, "r must be a positive integer, got 0"),
    "a huge r": ({"r": 10**9}, r"wanted \[1000000000, 6\]"),
    "alpha is no number": ({"lora_alpha": "x"}, "must be a finite number, got 'x'"),
    "alpha is infinite": ({"lora_alpha": float("inf")}, "must be a finite number, got inf"),
    "a flag that is none": ({"use_dora": "yes"}, "use_dora must be true or false, got 'yes'"),
    "patterns that are no table": ({"rank_pattern": [1]}, r"rank_pattern must be a table, got \[1\]"),
    "a pattern that takes forever": ({"rank_pattern": {"(a+)+b": 1}}, "rank_pattern holds .* is no pattern"),
    "an unknown setting": ({"use_magic": True}, "the setting 'use_magic' = True is unknown"),
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


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"a":' * 5000], ids=["empty", "a list", "cut off", "nested"])
def test_settings_that_are_no_json_object_are_refused(content, folder):
    (folder / "adapter_config.json").write_text(content)
    refused(folder, "not valid JSON|wanted a JSON object")


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


def test_a_manifest_of_other_tensors_is_refused(tmp_path):
    adapted = jlora.adapterize(PARAMS, {"up/kernel": jlora.LoRA(2, init="random")})
    jlora.save_peft(tmp_path / "adapter", adapted, NAMES)
    with_tensors(tmp_path / "adapter", lambda t: t.update({A: t[A] + 1}))
    refused(tmp_path / "adapter", "describes other tensors than adapter_model.safetensors holds; delete it")
    (tmp_path / "adapter" / "jlora_manifest.json").write_text('{"format": 9}')
    refused(tmp_path / "adapter", "is damaged or from another version")


def test_values_wider_than_the_base_s_adapters_are_refused(folder):
    with_tensors(folder, lambda t: t.update({A: t[A].astype("f8")}))
    refused(folder, "has dtype float64, more than the float32 that its base's adapters have")
