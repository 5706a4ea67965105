"""Writes `xlora.npz`: what PEFT 0.21 computes with X-LoRA on a tiny model, for `tests/test_xlora.py`.

Run with a Python that has torch and peft: `python tests/golden/make_xlora.py`. Weights are transposed, as `[in, out]`. The
model is a function of embeddings whose hidden states are those before its last layer.
"""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from make_gralora import array
from peft import LoraConfig, XLoraConfig, get_peft_model
from torch import nn

SIZES = {"up": (8, 12), "mid": (12, 8), "down": (8, 4)}
RANKS, ALPHAS = (2, 3), (4, 1.5)
CASES = {
    "plain": {},
    "layerwise": {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 6, "softmax_temperature": 2.0},
    "top": {"enable_softmax": False, "top_k_lora": 2, "enable_softmax_topk": True, "xlora_depth": 3, "xlora_size": 5},
    "best": {"layerwise_scalings": True, "top_k_lora": 1, "global_scaling_weight": 0.5, "use_trainable_adapters": True},
    "passed": {"scaling_pass_value": 0.25, "enable_softmax_topk": True, "global_scaling_weight": 2.0},
}


class Inner(nn.Module):
    """Three layers."""

    def __init__(self):
        super().__init__()
        for name, size in SIZES.items():
            setattr(self, name, nn.Linear(*size))


class Settings(dict):
    """A model's configuration, as PEFT asks of it."""

    use_cache = False


class Tiny(nn.Module):
    """A model as X-LoRA wants it."""

    def __init__(self):
        super().__init__()
        self.model, self.config = Inner(), Settings()

    def forward(self, input_ids=None, inputs_embeds=None, output_hidden_states=False, return_dict=True):
        inner = self.model
        hidden = torch.tanh(inner.mid(torch.tanh(inner.up(inputs_embeds))))
        return SimpleNamespace(logits=inner.down(hidden), hidden_states=(hidden,))


def turned(tensor):
    """A weight as `[in, out]`; a bias as it is."""
    return array(tensor.T if tensor.ndim == 2 else tensor)


def adapters(out, name, folder, count):
    """Writes folders of LoRA with random factors."""
    for slot in range(count):
        rank, alpha = RANKS[slot % 2], ALPHAS[slot % 2]
        lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(SIZES))
        model = get_peft_model(Tiny(), lora)
        for key, tensor in model.named_parameters():
            if tensor.requires_grad:
                with torch.no_grad():
                    tensor.copy_(torch.randn_like(tensor) / 2)
                layer, field = key.split(".")[-4], "a" if "lora_A" in key else "b"
                out[f"{name}/adapter/{slot}/{layer}/{field}"] = turned(tensor)
        model.save_pretrained(Path(folder) / str(slot))
    return {str(slot): str(Path(folder) / str(slot)) for slot in range(count)}


def trained(model):
    """What is trained, transposed: the classifier by number, and the adapters."""
    found = {}
    for key, tensor in model.named_parameters():
        if tensor.requires_grad:
            parts = key.split(".")
            if "internal_xlora_classifier" in key:
                found[f"classifier/{parts[-2]}/{parts[-1]}"] = tensor
            else:
                found[f"adapter/{parts[-2]}/{parts[-4]}/{'a' if 'lora_A' in key else 'b'}"] = tensor
    return found


def case(out, name, settings, count):
    torch.manual_seed(0)
    base = Tiny()
    for layer in SIZES:
        module = getattr(base.model, layer)
        out[f"{name}/base/{layer}"], out[f"{name}/bias/{layer}"] = array(module.weight.T), array(module.bias)
    with tempfile.TemporaryDirectory() as folder:
        config = XLoraConfig(hidden_size=8, adapters=adapters(out, name, folder, count), **settings)
        model = get_peft_model(base, config).eval()
    tensors = trained(model)
    for tensor in tensors.values():
        with torch.no_grad():
            tensor.mul_(2)
    out |= {f"{name}/before/{key}": turned(tensor) for key, tensor in tensors.items()}
    x = torch.randn(3, 5, 8)
    run = lambda: model(inputs_embeds=x).logits
    y = run()
    out[f"{name}/scalings"] = array(model.base_model.get_latest_scalings())
    torch.sin(y).sum().backward()
    out[f"{name}/x"], out[f"{name}/y"] = array(x), array(y)
    out |= {f"{name}/gradient/{key}": turned(tensor.grad) for key, tensor in tensors.items()}
    optimizer = torch.optim.AdamW(tensors.values(), lr=0.02, weight_decay=0.0)
    for _ in range(10):
        optimizer.zero_grad()
        torch.sin(run()).sum().backward()
        optimizer.step()
    out |= {f"{name}/after/{key}": turned(tensor) for key, tensor in tensors.items()}


if __name__ == "__main__":
    out = {}
    for name, settings in CASES.items():
        case(out, name, settings, 3 if name == "top" else 2)
    np.savez_compressed(Path(__file__).with_name("xlora.npz"), **out)
