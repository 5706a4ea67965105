"""Writes `gralora.npz`: what PEFT 0.21 computes with GraLoRA on two tiny layers, for `tests/methods/test_products.py`.

Run with a Python that has torch and peft: `python tests/golden/make_gralora.py`. The arrays of the adapters are as PEFT keeps
them, weights are transposed, as `[in, out]`.
"""

from pathlib import Path

import numpy as np
import torch
from peft import GraloraConfig, get_peft_model
from torch import nn

SIZES = {"up": (8, 12), "down": (12, 4)}
CASES = {
    "plain": GraloraConfig(r=4, alpha=6, gralora_k=2, target_modules=["up", "down"]),
    "hybrid": GraloraConfig(r=4, alpha=6, gralora_k=4, hybrid_r=2, target_modules=["up", "down"]),
}


class Layers(nn.Module):
    """Two layers of different shapes."""

    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Linear(*size) for size in SIZES.values())

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def array(tensor):
    return np.array(tensor.detach().numpy(), order="C")


def adapters(model):
    """The trained arrays of PEFT as `up/gralora_A`."""
    named = {name.removesuffix(".weight"): tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    return {"/".join(name.removeprefix("base_model.model.").split(".")[:2]): tensor for name, tensor in named.items()}


def begin(out, name, model, fields):
    """Moves the trained arrays away from their start; writes both, and the layers' own arrays."""
    for field, tensor in fields.items():
        out[f"{name}/start/{field}"] = array(tensor)
        with torch.no_grad():
            tensor.add_(torch.randn_like(tensor) / 3)
        out[f"{name}/before/{field}"] = array(tensor)
    for layer in SIZES:
        base = getattr(model.base_model.model, layer).base_layer
        out[f"{name}/base/{layer}"], out[f"{name}/bias/{layer}"] = array(base.weight.T), array(base.bias)


def case(out, name, config):
    torch.manual_seed(0)
    model = get_peft_model(Layers(), config)
    fields = adapters(model)
    begin(out, name, model, fields)
    x = torch.randn(5, SIZES["up"][0])
    y = model(x)
    torch.sin(y).sum().backward()
    out[f"{name}/x"], out[f"{name}/y"] = array(x), array(y)
    out |= {f"{name}/gradient/{field}": array(tensor.grad) for field, tensor in fields.items()}
    optimizer = torch.optim.AdamW(fields.values(), lr=0.02, weight_decay=0.0)
    for _ in range(10):
        optimizer.zero_grad()
        torch.sin(model(x)).sum().backward()
        optimizer.step()
    out |= {f"{name}/after/{field}": array(tensor) for field, tensor in fields.items()}
    merged = model.merge_and_unload()
    out |= {f"{name}/merged/{layer}": array(getattr(merged, layer).weight.T) for layer in SIZES}


if __name__ == "__main__":
    out = {}
    for name, config in CASES.items():
        case(out, name, config)
    np.savez(Path(__file__).with_name("gralora.npz"), **out)
