"""Writes `poly.npz`: what PEFT 0.21 computes with Poly on two tiny layers, for `tests/methods/test_poly.py`.

Run with a Python that has torch and peft: `python tests/golden/make_poly.py`. The arrays of the adapters are as PEFT keeps
them, weights are transposed, as `[in, out]`. All is computed in evaluation mode, where no mixture is drawn.
"""

from pathlib import Path

import numpy as np
import torch
from make_gralora import SIZES, Layers, array, begin
from peft import PolyConfig, get_peft_model

CASES = {
    "whole": PolyConfig(r=2, n_tasks=3, n_skills=2, target_modules=["up", "down"]),
    "splits": PolyConfig(r=2, n_tasks=3, n_skills=3, n_splits=2, target_modules=["up", "down"]),
}
TASKS = torch.tensor([2, 0, 1, 0, 2])
NAMES = {"poly_lora_A.default": "a", "poly_lora_B.default": "b", "poly_router.default.module_logits": "router"}


def case(out, name, config):
    torch.manual_seed(0)
    model = get_peft_model(Layers(), config).eval()
    inner = model.base_model.model
    fields = {
        f"{layer}/{NAMES[field]}": getattr(inner, layer).get_parameter(field) for layer in SIZES for field in NAMES
    }
    begin(out, name, model, fields)
    x = torch.randn(len(TASKS), 3, SIZES["up"][0])
    y = model.base_model(x, task_ids=TASKS)
    torch.sin(y).sum().backward()
    out[f"{name}/x"], out[f"{name}/y"], out[f"{name}/tasks"] = array(x), array(y), array(TASKS)
    out |= {f"{name}/gradient/{field}": array(tensor.grad) for field, tensor in fields.items()}
    optimizer = torch.optim.AdamW(fields.values(), lr=0.02, weight_decay=0.0)
    for _ in range(10):
        optimizer.zero_grad()
        torch.sin(model.base_model(x, task_ids=TASKS)).sum().backward()
        optimizer.step()
    out |= {f"{name}/after/{field}": array(tensor) for field, tensor in fields.items()}


if __name__ == "__main__":
    out = {}
    for name, config in CASES.items():
        case(out, name, config)
    np.savez(Path(__file__).with_name("poly.npz"), **out)
