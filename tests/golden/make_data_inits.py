"""Writes `data_inits.npz`: EVA, CorDA and LoRA-GA as PEFT 0.21 starts and trains them, for `tests/methods/test_starts.py`.

Run with a Python that has torch, peft and attrs (of which PEFT's CorDA makes use):
`python tests/golden/make_data_inits.py`. Everything is transposed to `[in, out]`.
"""

import itertools
from pathlib import Path

import numpy as np
import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import eva as eva_code
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils.incremental_pca import IncrementalPCA
from torch import nn

SIZES, ROWS, STEPS = (14, 12, 10, 9), 40, 6


def exact_svd(matrix, q, **options):
    u, sigma, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :q], sigma[:q], vt[:q].T


# PEFT's code with exact decompositions in place of randomised ones, which are some thousandths off on matrices like these.
eva_code.IncrementalPCA = lambda n_components, **options: IncrementalPCA(n_components=n_components)
torch.svd_lowrank = exact_svd


def array(tensor):
    return np.array(tensor.detach().numpy().T, order="C")


class Net(nn.Module):
    """Layers of several sizes, the inputs of which vary along few directions or many."""

    def __init__(self, decay=0.7):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(SIZES))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight *= 1.5 * decay ** torch.arange(len(layer.weight))[:, None]
                layer.bias += 0.8  # the largest entries are positive, as CorDA's code takes them to be

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def inputs():
    torch.manual_seed(1)
    x = 0.4 + torch.randn(ROWS, SIZES[0]) * 0.95 ** torch.arange(SIZES[0])
    x[::8, 1] = 3.5
    return x


def check(x):
    """CorDA's code divides by the largest entry, jlora by the largest magnitude: here they are the same."""
    for part in x.reshape(2, ROWS // 2, -1):
        for layer in Net().layers:
            assert part.max() == part.abs().max()
            part = torch.tanh(layer(part))


def loss_of(model, x):
    return torch.sin(model(x)).sum() / 10


def base(name, model):
    layers = enumerate(model.layers)
    return {f"{name}/{n}/{part}": array(getattr(layer, part)) for n, layer in layers for part in ("weight", "bias")}


def trained(model, x, out, name):
    """Starts, gradients, and what six steps of AdamW make of them."""
    layers = [(n, layer) for n, layer in enumerate(model.base_model.model.layers) if hasattr(layer, "lora_A")]
    factors = {n: (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for n, layer in layers}
    loss_of(model, x).backward()
    for number, (a, b) in factors.items():
        out[f"{name}/{number}/a"], out[f"{name}/{number}/b"] = array(a), array(b)
        out[f"{name}/{number}/gradient/a"], out[f"{name}/{number}/gradient/b"] = array(a.grad), array(b.grad)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
    out[f"{name}/y"] = model(x).detach().numpy()
    merged = model.merge_and_unload()
    for number, layer in enumerate(merged.layers):
        out[f"{name}/{number}/merged"] = array(layer.weight)


def config_of(**options):
    return LoraConfig(r=3, lora_alpha=4, target_modules=["layers.0", "layers.1", "layers.2"], **options)


def eva(x, out, name, rho):
    model = Net()
    model = get_peft_model(model, config_of(init_lora_weights="eva", eva_config=EvaConfig(rho=rho, tau=0.9999)))
    initialize_lora_eva_weights(
        model,
        [x],
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    trained(model, x, out, name)


def corda(x, out, name, mode):
    model = Net()
    config = config_of(init_lora_weights="corda", corda_config=CordaConfig(corda_method=mode))
    preprocess_corda(model, config, run_model=lambda: [model(part) for part in x.reshape(2, ROWS // 2, -1)])
    trained(get_peft_model(model, config), x, out, name)


def lora_ga(x, out, name, **options):
    model = Net(decay=1.0)  # whose gradients have several singular values of a size
    config = config_of(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(**options))
    preprocess_loraga(model, config, lambda: [loss_of(model, part).backward() for part in x.reshape(2, ROWS // 2, -1)])
    torch.manual_seed(2)
    trained(get_peft_model(model, config), x, out, name)


def main():
    x = inputs()
    check(x)
    out = {"x": x.numpy(), **base("base", Net()), **base("lora_ga_base", Net(decay=1.0))}
    eva(x, out, "eva", 1.0)
    eva(x, out, "eva_rho", 2.0)
    corda(x, out, "corda", "ipm")
    corda(x, out, "corda_kpm", "kpm")
    lora_ga(x, out, "lora_ga")
    lora_ga(x, out, "lora_ga_ArBr_unit", direction="ArBr", scale="unit")
    lora_ga(x, out, "lora_ga_A2rBr_gd_scale", direction="A2rBr", scale="gd_scale")
    lora_ga(x, out, "lora_ga_weight_svd", scale="weight_svd")
    lora_ga(x, out, "lora_ga_stable_64", stable_gamma=64)
    np.savez(Path(__file__).parent / "data_inits.npz", **out)


if __name__ == "__main__":
    main()
