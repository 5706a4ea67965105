"""Folders as they are found, beside PEFT: what it reads has its outputs here; what it reads as another function is refused.

Needs torch and PEFT: `pip install -e ".[test,parity]"`, then `pytest -m parity`.
"""

import copy
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora import TorchParameter

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
X = np.random.default_rng(0).normal(size=(4, 6)).astype("f4")
LAYERS = ["layers.0", "layers.1", "layers.2"]


def net():
    import torch

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(6, 6, bias=False) for _ in range(3)])
            self.cls = torch.nn.Linear(6, 2)

        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return self.cls(x)

    torch.manual_seed(0)
    return Net()


def in_jax(params, x):
    for name in LAYERS:
        x = jnp.tanh(x @ params[name]["kernel"])
    return x @ params["cls"]["kernel"] + params["cls"]["bias"]


def params_of(module):
    arrays = {name: jnp.asarray(value.detach().numpy()) for name, value in module.named_parameters()}
    layers = {name: {"kernel": arrays[f"{name}.weight"].T} for name in LAYERS}
    return {**layers, "cls": {"kernel": arrays["cls.weight"].T, "bias": arrays["cls.bias"]}}


NAMES = {"(?P<m>.*)/(kernel|bias)": "{m}"}
NAMED = {"lora_A": "lora_A.default", "lora_B": "lora_B.default"}
# name: (options of LoraConfig, settings as they are found, words in keys)
FOUND = {
    "a count in a pattern": ({"rank_pattern": {r"layers\.\d{1}": 4}}, {}, {}),
    "a group in a pattern": ({"rank_pattern": {r"layers\.(?:0|2)": 4}, "alpha_pattern": {"[12]": 5}}, {}, {}),
    "a look ahead": ({"alpha_pattern": {r".*\.(?!0)\d$": 3}, "use_rslora": True}, {}, {}),
    "nested repeats": ({"rank_pattern": {r"(\w+\.)+1": 4}}, {}, {}),
    "no settings that have a default": ({"r": 8, "lora_alpha": 8}, dict.fromkeys(("r", "lora_alpha", "bias"), ...), {}),
    "null settings": ({}, dict.fromkeys(("use_dora", "use_rslora", "lora_bias", "init_lora_weights", "task_type")), {}),
    "settings of later releases": ({}, {"future": 0.5, "other": None, "text": "x", "off": False}, {}),
    "alpha as a float": ({}, {"lora_alpha": 3.0}, {}),
    "a negative alpha": ({}, {"lora_alpha": -3}, {}),
    "a flag of 1": ({}, {"use_rslora": 1}, {}),
    "names of adapters": ({}, {}, NAMED),
    "names and magnitudes": ({"use_dora": True}, {}, {**NAMED, "magnitude_vector": "magnitude_vector.default.weight"}),
    "a magnitude's weight": ({"use_dora": True}, {}, {"magnitude_vector": "magnitude_vector.weight"}),
    "a saved module": ({"modules_to_save": ["cls"]}, {"modules_to_save": ["classifier", "cls", "score"]}, {}),
    "targets by a pattern": ({"target_modules": r"layers\.[0-9]{1}"}, {}, {}),
    "layers": ({"target_modules": ["0", "1"], "exclude_modules": ["layers.1"]}, {}, {}),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_peft_reads_computes_the_same_here(name, tmp_path):
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    options, settings, words = FOUND[name]
    base = net()
    defaults = {"r": 2, "lora_alpha": 3, "target_modules": LAYERS, "init_lora_weights": False}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**{**defaults, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 20)
    model.save_pretrained(tmp_path)
    change(tmp_path, settings, words)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(torch.as_tensor(X)).detach().numpy()
    params = params_of(base)
    ours = jlora.lift(in_jax)(jlora.load_peft(tmp_path, params, NAMES), X)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not np.allclose(in_jax(params, X), theirs, atol=1e-3)


def change(folder, settings, words):
    file = folder / "adapter_config.json"
    config = {**json.loads(file.read_text()), **settings}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    tensors = load_file(folder / "adapter_model.safetensors")
    for old, new in words.items():
        tensors = {re.sub(rf"{old}\b", new, key): value for key, value in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


def test_torchs_attention_has_the_outputs_that_peft_gives_it(tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = torch.nn.MultiheadAttention(6, 2, bias=False, batch_first=True)

        def forward(self, x):
            return self.mha(x, x, x)[0]

    torch.manual_seed(0)
    base = Attention()
    params = {
        "in": jnp.asarray(base.mha.in_proj_weight.detach().numpy().T),
        "out": jnp.asarray(base.mha.out_proj.weight.detach().numpy().T),
    }
    config = LoraConfig(r=2, target_modules=["mha"], alpha_pattern={"mha": 5}, init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path)

    def attend(p, x):
        q, k, v = (part.reshape(2, 3, 2, 3) for part in jnp.split(x @ p["in"], 3, axis=-1))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 3**0.5)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(2, 3, 6) @ p["out"]

    names = {key: TorchParameter(f"mha.{key}", "in out") for key in ("in_proj_weight", "out_proj.weight")}
    names = {"in": names["in_proj_weight"], "out": names["out_proj.weight"]}
    x = np.random.default_rng(1).normal(size=(2, 3, 6)).astype("f4")
    ours = jlora.lift(attend)(jlora.load_peft(tmp_path, params, names), x)
    np.testing.assert_allclose(ours, model(torch.as_tensor(x)).detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_a_convolution_in_groups_is_refused(dora, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    base = torch.nn.Sequential(torch.nn.Conv1d(4, 8, 3, groups=2))
    get_peft_model(base, LoraConfig(r=2, target_modules=["0"], use_dora=dora)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a convolution in 2 groups"):
        jlora.load_peft(tmp_path, {"k": jnp.ones((3, 2, 8))}, {"k": TorchParameter("0.weight", "in in out", "conv")})
