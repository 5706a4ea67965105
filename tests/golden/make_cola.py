"""Writes `cola.npz`: two links of COLA as a loop over PEFT 0.21, for `tests/chains/test_cola_golden.py`.

Run with a Python that has torch and peft: `python tests/golden/make_cola.py`. A link is LoRA trained by a fresh AdamW;
`merge_and_unload` ends it. Matrices are written transposed, as `[in, out]`.
"""

from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

LAYERS = ("up", "down")


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 5, bias=False)
        self.down = nn.Linear(5, 4, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def array(tensor):
    return np.array(tensor.detach().numpy().T, order="C")


def link(model, x, number, out):
    """Trains one link; writes its starting factors and the merged weights."""
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, target_modules=list(LAYERS)))
    inner = model.base_model.model
    tensors = []
    for layer in LAYERS:
        module = getattr(inner, layer)
        for side, name in ((module.lora_A, "a"), (module.lora_B, "b")):
            tensors.append(side["default"].weight)
            out[f"{number}/{layer}/{name}"] = array(tensors[-1])
    optimizer = torch.optim.AdamW(tensors, lr=0.05, weight_decay=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        torch.sin(model(x)).sum().backward()
        optimizer.step()
    merged = model.merge_and_unload()
    out |= {f"{number}/{layer}/merged": array(getattr(merged, layer).weight) for layer in LAYERS}
    return merged


if __name__ == "__main__":
    torch.manual_seed(0)
    model, x = Layers(), torch.randn(3, 6)
    out = {"x": x.numpy(), **{f"{layer}/w": array(getattr(model, layer).weight) for layer in LAYERS}}
    for number in range(2):
        model = link(model, x, number, out)
    np.savez(Path(__file__).with_name("cola.npz"), **out)
