"""Writes `glora.npz`: what the authors' entangled layer does in all its configurations, for `tests/methods/test_glora.py`.

    python tests/golden/make_glora.py FOLDER

FOLDER is a checkout of github.com/Arnav0400/ViT-Slim at commit 0fed674. Run with a Python that has torch. Weights are written
as `[in, out]`, the factors under the names of `jlora.GLoRA`, and configurations as numbers: the places of their kinds in
"none", "constant", "vector", "low-rank", for A, B, C, D and E.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

IN, OUT, RANK, ROWS, STEPS, RATE = 5, 4, 3, 3, 10, 0.02
KINDS = {"none": 0, "constant": 1, "vector": 2, f"LoRA_{RANK}": 3}


def arrays(layer):
    """The supports under jlora's names."""
    found = {
        name: getattr(layer, name).detach().numpy().copy() for name in ("Ad", "Au", "Bd", "Bu", "Cd", "Cu", "D", "E")
    }
    turned = {"au": found["Au"].T, "ad": found["Ad"].T, "bu": found["Bu"].T, "bd": found["Bd"].T}
    return turned | {"cu": found["Cu"][:, 0], "cd": found["Cd"], "d": found["D"], "e": found["E"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    sys.path.insert(0, str(parser.parse_args().folder / "GLoRA"))
    torch.Tensor.cuda = lambda self: self  # their zeros go to a GPU
    import layer as theirs

    torch.manual_seed(0)
    layer = theirs.ModuleInjection.make_scalable(torch.nn.Linear(IN, OUT), RANK)
    layer.weight.requires_grad = layer.bias.requires_grad = False
    trained = [p for p in layer.parameters() if p.requires_grad]
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.5)
    x, target = torch.randn(ROWS, IN), torch.randn(ROWS, OUT)
    out = {
        "w": layer.weight.numpy().T.copy(),
        "bias": layer.bias.numpy().copy(),
        "x": x.numpy(),
        "target": target.numpy(),
    }
    out |= {f"start/{name}": array for name, array in arrays(layer).items()}
    out["choices"] = np.array([[KINDS[c[name]] for name in "ABCDE"] for c in layer.configs], np.int32)

    def output(number):
        layer.eval_config = layer.configs[number]
        return layer(x)

    out["outputs"] = np.stack([output(number).detach().numpy() for number in range(len(layer.configs))])
    optimizer, picked, losses = torch.optim.SGD(trained, lr=RATE), np.arange(STEPS) * 47 % len(layer.configs), []
    for number in picked:
        loss = torch.sum((output(number) - target) ** 2)
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    out |= {"picked": picked, "losses": np.array(losses)} | {f"after/{name}": a for name, a in arrays(layer).items()}
    np.savez_compressed(Path(__file__).with_name("glora.npz"), **out)


if __name__ == "__main__":
    main()
