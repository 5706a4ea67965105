"""Writes `meteora.npz`: ten steps of MeteoRA on two tiny layers, for `tests/test_meteora.py`.

Run with a Python that has torch: `python tests/golden/make_meteora.py`. The formulas of the authors' code (its loop over
adapters, and its gate loss over logits that are shifted against the labels), written anew in torch and computed in 64 bits.
Weights are `[in, out]`.
"""

from pathlib import Path

import numpy as np
import torch

SIZES = {"up": (8, 12), "down": (12, 8)}
RANKS, SCALES = (2, 3, 1), (2.0, 0.5, 3.0)
# Name: choices, temperature, whether the adapters are trained beside the gates, weight of the gate loss.
CASES = {"gates": (2, 3.0, False, 50.0), "all": (2, 1.0, True, 0.5), "one": (1, 1.0, False, 50.0)}


def routed(x, w, gate, factors, k, tau):
    """The output and the gate's logits."""
    logits = x @ gate
    top, chosen = torch.topk(logits, k, dim=-1)
    amounts = torch.ones_like(top) if k == 1 else torch.softmax(top / tau, dim=-1)
    y = x @ w
    for slot, (a, b, scale) in enumerate(factors):
        for j in range(k):
            mine = (chosen[..., j] == slot).to(x.dtype) * amounts[..., j]
            y = y + mine[..., None] * scale * ((x @ a) @ b)
    return y, logits


def gate_loss(each, labels):
    """Cross-entropy of all layers' logits, each held against the label of the token that follows."""
    flat = torch.cat([logits[:, :-1].reshape(-1, logits.shape[-1]) for logits in each])
    return torch.nn.functional.cross_entropy(flat, labels[:, 1:].reshape(-1).repeat(len(each)))


def case(out, name, k, tau, train_adapters, beta):
    random = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=random, dtype=torch.float64)

    tensors = {}
    for layer, (rows, columns) in SIZES.items():
        tensors[f"{layer}/w"] = normal(rows, columns, scale=rows**-0.5)
        tensors[f"{layer}/gate"] = normal(rows, len(RANKS), scale=rows**-0.5)
        for slot, rank in enumerate(RANKS):
            tensors[f"{layer}/a{slot}"] = normal(rows, rank, scale=rows**-0.5)
            tensors[f"{layer}/b{slot}"] = normal(rank, columns, scale=0.5)
    x, labels = normal(4, 6, 8), torch.randint(0, len(RANKS), (4, 6), generator=random)
    labels[0, 3:] = -100
    out |= {f"{name}/before/{key}": tensor.numpy().copy() for key, tensor in tensors.items()}
    trained = {
        key: t for key, t in tensors.items() if key.endswith("gate") or (train_adapters and not key.endswith("w"))
    }
    for tensor in trained.values():
        tensor.requires_grad_()

    def forward():
        said = []
        z = x
        for n, layer in enumerate(SIZES):
            factors = [(tensors[f"{layer}/a{s}"], tensors[f"{layer}/b{s}"], scale) for s, scale in enumerate(SCALES)]
            z, logits = routed(z, tensors[f"{layer}/w"], tensors[f"{layer}/gate"], factors, k, tau)
            said.append(logits)
            z = torch.tanh(z) if n == 0 else z
        return z, said, torch.sin(z).sum() + beta * gate_loss(said, labels)

    optimizer = torch.optim.Adam(trained.values(), lr=0.02)
    losses = []
    for step in range(10):
        y, said, loss = forward()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            out |= {f"{name}/y": y.detach().numpy(), f"{name}/x": x.numpy(), f"{name}/labels": labels.numpy()}
            out |= {f"{name}/said/{layer}": logits.detach().numpy() for layer, logits in zip(SIZES, said)}
            out |= {f"{name}/gradient/{key}": t.grad.numpy().copy() for key, t in trained.items()}
        optimizer.step()
    out |= {f"{name}/after/{key}": tensor.detach().numpy() for key, tensor in trained.items()}
    out[f"{name}/losses"] = np.array(losses)


if __name__ == "__main__":
    out = {}
    for name, settings in CASES.items():
        case(out, name, *settings)
    np.savez_compressed(Path(__file__).with_name("meteora.npz"), **out)
