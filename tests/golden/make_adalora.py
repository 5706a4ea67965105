"""Writes `adalora.npz`: what PEFT 0.21's rank allocation does over whole schedules, for `tests/allocate/test_adalora.py`.

Run with a Python that has torch and peft: `python tests/golden/make_adalora.py`. The parameters take plain gradient steps with
random gradients, then PEFT allocates; in one case AdamW trains a net. All is written transposed, as `a [in, r]`, `e [r]`,
`b [r, out]`.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn

SHAPES = {"down": (5, 9), "query": (6, 8), "up": (7, 4)}  # (in, out)
RATE = 0.1
#: Name: init_r, target_r, total_step, tinit, tfinal, deltaT. The last step but tfinal is no multiple of deltaT.
SCHEDULES = {"every": (4, 2, 12, 0, 0, 1), "phases": (4, 1, 29, 5, 7, 4)}
FIELDS = {"a": "lora_A", "e": "lora_E", "b": "lora_B"}


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        for name, (rows, columns) in SHAPES.items():
            setattr(self, name, nn.Linear(rows, columns, bias=False))

    def forward(self, **inputs):
        outputs = [torch.sin(getattr(self, name)(x)).sum() for name, x in inputs.items()]
        return SimpleNamespace(loss=sum(outputs))


def adapted(schedule, **options):
    rank, target, steps, start, final, interval = schedule
    config = AdaLoraConfig(
        init_r=rank, target_r=target, total_step=steps, tinit=start, tfinal=final, deltaT=interval, lora_alpha=6,
        target_modules=list(SHAPES), **options,
    )  # fmt: skip
    model = get_peft_model(Layers(), config)
    tensors = {
        f"{name}/{field}": getattr(getattr(model.base_model.model, name), module)["default"]
        for name in SHAPES
        for field, module in FIELDS.items()
    }
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.copy_(torch.randn_like(tensor) / 2)
    return model, tensors


def array(tensor, name):
    values = tensor.detach().numpy().T.copy()
    return values[0] if name.endswith("/e") else values


def schedule_case(label, schedule, out):
    """Every step's gradient, and the parameters after it; the averages after the last step that updates them."""
    torch.manual_seed(0)
    model, tensors = adapted(schedule)
    allocator = model.base_model.rankallocator
    _, _, steps, _, final, _ = schedule
    out |= {f"{label}/before/{name}": array(tensor, name) for name, tensor in tensors.items()}
    record = {name: [] for name in tensors}
    gradients = {name: [] for name in tensors}
    for step in range(1, steps + 1):
        for name, tensor in tensors.items():
            tensor.grad = torch.randn_like(tensor) * (1 + len(name) % 3)
            gradients[name].append(array(tensor.grad, name))
            with torch.no_grad():
                tensor -= RATE * tensor.grad
        if step == steps - final:  # PEFT forgets the averages here
            for name, tensor in tensors.items():
                full = next(n for n, p in model.base_model.model.named_parameters() if p is tensor)
                out[f"{label}/sensitivity/{name}"] = array(allocator.exp_avg_ipt[full], name)
                out[f"{label}/uncertainty/{name}"] = array(allocator.exp_avg_unc[full], name)
        model.base_model.update_and_allocate(step)
        for name, tensor in tensors.items():
            record[name].append(array(tensor, name))
    out[f"{label}/budgets"] = np.array([allocator.budget_schedule(step)[0] for step in range(1, steps + 1)])
    for name in tensors:
        out[f"{label}/gradients/{name}"] = np.stack(gradients[name])
        out[f"{label}/after/{name}"] = np.stack(record[name])


def long_budgets(out):
    """Budgets of schedules of the length of real runs: init_bgt, target_bgt, total_step, tinit, tfinal, and the numbers."""
    rows = [
        (12 * 72, 8 * 72, 8000, 600, 1800),
        (3 * 60, 60, 3000, 0, 0),
        (1000, 0, 1000, 0, 0),
        (144, 96, 1200, 7, 401),
    ]
    model, _ = adapted(SCHEDULES["every"])
    allocator = model.base_model.rankallocator
    for number, (first, last, steps, start, final) in enumerate(rows):
        allocator.init_bgt, allocator.target_bgt = first, last
        config = allocator.peft_config
        config.total_step, config.tinit, config.tfinal = steps, start, final
        budgets = [allocator.budget_schedule(step)[0] for step in range(1, steps + 1)]
        out[f"budgets/{number}/setting"] = np.array(rows[number])
        out[f"budgets/{number}/values"] = np.array(budgets, np.int16)


