"""Writes `shira.npz`: what PEFT 0.21's SHiRA computes on a tiny layer, for `tests/test_shira.py`.

Run with a Python that has torch and peft: `python tests/golden/make_shira.py`. Torch keeps weights as `[out, in]` and its
entries in that order; here weights are `[in, out]`, and entries are in the order of that, flat.
"""

from pathlib import Path

import numpy as np
import torch
from peft import ShiraConfig, get_peft_model
from torch import nn

IN, OUT, RANK = 6, 5, 1


def mask_of(base_layer, r, **kwargs):
    """The r * (in + out) entries of largest magnitude."""
    order = base_layer.weight.detach().abs().flatten().argsort(descending=True)
    mask = torch.zeros(OUT * IN)
    mask[order[: r * (IN + OUT)]] = 1
    return mask.view(OUT, IN)


def main():
    torch.manual_seed(0)
    config = ShiraConfig(r=RANK, target_modules=["0"], mask_type="largest", init_weights=False)
    config.mask_fn = mask_of
    model = get_peft_model(nn.Sequential(nn.Linear(IN, OUT)), config)
    layer, x = model.base_model.model[0], torch.randn(4, IN)
    values, (out_index, in_index) = layer.shira_weight["default"], layer.shira_indices["default"].numpy()
    flat = in_index * OUT + out_index
    order = np.argsort(flat)

    def packed(tensor):
        return np.array(tensor.detach().numpy()[order])

    found = {"x": x.numpy(), "bias": layer.base_layer.bias.detach().numpy(), "index": flat[order].astype(np.int32)}
    found["w"] = np.array(layer.base_layer.weight.detach().numpy().T, order="C")
    found["values"] = packed(values)
    optimizer = torch.optim.AdamW([values], lr=0.01, weight_decay=0.0)
    for step in range(5):
        optimizer.zero_grad()
        y = model(x)
        torch.sin(y).sum().backward()
        if step == 0:
            found |= {"y": y.detach().numpy(), "gradient": packed(values.grad)}
        optimizer.step()
    found["after"] = packed(values)
    layer.set_scale("default", 0.5)
    found["merged"] = np.array(model.merge_and_unload()[0].weight.detach().numpy().T, order="C")
    np.savez(Path(__file__).parent / "shira.npz", **found)


if __name__ == "__main__":
    main()
