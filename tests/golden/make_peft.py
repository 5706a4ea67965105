"""Writes `peft.npz`: what PEFT 0.21 computes on tiny layers, for `tests/test_peft_golden.py`.

Run with a Python that has torch and peft: `python tests/golden/make_peft.py`. Torch keeps weights as `[out, in]`; everything
is written transposed, as `[in, out]`, `a [in, r]`, `b [r, out]`.
"""

from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora_rslora": {"use_dora": True, "use_rslora": True},
}
NAMES = {"lora_A.default.weight": "a", "lora_B.default.weight": "b", "lora_magnitude_vector.default.weight": "m"}


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 5)

    def forward(self, x):
        return self.up(x)


class Classifier(nn.Module):
    """Everything that LoRA+ puts into a group: an embedding, a product with bias, a norm, a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3, bias=False)

    def forward(self, tokens):
        return self.head(self.norm(torch.tanh(self.up(self.embedding(tokens)))))


def randomise(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.copy_(torch.randn_like(parameter) / 3)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))


def loss_of(y):
    return torch.sin(y).sum()


def array(tensor):
    return np.array(tensor.detach().numpy().T, order="C")  # a copy: the optimizer writes into the tensor


def trained(model):
    """{field: tensor} of a model with one adapted product."""
    found = {}
    for name, parameter in model.named_parameters():
        for ending, field in NAMES.items():
            if name.endswith(ending):
                found[field] = parameter
    return found


def linear_case(name, options, out):
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["up"], lora_dropout=0.0, **options)
    model = get_peft_model(Linear(), config)
    layer, x = model.base_model.model.up, torch.randn(4, 6)
    randomise(model)
    fields = trained(model)
    y = model(x)
    loss_of(y).backward()
    out[f"{name}/x"], out[f"{name}/y"] = x.numpy(), y.detach().numpy()
    out[f"{name}/w"], out[f"{name}/bias"] = array(layer.base_layer.weight), array(layer.base_layer.bias)
    for field, tensor in fields.items():
        out[f"{name}/{field}"], out[f"{name}/gradient/{field}"] = array(tensor), array(tensor.grad)
    optimizer = torch.optim.AdamW(fields.values(), lr=0.01, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()
    for field, tensor in fields.items():
        out[f"{name}/after/{field}"] = array(tensor)
    # Of the fields after the steps.
    out[f"{name}/merged"] = array(model.merge_and_unload().up.weight)


def embedding_case(out):
    torch.manual_seed(1)
    base = nn.Sequential(nn.Embedding(11, 6))
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=3, target_modules=["0"]))
    randomise(model)
    layer, tokens = model.base_model.model[0], torch.tensor([[1, 10, 1], [0, 4, 4]])
    a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    y = model(tokens)
    loss_of(y).backward()
    out |= {"embedding/tokens": tokens.numpy(), "embedding/y": y.detach().numpy()}
    out |= {"embedding/w": layer.base_layer.weight.detach().numpy()}  # [vocabulary, features] in torch as here
    out |= {"embedding/a": array(a), "embedding/b": array(b)}
    out |= {"embedding/gradient/a": array(a.grad), "embedding/gradient/b": array(b.grad)}


def loraplus_case(out):
    torch.manual_seed(2)
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=["embedding", "up"], bias="lora_only", modules_to_save=["norm", "head"]
    )
    model = get_peft_model(Classifier(), config)
    randomise(model)
    tokens, inner = torch.tensor([[1, 10, 1], [0, 4, 4]]), model.base_model.model
    tensors = {
        "embedding/a": inner.embedding.lora_embedding_A["default"],
        "embedding/b": inner.embedding.lora_embedding_B["default"],
        "up/a": inner.up.lora_A["default"].weight,
        "up/b": inner.up.lora_B["default"].weight,
        "up/bias": inner.up.base_layer.bias,
        "norm/scale": inner.norm.modules_to_save["default"].weight,
        "norm/bias": inner.norm.modules_to_save["default"].bias,
        "head": inner.head.modules_to_save["default"].weight,
    }
    assert {id(t) for t in tensors.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    out |= {"loraplus/tokens": tokens.numpy(), "loraplus/up/w": array(inner.up.base_layer.weight)}
    out["loraplus/embedding/w"] = inner.embedding.base_layer.weight.detach().numpy()
    out |= {f"loraplus/before/{name}": array(tensor) for name, tensor in tensors.items()}
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=4.0, loraplus_lr_embedding=0.003, loraplus_weight_decay=0.1
    )
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(model(tokens)).backward()
        optimizer.step()
    out |= {f"loraplus/after/{name}": array(tensor) for name, tensor in tensors.items()}


def start_case(out):
    """Extreme value and deviation of what PEFT draws at 256 -> 128, rank 16."""
    torch.manual_seed(3)
    for name, init in (("kaiming", True), ("gaussian", "gaussian")):
        config = LoraConfig(r=16, target_modules=["0"], init_lora_weights=init)
        a = get_peft_model(nn.Sequential(nn.Linear(256, 128)), config).base_model.model[0].lora_A["default"].weight
        out[f"start/{name}"] = np.array([a.abs().max().item(), a.std().item()], np.float32)
    model = get_peft_model(nn.Sequential(nn.Embedding(256, 128)), LoraConfig(r=16, target_modules=["0"]))
    b = model.base_model.model[0].lora_embedding_B["default"]
    out["start/embedding"] = np.array([b.abs().max().item(), b.std().item()], np.float32)


def main():
    out = {}
    for name, options in VARIANTS.items():
        linear_case(name, options, out)
    embedding_case(out)
    loraplus_case(out)
    start_case(out)
    np.savez(Path(__file__).parent / "peft.npz", **out)


if __name__ == "__main__":
    main()
