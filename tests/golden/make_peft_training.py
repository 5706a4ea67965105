"""Writes `peft_training/`: ten AdamW steps of PEFT 0.21 on a tiny Llama, from adapters that lie beside the losses.

For `tests/interchange/test_training_golden.py`; `tests/parity/` runs the same live. Run with a Python that has torch,
transformers and peft: `python tests/golden/make_peft_training.py [name ...]`, all cases or those that are named.
"""

import json
import shutil
import sys
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM

FOLDER = Path(__file__).parent / "peft_training"
BASE = Path(__file__).parents[1] / "models" / "golden" / "llama_yarn"
TARGETS = ["q_proj", "v_proj", "down_proj"]
STEPS, RATE, DECAY = 10, 0.01, 0.01
# init_r and target_r, and the phases of the ten steps.
ADALORA = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "total_step": STEPS}


def lora(**options):
    return peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **options)


CONFIGS = {
    "lntuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"]),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=6, target_modules=TARGETS),
    "miss": lambda: peft.MissConfig(r=4, target_modules=TARGETS),
    # For larger blocks PEFT's gradient of a layer's input is wrong (`BlockCircularConvolution.backward`).
    "c3a": lambda: peft.C3AConfig(block_size=2, target_modules=TARGETS),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=20, scaling=30.0, target_modules=TARGETS),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=TARGETS),
    "hra_gram_schmidt": lambda: peft.HRAConfig(r=3, apply_GS=True, target_modules=TARGETS),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=TARGETS),
    "oft_bounded": lambda: peft.OFTConfig(oft_block_size=4, coft=True, eps=0.4, target_modules=TARGETS),
    "oft_exact": lambda: peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=TARGETS),
    "road": lambda: peft.RoadConfig(group_size=4, target_modules=TARGETS),
    "gralora": lambda: peft.GraloraConfig(r=4, alpha=6, target_modules=TARGETS),
    "glora": lambda: peft.GloraConfig(r=4, target_modules=TARGETS),
    "hira": lambda: peft.HiraConfig(r=4, target_modules=TARGETS),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=TARGETS),
    "lora": lambda: lora(),
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "olora": lambda: lora(init_lora_weights="olora"),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "randlora": lambda: peft.RandLoraConfig(r=3, randlora_alpha=1, target_modules=TARGETS),
    "vblora": lambda: peft.VBLoRAConfig(
        r=4, num_vectors=8, vector_length=4, init_vector_bank_bound=0.3, target_modules=TARGETS
    ),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=TARGETS),
    # Without a task PEFT's model passes its own forward by, and the penalty with it.
    "adalora": lambda: peft.AdaLoraConfig(
        lora_alpha=6, target_modules=TARGETS, orth_reg_weight=0.3, task_type="CAUSAL_LM", **ADALORA
    ),
}
# PiSSA and OLoRA move a part of the base into the factors, which decay would shrink.
DECAYS = {"olora": 0.0, "pissa": 0.0}


def tokens():
    return torch.randint(0, 60, (4, 12), generator=torch.Generator().manual_seed(7))


def start(name, folder, base=BASE):
    """A PEFT model with a random start, which is saved."""
    torch.manual_seed(11)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), CONFIGS[name]())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and name not in DECAYS and "magnitude" not in key:
                parameter.add_(torch.randn_like(parameter) / 20)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    lists = {key: sorted(value) for key, value in config.items() if key.endswith("_modules") and value}
    config |= {"base_model_name_or_path": None, **lists}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return model


def train(model, name):
    """The losses before each of ten steps and after the last; for AdaLoRA the ranks that are left too."""
    x = tokens()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAYS.get(name, DECAY))
    losses = []
    for step in range(STEPS):
        out = model(input_ids=x, labels=x)
        losses.append(plain_loss(out.logits, x))
        out.loss.backward()  # with AdaLoRA's penalty, which PEFT adds to it
        optimizer.step()
        if name == "adalora":
            model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    with torch.no_grad():
        losses.append(plain_loss(model.eval()(input_ids=x).logits, x))
    return {"losses": losses, "ranks": ranks(model)}


def plain_loss(logits, x):
    """The next tokens' loss, without a penalty."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), x[:, 1:].reshape(-1)).item()


def ranks(model):
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_E.default"): int((tensor != 0).sum())
        for key, tensor in model.state_dict().items()
        if key.endswith(".lora_E.default")
    }


def main():
    for name in sys.argv[1:] or CONFIGS:
        model = start(name, FOLDER / name)
        result = {"tokens": tokens().tolist(), **train(model, name)}
        (FOLDER / name / "losses.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
