"""Writes `lorafa.npz`: ten steps of PEFT 0.21's LoRA-FA optimizer on two tiny layers, for `tests/methods/test_lorafa.py`.

Run with a Python that has torch and peft: `python tests/golden/make_lorafa.py`. Torch keeps weights as `[out, in]`; matrices
are written transposed, as `[in, out]`. PEFT multiplies the gradients in bfloat16 where torch has that type; here it is told
that it has not, so that its numbers are those of its formula. Its Adam adds eps before the bias correction, optax's after it;
here eps is too small to matter.
"""

from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, lorafa
from torch import nn

LAYERS = {"up": (6, 10), "down": (10, 5)}
STEPS, RATE = 10, 0.02


class Layers(nn.Module):
    """Two layers of different shapes."""

    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Linear(*size) for size in LAYERS.values())

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def array(tensor):
    return np.array(tensor.detach().numpy().T, order="C")


def main():
    lorafa.is_bf16_available = lambda: False
    torch.manual_seed(0)
    model = get_peft_model(Layers(), LoraConfig(r=3, lora_alpha=6, target_modules=list(LAYERS)))
    inner, out = model.base_model.model, {}
    sides = {f"{layer}/{side}": getattr(getattr(inner, layer), f"lora_{side.upper()}")["default"].weight
             for layer in LAYERS for side in "ab"}  # fmt: skip
    optimizer = create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=RATE)
    optimizer.param_groups[0]["eps"] = 1e-10
    for name, tensor in sides.items():
        if name[-1] == "b":
            with torch.no_grad():
                tensor.copy_(torch.randn_like(tensor) / 3)
        out[f"before/{name}"] = array(tensor)
    for layer in LAYERS:
        base = getattr(inner, layer).base_layer
        out[f"w/{layer}"], out[f"bias/{layer}"] = array(base.weight), array(base.bias)
    x = torch.randn(7, LAYERS["up"][0])
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = torch.sin(model(x)).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    out |= {f"after/{name}": array(tensor) for name, tensor in sides.items()}
    np.savez(Path(__file__).with_name("lorafa.npz"), x=x.numpy(), losses=np.array(losses), **out)


if __name__ == "__main__":
    main()
