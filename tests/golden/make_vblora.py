"""Writes `vblora.npz`: what PEFT 0.21 computes with VB-LoRA on two layers, for `tests/methods/test_vblora.py`.

Run with a Python that has torch and peft: `python tests/golden/make_vblora.py`. Torch keeps weights as `[out, in]`; matrices
are written transposed, as `[in, out]`, and logits as PEFT has them.
"""

from pathlib import Path

import numpy as np
import torch
from peft import VBLoRAConfig, get_peft_model
from torch import nn

CONFIG = {"r": 3, "num_vectors": 5, "vector_length": 2, "topk": 2, "target_modules": ["up", "down"]}


class Layers(nn.Module):
    """Two layers of different sizes with a nonlinearity between."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 4, bias=False)
        self.down = nn.Linear(4, 8, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def main():
    torch.manual_seed(0)
    model = get_peft_model(Layers(), VBLoRAConfig(**CONFIG))
    inner = model.base_model.model
    fields = {
        f"{layer}/{side}": getattr(getattr(inner, layer), f"vblora_logits_{side}")["default"]
        for layer in ("up", "down")
        for side in "AB"
    } | {"bank": model.base_model.vblora_vector_bank["default"]}
    with torch.no_grad():
        for tensor in fields.values():
            tensor.copy_(torch.randn_like(tensor))
    weights = {
        f"w/{layer}": getattr(inner, layer).base_layer.weight.detach().numpy().T.copy() for layer in ("up", "down")
    }
    x = torch.randn(4, 6)
    out = {"x": x.numpy(), **weights} | {
        f"before/{name}": tensor.detach().numpy().copy() for name, tensor in fields.items()
    }
    y = model(x)
    torch.sin(y).sum().backward()
    out |= {"y": y.detach().numpy()} | {
        f"gradient/{name}": tensor.grad.numpy().copy() for name, tensor in fields.items()
    }
    rates = [{"params": [tensor], "lr": 0.002 if name == "bank" else 0.02} for name, tensor in fields.items()]
    optimizer = torch.optim.AdamW(rates, weight_decay=0.0)
    for _ in range(5):
        optimizer.zero_grad()
        torch.sin(model(x)).sum().backward()
        optimizer.step()
    out |= {f"after/{name}": tensor.detach().numpy().copy() for name, tensor in fields.items()}
    merged = model.merge_and_unload()
    out |= {f"merged/{layer}": getattr(merged, layer).weight.detach().numpy().T for layer in ("up", "down")}
    drawn = get_peft_model(nn.Sequential(nn.Linear(512, 512)), VBLoRAConfig(target_modules=["0"]))
    bank = drawn.base_model.vblora_vector_bank["default"].detach()
    out["drawn"] = np.array(
        [bank.abs().max(), bank.std(), drawn.base_model.model[0].vblora_logits_A["default"].std().item()]
    )
    np.savez(Path(__file__).with_name("vblora.npz"), **out)


if __name__ == "__main__":
    main()
