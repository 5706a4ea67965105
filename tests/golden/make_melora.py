"""Writes `melora.npz`: what the authors' layer computes, for `tests/methods/test_products.py`.

    python tests/golden/make_melora.py FOLDER

FOLDER is a checkout of github.com/ChasonShi/MELoRA at commit 4ebb8b4 (2024). Run with a Python that has torch. Their copy of
PEFT 0.5 needs a transformers of that time, so the two classes of the layer are taken out of its file. Matrices are written
transposed, as `[in, out]`.
"""

import argparse
import ast
import math
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

FILE = "peft-0.5.0/src/peft/tuners/melora.py"
IN, OUT, RANK, BLOCKS, ALPHA = 12, 8, 2, 4, 3


def layer_class(folder):
    """The authors' `Linear`."""
    body = ast.parse((folder / FILE).read_text()).body
    wanted = [node for node in body if isinstance(node, ast.ClassDef) and node.name in ("LoraLayer", "Linear")]
    names = {"nn": nn, "torch": torch, "F": F, "math": math, "warnings": warnings, "BaseTunerLayer": object}
    names["transpose"] = lambda weight, fan_in_fan_out: weight.T if fan_in_fan_out else weight
    exec(compile(ast.Module(wanted, []), FILE, "exec"), names)
    return names["Linear"]


def array(tensor):
    return np.array(tensor.detach().numpy(), order="C")


def fields(layer, of=lambda parameter: parameter):
    """`a [blocks, in / blocks, rank]` and `b [blocks, rank, out / blocks]`."""
    sides = {"a": layer.lora_A, "b": layer.lora_B}
    return {name: np.stack([array(of(mini.weight).T) for mini in minis]) for name, minis in sides.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    linear = layer_class(parser.parse_args().folder)
    torch.manual_seed(0)
    layer = linear("default", IN, OUT, r=[RANK] * BLOCKS, lora_alpha=[ALPHA] * BLOCKS)
    out = {"w": array(layer.weight.T), "bias": array(layer.bias)}
    out |= {f"start/{name}": value for name, value in fields(layer).items()}
    trained = [mini.weight for mini in (*layer.lora_A, *layer.lora_B)]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(torch.randn_like(parameter) / 3)
    out |= {f"before/{name}": value for name, value in fields(layer).items()}
    x = torch.randn(1, 5, IN)  # their slices take three axes
    y = layer(x)
    torch.sin(y).sum().backward()
    out |= {"x": array(x[0]), "y": array(y[0])}
    out |= {f"gradient/{name}": value for name, value in fields(layer, lambda each: each.grad).items()}
    optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.0)
    for _ in range(10):
        optimizer.zero_grad()
        torch.sin(layer(x)).sum().backward()
        optimizer.step()
    out |= {f"after/{name}": value for name, value in fields(layer).items()}
    np.savez(Path(__file__).with_name("melora.npz"), **out)


if __name__ == "__main__":
    main()
