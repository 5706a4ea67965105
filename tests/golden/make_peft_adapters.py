"""Writes `peft_adapters/`: adapters that PEFT 0.21 made, each with its base and what the model computes.

For `tests/interchange/`. Run with a Python that has torch, transformers and peft:
`python tests/golden/make_peft_adapters.py [name ...]`, all cases or those that are named. Each is a folder as `save_pretrained`
writes it, with `case.npz` beside the adapter: the base by torch names (`base/...`), the input and the output.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import peft
import torch
from peft.tuners.boft import layer as boft
from torch import nn
from transformers.pytorch_utils import Conv1D

FOLDER = Path(__file__).parent / "peft_adapters"


class Text(nn.Module):
    """Embedding, two products with biases, a norm, a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 8)
        self.mix = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens):
        return self.head(self.norm(self.mix(torch.tanh(self.up(self.embed(tokens))))))


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, (3, 2))

    def forward(self, x):
        return self.conv(x)


class Sound(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3)

    def forward(self, x):
        return self.conv(x)


class Gpt(nn.Module):
    """GPT-2's fused q, k and v, in transformers' Conv1D."""

    def __init__(self):
        super().__init__()
        self.c_attn = Conv1D(12, 6)

    def forward(self, x):
        q, k, v = self.c_attn(x).chunk(3, -1)
        return torch.tanh(q) * k + v


class Experts(nn.Module):
    """3-D parameters `[experts, out, in]`, or `[experts, in, out]` where `is_transposed`."""

    def __init__(self, transposed):
        super().__init__()
        self.is_transposed = transposed
        up, down = (3, 10, 6), (3, 6, 5)
        shapes = ((3, 6, 10), (3, 5, 6)) if transposed else (up, down)
        self.gate_up_proj = nn.Parameter(torch.randn(shapes[0]) / 3)
        self.down_proj = nn.Parameter(torch.randn(shapes[1]) / 3)

    def forward(self, x):
        up, down = self.gate_up_proj, self.down_proj
        if not self.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        gate, value = torch.einsum("ni,eio->eno", x, up).chunk(2, -1)
        return torch.einsum("eni,eio->no", torch.tanh(gate) * value, down)


class Mixture(nn.Module):
    def __init__(self, transposed=False):
        super().__init__()
        self.experts = Experts(transposed)

    def forward(self, x):
        return self.experts(x)


