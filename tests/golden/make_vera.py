"""Writes `vera.npz`: what PEFT 0.21 computes with VeRA on two tiny layers of different sizes, for `tests/test_vera.py`.

Run with a Python that has torch and peft: `python tests/golden/make_vera.py`. Torch keeps weights as `[out, in]`; matrices
are written transposed, as `[in, out]`.
"""

from pathlib import Path

import numpy as np
import torch
from peft import VeraConfig, get_peft_model
from torch import nn

NAMES = {"vera_lambda_d": "d", "vera_lambda_b": "b"}


class Layers(nn.Module):
    """The largest input belongs to one layer, the largest output to the other."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 5)
        self.down = nn.Linear(5, 7)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def array(tensor):
    return np.array(tensor.detach().numpy().T, order="C")


def loss_of(y):
    return torch.sin(y).sum()


def layers_case(out):
    torch.manual_seed(0)
    model = get_peft_model(Layers(), VeraConfig(r=3, target_modules=["up", "down"], d_initial=0.1))
    inner = model.base_model.model
    fields = {
        f"{layer}/{field}": getattr(getattr(inner, layer), name)["default"]
        for layer in ("up", "down")
        for name, field in NAMES.items()
    }
    for name, tensor in fields.items():
        out[f"start/{name}"] = array(tensor)
        with torch.no_grad():
            tensor.copy_(torch.randn_like(tensor) / 2)
        out[f"before/{name}"] = array(tensor)
    for layer in ("up", "down"):
        base = getattr(inner, layer).base_layer
        out[f"{layer}/w"], out[f"{layer}/bias"] = array(base.weight), array(base.bias)
    out["a"], out["b"] = (array(side["default"]) for side in (model.base_model.vera_A, model.base_model.vera_B))
    x = torch.randn(4, 6)
    y = model(x)
    loss_of(y).backward()
    out["x"], out["y"] = x.numpy(), y.detach().numpy()
    out |= {f"gradient/{name}": array(tensor.grad) for name, tensor in fields.items()}
    optimizer = torch.optim.AdamW(fields.values(), lr=0.02, weight_decay=0.0)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()
    out |= {f"after/{name}": array(tensor) for name, tensor in fields.items()}
    merged = model.merge_and_unload()
    out |= {f"merged/{layer}": array(getattr(merged, layer).weight) for layer in ("up", "down")}


def start_case(out):
    """Extreme value and deviation of the projections that PEFT draws for 256 -> 128, rank 16."""
    model = get_peft_model(nn.Sequential(nn.Linear(256, 128)), VeraConfig(r=16, target_modules=["0"]))
    for name, side in (("a", model.base_model.vera_A), ("b", model.base_model.vera_B)):
        drawn = array(side["default"])
        out[f"drawn/{name}"] = np.array([np.abs(drawn).max(), drawn.std()])


if __name__ == "__main__":
    out = {}
    layers_case(out)
    start_case(out)
    np.savez(Path(__file__).with_name("vera.npz"), **out)
