"""Writes `lorta.npz`: what LoRTA's reference computes on two layers of attention, for `tests/methods/test_lorta.py`.

Run with a Python that has torch, on a checkout of ihounie/lorta (fa13dcb): `python tests/golden/make_lorta.py CHECKOUT`.
Its fork of PEFT needs old libraries, so the function that makes the updates is taken out of its file and run alone; what its
`Linear.forward` adds is `x @ update.T * scaling`. Torch keeps weights as `[out, in]`; matrices are written transposed.
"""

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

LAYERS, HEADS, SIZE, RANK, ALPHA = 2, 3, 6, 4, 5
NAMES = ("lora_A", "lora_B", "lora_C_h", "lora_C_m", "lora_C_l")


def reference(checkout):
    """The reference's own function from the factors to the updates of all matrices."""
    file = Path(checkout) / "peft/src/peft/tuners/lorta/model.py"
    functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
    found = next(node for node in functions if node.name == "_compute_weights_from_tensor")
    space = {"torch": torch}
    exec(compile(ast.Module([found], []), str(file), "exec"), space)
    return space[found.name]


def main(checkout):
    torch.manual_seed(0)
    shapes = [(SIZE, RANK), (RANK, SIZE // HEADS), (HEADS, RANK), (4, RANK), (LAYERS, RANK)]
    factors = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in zip(NAMES, shapes)}
    config = SimpleNamespace(num_hidden_layers=LAYERS, num_attention_heads=HEADS)
    model = SimpleNamespace(config=config, **factors)
    tuner = SimpleNamespace(model=model, _map_layer_to_adapter=lambda layer, kind: f"{layer}/{kind}")
    base = {f"{layer}/{kind}": torch.randn(SIZE, SIZE) / SIZE**0.5 for layer in range(LAYERS) for kind in "qkvo"}
    x, update = torch.randn(5, SIZE), reference(checkout)

    def outputs():
        y, updates = x, update(tuner)
        for name, weight in base.items():
            y = torch.tanh(y @ weight.T + y @ updates[name].T * (ALPHA / RANK))
        return y

    out = {"x": x.numpy()} | {f"w/{name}": weight.T.numpy() for name, weight in base.items()}
    out |= {f"update/{name}": (delta.T * ALPHA / RANK).detach().numpy() for name, delta in update(tuner).items()}
    out |= {f"before/{name}": factor.detach().numpy().copy() for name, factor in factors.items()}
    y = outputs()
    torch.sin(y).sum().backward()
    out |= {f"gradient/{name}": factor.grad.numpy().copy() for name, factor in factors.items()} | {
        "y": y.detach().numpy()
    }
    optimizer = torch.optim.AdamW(factors.values(), lr=0.02, weight_decay=0.0)
    for _ in range(5):
        optimizer.zero_grad()
        torch.sin(outputs()).sum().backward()
        optimizer.step()
    out |= {f"after/{name}": factor.detach().numpy() for name, factor in factors.items()}
    np.savez(Path(__file__).with_name("lorta.npz"), **out)


if __name__ == "__main__":
    main(sys.argv[1])