def penalty_case(out):
    """The loss with PEFT's penalty, its gradients, and those of the loss alone; the outputs are of the merged weights."""
    torch.manual_seed(1)
    model, tensors = adapted(SCHEDULES["every"], orth_reg_weight=0.3)
    inputs = {name: torch.randn(3, rows) for name, (rows, _) in SHAPES.items()}
    for label, run in (("with", model.base_model), ("without", model.base_model.model)):
        model.zero_grad()
        loss = run(**inputs).loss
        loss.backward()
        out[f"penalty/{label}/loss"] = loss.detach().numpy()
        out |= {f"penalty/{label}/gradient/{name}": array(tensor.grad, name) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        out[f"penalty/params/{name}"] = array(tensor, name)
    for name, x in inputs.items():
        layer = getattr(model.base_model.model, name)
        out[f"penalty/x/{name}"] = x.numpy()
        out[f"penalty/w/{name}"] = array(layer.base_layer.weight, name)
        out[f"penalty/merged/{name}"] = array(layer.base_layer.weight + layer.get_delta_weight("default"), name)


class Net(nn.Module):
    def __init__(self, weights):
        super().__init__()
        for name, weight in weights.items():
            setattr(self, name, nn.Linear(*weight.shape, bias=False))
            getattr(self, name).weight.data = torch.tensor(weight.T.copy())

    def forward(self, x):
        return self.up(torch.tanh(self.down(x)))


def training_case(out):
    """60 steps of AdamW on a small net, of which the last 30 allocate no more: the factors after steps 30 and 60."""
    rng = np.random.RandomState(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    weights = {"down": draw(6, 5) / 2, "up": draw(5, 4) / 2}
    x, teacher = draw(60, 8, 6), {name: weight + draw(*weight.shape) / 2 for name, weight in weights.items()}
    y = np.tanh(x @ teacher["down"]) @ teacher["up"]
    config = AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=8, tinit=5, tfinal=30, deltaT=1, total_step=60, orth_reg_weight=0.5,
        target_modules=list(weights),
    )  # fmt: skip
    model = get_peft_model(Net(weights), config)
    layers = {name: getattr(model.base_model.model, name) for name in weights}
    factors = {f"{name}/{f}": getattr(layer, m)["default"] for name, layer in layers.items() for f, m in FIELDS.items()}
    with torch.no_grad():
        for name, tensor in factors.items():
            if not name.endswith("/e"):
                tensor.copy_(torch.tensor(0.02 * draw(*tensor.shape)))
    out |= {f"training/before/{name}": array(tensor, name) for name, tensor in factors.items()}
    out |= {f"training/w/{name}": weight for name, weight in weights.items()} | {"training/x": x, "training/y": y}
    optimizer = torch.optim.AdamW(factors.values(), lr=0.01, weight_decay=0.1)
    for step in range(1, 61):
        optimizer.zero_grad()
        loss = ((model.base_model.model(torch.tensor(x[step - 1])) - torch.tensor(y[step - 1])) ** 2).mean()
        apart = [
            torch.norm(m @ m.T - torch.eye(4))
            for name, f in factors.items()
            if not name.endswith("/e")
            for m in [f if name.endswith("/a") else f.T]
        ]
        (loss + 0.5 * sum(apart) / len(apart)).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        if step in (30, 60):
            out |= {f"training/after {step}/{name}": array(tensor, name) for name, tensor in factors.items()}
            for name, layer in layers.items():
                out[f"training/change {step}/{name}"] = layer.get_delta_weight("default").detach().numpy().T.copy()


def main():
    out = {}
    training_case(out)
    for label, schedule in SCHEDULES.items():
        schedule_case(label, schedule, out)
    long_budgets(out)
    penalty_case(out)
    np.savez_compressed(Path(__file__).parent / "adalora.npz", **out)


if __name__ == "__main__":
    main()
