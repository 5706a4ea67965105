"""Writes `bottleneck.npz`: what the authors' bottleneck layers do, for `tests/methods/test_bottleneck.py`.

    python tests/golden/make_bottleneck.py FOLDER

FOLDER is a checkout of github.com/AGI-Edgerunners/LLM-Adapters at commit 8166572. Run with a Python that has torch and
transformers. Of that code the one file of the layers is run; blank modules stand in for what it imports of its
own package. Its weights are written transposed, as `[in, out]`.
"""

import argparse
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch

IN, OUT, RANK, STEPS, RATE = 6, 5, 3, 10, 0.05
# By jlora's name of the side: theirs, the sizes at both ends of the network, the activation, the scale.
SIDES = {
    "parallel": ("parallel_adapter", (IN, OUT), "tanh", 1.5),
    "output": ("output_adapter", (OUT, OUT), "gelu", "learned"),
    "input": ("mh_adapter", (IN, IN), "silu", 0.5),
}


def layers(folder):
    """Their module, with a blank package around it."""
    for name in ("blank", "blank.tuners", "blank.utils"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []
    for name in ("PeftConfig", "PeftType", "transpose"):
        setattr(sys.modules["blank.utils"], name, type(name, (), {}))
    file = folder / "peft" / "src" / "peft" / "tuners" / "bottleneck.py"
    spec = importlib.util.spec_from_file_location("blank.tuners.bottleneck", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(tensor):
    """A tensor as `[in, out]`, or a vector as it is."""
    return tensor.detach().numpy().T.copy()


def run(module, theirs, ends, activation, scaling):
    """A layer with a base of its own, its output, gradients, and ten steps."""
    layer = module.Linear(*ends, theirs, RANK, activation, 0.0, scaling, "bert")
    for adapter in (layer.adapter_down, layer.adapter_up):
        torch.nn.init.normal_(adapter.weight, std=0.6)
    layer.weight = torch.nn.Parameter(torch.randn(OUT, IN) / IN**0.5, requires_grad=False)
    layer.bias = torch.nn.Parameter(torch.randn(OUT), requires_grad=False)
    x, target = torch.randn(7, IN), torch.randn(7, OUT)
    trained = {"d": layer.adapter_down.weight, "u": layer.adapter_up.weight}
    trained |= {"scale": layer.adapter_scaling} if scaling == "learned" else {}
    out = {"w": numbers(layer.weight), "bias": numbers(layer.bias), "x": x.numpy(), "target": target.numpy()}
    out |= {f"start/{name}": numbers(tensor) for name, tensor in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=RATE)
    losses = []
    for step in range(STEPS):
        y = layer(x)
        loss = torch.mean((y - target) ** 2)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            out["y"] = y.detach().numpy().copy()
            out |= {f"gradient/{name}": numbers(tensor.grad) for name, tensor in trained.items()}
        optimizer.step()
    after = {f"after/{name}": numbers(tensor) for name, tensor in trained.items()}
    return out | after | {"losses": np.array(losses)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    module = layers(parser.parse_args().folder)
    torch.manual_seed(0)
    out = {}
    for side, settings in SIDES.items():
        out |= {f"{side}/{name}": array for name, array in run(module, *settings).items()}
    np.savez(Path(__file__).with_name("bottleneck.npz"), **out)


if __name__ == "__main__":
    main()
