"""Writes `dense_updates.npz`: what PEFT 0.21 does with FourierFT, RandLoRA and C3A on two tiny layers.

For `tests/methods/test_dense_updates.py`. Run with a Python that has torch and peft:
`python tests/golden/make_dense_updates.py`. Torch keeps weights as `[out, in]`; those are written transposed, as `[in,
out]`, and what the methods train as PEFT has it.
"""

from pathlib import Path

import numpy as np
import torch
from peft import C3AConfig, FourierFTConfig, RandLoraConfig, get_peft_model
from torch import nn

STEPS, RATE = 10, 0.02
TARGETS = ["wide", "square", "tall"]
# A method's name, its configuration and its trained fields.
CASES = {
    "fourierft": (
        lambda: FourierFTConfig(n_frequency=13, scaling=40.0, target_modules=TARGETS),
        ["fourierft_spectrum"],
    ),
    "fourierft_all": (
        lambda: FourierFTConfig(n_frequency=24, scaling=9.0, random_loc_seed=3, target_modules=TARGETS),
        ["fourierft_spectrum"],
    ),
    "randlora": (
        lambda: RandLoraConfig(r=3, randlora_alpha=6, projection_prng_key=1, target_modules=TARGETS),
        ["randlora_lambda", "randlora_gamma"],
    ),
    "c3a": (lambda: C3AConfig(block_size=2, target_modules=TARGETS), ["c3a_kernel"]),
}


class Layers(nn.Module):
    """More outputs than inputs, as many, and fewer; the smaller side is no multiple of a rank of 3."""

    def __init__(self):
        super().__init__()
        self.wide, self.square, self.tall = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 6)

    def forward(self, x):
        return self.tall(torch.tanh(self.square(torch.tanh(self.wide(x)))))


def array(tensor):
    return np.array(tensor.detach().float().numpy(), order="C")


def case(out, name):
    config, fields = CASES[name]
    torch.manual_seed(0)
    model = get_peft_model(Layers(), config())
    inner = model.base_model.model
    trained = {
        f"{layer}/{field}": getattr(getattr(inner, layer), field)["default"] for layer in TARGETS for field in fields
    }
    for key, tensor in trained.items():
        out[f"{name}/start/{key}"] = array(tensor)
        with torch.no_grad():
            tensor.add_(torch.randn_like(tensor) / 4)
        out[f"{name}/before/{key}"] = array(tensor)
    for layer in TARGETS:
        base = getattr(inner, layer).base_layer
        out[f"{name}/w/{layer}"], out[f"{name}/bias/{layer}"] = array(base.weight).T, array(base.bias)
    if name == "randlora":
        # Rounded to 16 bits where the machine has these; in float32 here, so that only one thing is compared.
        for side in ("A", "B"):
            drawer = getattr(model.base_model, f"randlora_{side}")
            drawer["default"] = drawer["default"].float()
            out[f"{name}/{side}"] = array(drawer["default"])
    x = torch.randn(5, 4)
    out[f"{name}/x"], out[f"{name}/y"] = array(x), array(model(x))
    optimizer, losses = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=0.0), []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = torch.sin(model(x)).sum()
        loss.backward()
        if step == 0:
            out |= {f"{name}/gradient/{key}": array(tensor.grad) for key, tensor in trained.items()}
        optimizer.step()
        losses.append(loss.item())
    out |= {f"{name}/after/{key}": array(tensor) for key, tensor in trained.items()}
    out[f"{name}/losses"] = np.array(losses)
    merged = model.merge_and_unload()
    out |= {f"{name}/merged/{layer}": array(getattr(merged, layer).weight).T for layer in TARGETS}


if __name__ == "__main__":
    out = {}
    for name in CASES:
        case(out, name)
    np.savez(Path(__file__).with_name("dense_updates.npz"), **out)