LINEAR = ["up", "mix"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
TOKENS = torch.tensor([[1, 10, 1, 3], [0, 4, 4, 2]])


def lora(targets, **options):
    return peft.LoraConfig(
        target_modules=targets, r=options.pop("r", 3), lora_alpha=options.pop("lora_alpha", 5), **options
    )


CASES = {
    "linear": (Text, lora(LINEAR)),
    "patterns": (Text, lora([*LINEAR, "head"], rank_pattern={"mix": 2}, alpha_pattern={"^up": 7, "head": 2})),
    "rslora": (Text, lora(LINEAR, use_rslora=True)),
    "dora": (Text, lora([*LINEAR, "embed"], use_dora=True)),
    "saved_modules": (Text, lora(["up"], modules_to_save=["norm", "head"])),
    "own_biases": (Text, lora(LINEAR, bias="lora_only")),
    "all_biases": (Text, lora(["up"], bias="all")),
    "lora_bias": (Text, lora(LINEAR, lora_bias=True)),
    "embedding": (Text, lora(["embed"])),
    "tokens": (Text, lora(["up"], trainable_token_indices={"embed": [3, 10]})),
    "regex": (Text, lora("up|he.*")),
    "olora": (Text, lora(LINEAR, init_lora_weights="olora")),
    "pissa": (Text, lora(LINEAR, init_lora_weights="pissa")),
    "conv2d": (Image, lora(["conv"])),
    "conv2d_dora": (Image, lora(["conv"], use_dora=True)),
    "conv1d": (Sound, lora(["conv"])),
    "gpt2": (Gpt, lora(["c_attn"], fan_in_fan_out=True)),
    "experts": (Mixture, peft.LoraConfig(target_modules=[], target_parameters=EXPERTS, r=2, lora_alpha=3)),
    "experts_transposed": (
        lambda: Mixture(True),
        peft.LoraConfig(target_modules=[], target_parameters=EXPERTS[::-1], r=2, lora_alpha=3),
    ),
    "adalora": (Text, peft.AdaLoraConfig(target_modules=LINEAR, init_r=4, lora_alpha=6, total_step=10)),
    "adalora_pruned": (
        Text,
        peft.AdaLoraConfig(
            target_modules=LINEAR,
            init_r=4,
            lora_alpha=6,
            total_step=10,
            rank_pattern={"up.lora_E": [True, False, True, True], "mix.lora_E": [False, False, True, False]},
        ),
    ),
    "c3a": (Text, peft.C3AConfig(target_modules=LINEAR, block_size=2, block_size_pattern={"mix": 4})),
    "fourierft": (
        Text,
        peft.FourierFTConfig(
            target_modules=[*LINEAR, "head"], n_frequency=9, scaling=40.0, n_frequency_pattern={"mix": 64}
        ),
    ),
    "boft_deep": (Text, peft.BOFTConfig(target_modules=["mix", "head"], boft_block_size=2, boft_n_butterfly_factor=3)),
    "boft": (Text, peft.BOFTConfig(target_modules=LINEAR, boft_block_size=2)),
    "hra": (Text, peft.HRAConfig(target_modules=LINEAR, r=4)),
    "hra_gram_schmidt": (Text, peft.HRAConfig(target_modules=LINEAR, r=3, apply_GS=True)),
    "ia3": (Text, peft.IA3Config(target_modules=[*LINEAR, "head"], feedforward_modules=["head"])),
    "oft": (Text, peft.OFTConfig(target_modules=["mix", "head"], oft_block_size=4)),
    "oft_bounded": (Text, peft.OFTConfig(target_modules=LINEAR, oft_block_size=2, coft=True, eps=0.5)),
    "oft_exact": (
        Text,
        peft.OFTConfig(target_modules=LINEAR, r=2, oft_block_size=0, use_cayley_neumann=False, block_share=True),
    ),
    "road": (Text, peft.RoadConfig(target_modules=LINEAR, group_size=4)),
    "road_4": (Text, peft.RoadConfig(target_modules=LINEAR, variant="road_4", group_size=8)),
    "gralora": (Text, peft.GraloraConfig(target_modules=LINEAR, r=4, alpha=6, gralora_k=2, hybrid_r=1)),
    "glora": (Text, peft.GloraConfig(target_modules=LINEAR, r=3, config_D_E="vector")),
    "poly": (Text, peft.PolyConfig(target_modules=LINEAR, r=2, n_skills=3, n_splits=2)),
    "hira": (Text, peft.HiraConfig(target_modules=[*LINEAR, "head"], r=3, rank_pattern={"mix": 2})),
    "loha": (
        Text,
        peft.LoHaConfig(target_modules=LINEAR, r=3, alpha=5, rank_pattern={"mix": 2}, alpha_pattern={"^up": 7}),
    ),
    "randlora": (Text, peft.RandLoraConfig(target_modules=[*LINEAR, "head"], r=3, randlora_alpha=7)),
    "vblora": (Text, peft.VBLoRAConfig(target_modules=LINEAR, r=2, num_vectors=6, vector_length=2)),
    "vera": (Text, peft.VeraConfig(target_modules=[*LINEAR, "head"], r=4)),
    "lntuning": (Text, peft.LNTuningConfig(target_modules=["norm"])),
    "lokr": (Text, peft.LoKrConfig(target_modules=[*LINEAR, "head"], r=1, alpha=3, decompose_both=True)),
    "miss": (Text, peft.MissConfig(target_modules=LINEAR, r=4)),
    "miss_bat": (Text, peft.MissConfig(target_modules=["mix"], r=2, init_weights="bat")),
    "shira": (Text, peft.ShiraConfig(target_modules=LINEAR, r=1, random_seed=3)),
}


def inputs(model):
    if isinstance(model, Text):
        return TOKENS
    return torch.randn({Image: (2, 3, 6, 5), Sound: (2, 3, 7)}.get(type(model), (5, 6)))


def randomise(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:
                start = parameter.clone() if "magnitude" in name or "original" in name or "modules" in name else 0
                parameter.copy_(start + torch.randn_like(parameter) / 3)


def sorted_targets(file):
    """PEFT keeps lists of modules as sets, whose order is another one in each run."""
    config = json.loads(file.read_text())
    for key, value in config.items():
        if key.endswith("_modules") and isinstance(value, list):
            config[key] = sorted(value)
    file.write_text(json.dumps(config, indent=2, sort_keys=True))


def write(name, build, config):
    torch.manual_seed(5)
    base = build()
    arrays = {f"base/{key}": tensor.detach().clone().numpy() for key, tensor in base.state_dict().items()}
    x = inputs(base)
    model = peft.get_peft_model(base, config)
    randomise(model)
    if name == "adalora_pruned":
        model.base_model.resize_modules_by_rank_pattern(config.rank_pattern, "default")
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    model.eval().save_pretrained(folder)
    (folder / "README.md").unlink()
    sorted_targets(folder / "adapter_config.json")
    # PEFT's outermost model doesn't pass the tasks of rows on.
    tasks = {"task_ids": torch.zeros(len(x), dtype=torch.long)} if config.peft_type == "POLY" else {}
    run = model.base_model if tasks else model
    with torch.no_grad():
        arrays |= {"x": x.numpy(), "y": run(x, **tasks).numpy()}
    np.savez(folder / "case.npz", **arrays)


def butterflies_in_torch():
    """Puts torch's own blocks on the diagonal in the place of PEFT's CUDA extension, without which there is one factor."""
    boft.get_fbd_cuda = lambda: True
    boft.FastBlockDiag.apply = staticmethod(lambda blocks: torch.stack([torch.block_diag(*each) for each in blocks]))


def main():
    butterflies_in_torch()
    for name in sys.argv[1:] or CASES:
        write(name, *CASES[name])


if __name__ == "__main__":
    main()
