"""Writes `inits.npz`: OLoRA and PiSSA as PEFT 0.21 starts and trains them, for `tests/test_weight_inits.py`.

Run with a Python that has torch and peft: `python tests/golden/make_inits.py`. Everything is transposed to `[in, out]`.
"""

from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

VARIANTS = {
    "olora": {"init_lora_weights": "olora"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "olora_dora": {"init_lora_weights": "olora", "use_dora": True},
}


def array(tensor):
    return np.array(tensor.detach().numpy().T, order="C")


def case(name, options, out):
    torch.manual_seed(0)
    linear, x = nn.Linear(7, 5), torch.randn(4, 7)
    out[f"{name}/w"], out[f"{name}/bias"], out[f"{name}/x"] = array(linear.weight), array(linear.bias), x.numpy()
    config = LoraConfig(r=3, lora_alpha=4, target_modules=["0"], lora_dropout=0.0, **options)
    model = get_peft_model(nn.Sequential(linear), config)
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    out[f"{name}/residual"], out[f"{name}/a"], out[f"{name}/b"] = array(layer.base_layer.weight), array(a), array(b)
    torch.sin(model(x)).sum().backward()
    out[f"{name}/gradient/a"], out[f"{name}/gradient/b"] = array(a.grad), array(b.grad)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)
    for _ in range(6):
        optimizer.zero_grad()
        torch.sin(model(x)).sum().backward()
        optimizer.step()
    out[f"{name}/y"] = model(x).detach().numpy()
    out[f"{name}/merged"] = array(model.merge_and_unload()[0].weight)


def main():
    out = {}
    for name, options in VARIANTS.items():
        case(name, options, out)
    torch.manual_seed(1)
    config = LoraConfig(r=8, target_modules=["0"], init_lora_weights="orthogonal")
    layer = get_peft_model(nn.Sequential(nn.Linear(256, 128)), config).base_model.model[0]
    factors = [array(layer.lora_A["default"].weight), array(layer.lora_B["default"].weight)]
    out["orthogonal"] = np.array([factor.std() for factor in factors] + [np.abs(factors[0] @ factors[1]).max()])
    np.savez(Path(__file__).parent / "inits.npz", **out)


if __name__ == "__main__":
    main()
