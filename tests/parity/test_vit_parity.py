"""Vision Transformers live beside transformers and PEFT: logits, folders of models, and adapters, both ways.

Needs torch, transformers and PEFT: `pip install -e ".[test,parity]"`, then `pytest -m parity`.
"""

import json
import warnings

import jax
import numpy as np
import pytest
from models_data import GOLDEN, golden
from safetensors.numpy import load_file, save_file

import jlora
from jlora import models

pytestmark = pytest.mark.parity
IMAGES = golden("vit")["images"]
HEAD = {"classifier/(kernel|bias)": jlora.Full()}
QUERIES, LORA = r".*/(q|v)_proj/kernel", jlora.LoRA(rank=2, alpha=6)
EXPORTS = {
    "queries, values and the head": {QUERIES: LORA, **HEAD},
    "every linear weight": {jlora.ALL_LINEAR: LORA},
    "patches": {".*/projection/kernel": LORA, ".*/fc1/kernel": LORA, **HEAD},
    "dora of patches": {".*/projection/kernel": jlora.DoRA(LORA), QUERIES: jlora.DoRA(LORA)},
    "patches themselves": {QUERIES: LORA, ".*/projection/(kernel|bias)": jlora.Full()},
    "norms and biases": {
        QUERIES: LORA,
        ".*/layernorm_before/(scale|bias)": jlora.Full(),
        ".*/q_proj/bias": jlora.Full(),
    },
    "loha": {".*/fc1/kernel": jlora.LoHa(2)},
}
#: target_modules and modules_to_save of PEFT's LoRA.
IMPORTS = {
    "queries and values": (["q_proj", "v_proj"], ["classifier"]),
    "all-linear": ("all-linear", None),
    "patches": (["projection", "fc2"], ["classifier"]),
}


def theirs(folder=GOLDEN / "vit"):
    import transformers

    return transformers.ViTForImageClassification.from_pretrained(folder)


def in_torch(model):
    import torch

    model.eval()
    with torch.no_grad():
        return model(torch.as_tensor(IMAGES.transpose(0, 3, 1, 2))).logits.numpy()


def in_jax(model, adapted):
    return np.asarray(jlora.lift(lambda params, x: model.apply({"params": params}, x))(adapted, IMAGES))


def adapted_of(spec, scan_layers):
    model, params = models.load(GOLDEN / "vit", scan_layers=scan_layers)
    sites = jlora.sites(lambda p, x: model.apply({"params": p}, x), params, IMAGES)
    adapted, keys = jlora.adapterize(params, spec, sites=sites), iter(jax.random.split(jax.random.key(3), 1000))
    noise = jax.tree.map(lambda leaf: leaf + jax.random.normal(next(keys), leaf.shape) / 5, adapted.params)
    return model, adapted.replace(params=noise)


def test_a_model_and_its_new_head_go_to_transformers_and_back(tmp_path):
    model, params = models.load(GOLDEN / "vit")
    np.testing.assert_allclose(model.apply({"params": params}, IMAGES), in_torch(theirs()), atol=1e-4)
    model, params = models.make_classifier(model, params, 3, jax.random.key(0))
    models.save(tmp_path / "jax", model, params, GOLDEN / "vit")
    again = theirs(tmp_path / "jax")
    assert again.config.num_labels == 3
    np.testing.assert_allclose(model.apply({"params": params}, IMAGES), in_torch(again), atol=1e-4)
    again.save_pretrained(tmp_path / "torch")
    back = models.load(tmp_path / "torch")
    assert back[0] == model
    jax.tree.map(np.testing.assert_array_equal, back[1], params)


@pytest.mark.parametrize("name, scan_layers", [*((name, True) for name in EXPORTS), ("patches", False)])
@pytest.mark.filterwarnings("error:.*[Mm]issing.*", "error:.*[Uu]nexpected.*")
def test_peft_computes_what_jlora_computes_with_what_jlora_wrote(name, scan_layers, tmp_path):
    from peft import PeftModel

    model, adapted = adapted_of(EXPORTS[name], scan_layers)
    names = models.peft_names(model)
    jlora.save_peft(tmp_path / "out", adapted, names)
    expected = in_jax(model, adapted)
    np.testing.assert_allclose(in_torch(PeftModel.from_pretrained(theirs(), tmp_path / "out")), expected, atol=1e-4)
    np.testing.assert_allclose(
        in_jax(model, jlora.load_peft(tmp_path / "out", adapted.base, names)), expected, atol=1e-5
    )
    assert np.abs(expected - golden("vit")["output"]).max() > 0.1


def made_by_peft(name, folder):
    """A folder of PEFT's, and the logits of its model."""
    import peft
    import torch

    torch.manual_seed(0)
    targets, saved = IMPORTS[name]
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=saved, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the base's name, which a made model has not
        model = peft.get_peft_model(theirs(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape) / 10
    model.save_pretrained(folder)
    return in_torch(model)


@pytest.mark.parametrize("name, scan_layers", [*((name, True) for name in IMPORTS), ("all-linear", False)])
def test_jlora_computes_what_peft_computes_with_what_peft_wrote(name, scan_layers, tmp_path):
    expected = made_by_peft(name, tmp_path / "out")
    model, params = models.load(GOLDEN / "vit", scan_layers=scan_layers)
    adapted = jlora.load_peft(tmp_path / "out", params, models.peft_names(model))
    np.testing.assert_allclose(in_jax(model, adapted), expected, atol=1e-4)


def test_an_adapter_with_the_names_of_transformers_4_is_read_by_those(tmp_path):
    expected = made_by_peft("queries and values", tmp_path / "out")
    file, config = tmp_path / "out" / "adapter_model.safetensors", tmp_path / "out" / "adapter_config.json"
    older = {"vit.layers.": "vit.encoder.layer.", "n.q_proj": "n.attention.query", "n.v_proj": "n.attention.value"}

    def renamed(name):
        for new, old in older.items():
            name = name.replace(new, old)
        return name

    save_file({renamed(name): tensor for name, tensor in load_file(file).items()}, file)
    config.write_text(json.dumps({**json.loads(config.read_text()), "target_modules": ["query", "value"]}))
    model, params = models.load(GOLDEN / "vit")
    adapted = jlora.load_peft(tmp_path / "out", params, models.peft_names(model, former=True))
    np.testing.assert_allclose(in_jax(model, adapted), expected, atol=1e-4)
    with pytest.raises(ValueError, match="no leaf of the params is 'vit.encoder.layer.0.attention.attention.query'"):
        jlora.load_peft(tmp_path / "out", params, models.peft_names(model))
