"""Writes `combine.npz`: three adapters of two tiny layers, and what PEFT 0.21's `add_weighted_adapter` makes of them.

Run with a Python that has torch and peft: `python tests/golden/make_combine.py`. Torch keeps weights as `[out, in]`; matrices
are written transposed, as `[in, out]`. The third adapter has no part on the second layer. Combinations that prune at random are
taken with density 1, where they prune nothing, since torch's draws are not JAX's.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from combinations import ADAPTERS, CASES, LAYERS, WEIGHTS
from peft import LoraConfig, get_peft_model
from torch import nn


class Layers(nn.Module):
    """Two layers of different shapes."""

    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Linear(*size, bias=False) for size in LAYERS.values())

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def array(tensor):
    return np.array(tensor.detach().numpy().T, order="C")


def factors(model, adapter):
    """`a` and `b` of an adapter by layer."""
    layers = {name: getattr(model.base_model.model, name) for name in LAYERS}
    found = {name: layer for name, layer in layers.items() if adapter in getattr(layer, "lora_A", {})}
    sides = {f"{name}/a": layer.lora_A[adapter].weight for name, layer in found.items()}
    sides |= {f"{name}/b": layer.lora_B[adapter].weight for name, layer in found.items()}
    return sides


def main():
    warnings.simplefilter("ignore")  # that nothing is pruned at density 1
    torch.manual_seed(0)
    model, out = None, {}
    for name, (rank, alpha, targets) in ADAPTERS.items():
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
        model = get_peft_model(Layers(), config, name) if model is None else model
        if name not in model.peft_config:
            model.add_adapter(name, config)
        for key, tensor in factors(model, name).items():
            tensor.data.copy_(torch.randn_like(tensor))
            out[f"{name}/{key}"] = array(tensor)
    assert model is not None
    for layer in LAYERS:
        out[f"w/{layer}"] = array(getattr(model.base_model.model, layer).base_layer.weight)
    for case, options in CASES.items():
        model.add_weighted_adapter(list(ADAPTERS), WEIGHTS, case.replace(" ", "-"), case.split(" ")[0], **options)
        found = factors(model, case.replace(" ", "-"))
        out |= {f"{case}/{key}": array(tensor) for key, tensor in found.items()}
    np.savez(Path(__file__).with_name("combine.npz"), **out)


if __name__ == "__main__":
    main()
