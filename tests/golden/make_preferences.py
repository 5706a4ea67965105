"""Writes `preferences.npz` and `preferences.json`: what TRL 1.16 makes of rows of preferences, and of three steps on them.

For `tests/training/test_preferences.py`. Run with a Python that has torch, transformers, PEFT and TRL (`pip install trl
datasets`): `python tests/golden/make_preferences.py`. The model is the shipped 260K-parameter Llama with PEFT's LoRA on q and
v, whose `b` is not 0; the reference is the base. Factors are written transposed, as `a [in, r]` and `b [r, out]`, layers in
front.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

FOLDER = Path(__file__).parent
MODEL = FOLDER.parents[1] / "jlora" / "models" / "stories260k"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role + ': ' + message.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# With this seed the model is further from its base than 0, so that KTO's divergence is not the 0 that it is clamped to.
SEED = 0
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl")
STEPS, RATE, DECAY, RANK, ALPHA, MAX_LENGTH = 3, 1e-2, 1e-2, 2, 4, 25

TEXTS = [
    {"prompt": "Tom saw a dog.", "chosen": " He was happy.", "rejected": " He was very sad and cried."},
    {"prompt": "Lily had a ball", "chosen": " and a big red kite. She ran.", "rejected": ", but lost it."},
    {"chosen": "The sun was hot so they swam.", "rejected": "The sun was hot so they slept all day."},
    {"prompt": "One day, Ben", "chosen": " went to the park with his mom and dad and a big friendly dog who was nice.",
     "rejected": " fell."},
]  # fmt: skip


def turn(role, content):
    return {"role": role, "content": content}


CHATS = [
    {
        "prompt": [turn("system", "Be kind."), turn("user", "Where is Tom?")],
        "chosen": [turn("assistant", "He is at home.")],
        "rejected": [turn("assistant", "Go away!")],
    },
    {
        "chosen": [turn("user", "Hi"), turn("assistant", "Hello!"), turn("user", "Bye"), turn("assistant", "See you.")],
        "rejected": [turn("user", "Hi"), turn("assistant", "Hello!"), turn("user", "Bye"), turn("assistant", "No.")],
    },
]
JUDGED = [
    {"prompt": "Tom saw a dog.", "completion": " He was happy.", "label": True},
    {"prompt": "Lily had a ball", "completion": ", but lost it.", "label": False},
    {"prompt": "The sun was hot", "completion": " so they swam.", "label": True},
    {"prompt": "One day, Ben", "completion": " went to the park.", "label": True},
]
LOSSES = {
    "dpo": {"loss_type": ["sigmoid"], "beta": 0.3},
    "robust": {"loss_type": ["robust"], "beta": 0.3, "label_smoothing": 0.2},
    "ipo": {"loss_type": ["ipo"], "beta": 0.3},
    "kto": {"loss_type": "kto", "beta": 0.3},
}


def trainer_of(rows, folder, judged=False, max_length=MAX_LENGTH, **options):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template, tokenizer.pad_token = TEMPLATE, "<unk>"
    config, trainer = (KTOConfig, KTOTrainer) if judged else (DPOConfig, DPOTrainer)
    arguments = config(
        folder, per_device_train_batch_size=len(rows), max_length=max_length, report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, **options,
    )  # fmt: skip
    return trainer(
        model=AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"], lora_dropout=0.0),
    )


def tokens_of(rows, folder):
    """Token ids of prompts and answers, as TRL reads each row by itself (it takes a data set's layout from its first row)."""
    found = []
    for row in rows:
        each = trainer_of([row], folder, max_length=256).train_dataset[0]
        found.append({name: each[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")})
    return found


def factors(model, read):
    """The stacked factors by name, of each parameter what `read` says."""
    found = {}
    for name in ("q_proj", "v_proj"):
        for field, part in (("a", "lora_A"), ("b", "lora_B")):
            layers = [layer.self_attn for layer in model.base_model.model.model.layers]
            each = [read(getattr(getattr(layer, name), part)["default"].weight) for layer in layers]
            found[f"{name}/{field}"] = np.stack([array.detach().numpy().T.copy() for array in each])
    return found


def trained(name, rows, folder):
    """Losses, metrics and arrays of three AdamW steps on one batch of all rows."""
    trainer = trainer_of(rows, folder, name == "kto", **LOSSES[name])
    model = trainer.model.train()
    torch.manual_seed(SEED)
    with torch.no_grad():
        factors(model, lambda weight: weight.copy_(torch.randn_like(weight) / 12))
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(len(rows))])
    given = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tx = torch.optim.AdamW(given, lr=RATE, weight_decay=DECAY)
    found = {f"start/{key}": value for key, value in factors(model, lambda weight: weight).items()}
    losses = []
    for step in range(STEPS):
        tx.zero_grad()
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        if step == 0:
            found |= {f"gradient/{key}": value for key, value in factors(model, lambda weight: weight.grad).items()}
            found |= {f"metrics/{key}": value[-1] for key, value in trainer._metrics["train"].items() if key in METRICS}
        losses.append(loss.item())
        tx.step()
    found |= {f"end/{key}": value for key, value in factors(model, lambda weight: weight).items()}
    return found | {"losses": np.array(losses)}


def main():
    # A data set has one layout: the row without a prompt is left to `tokens_of`.
    pairs = [row for row in TEXTS if "prompt" in row]
    with tempfile.TemporaryDirectory() as folder:
        tokens = {"texts": tokens_of(TEXTS, folder), "chats": tokens_of(CHATS, folder)}
        arrays = {
            f"{name}/{key}": value
            for name in LOSSES
            for key, value in trained(name, JUDGED if name == "kto" else pairs, folder).items()
        }
    rows = {"texts": TEXTS, "chats": CHATS, "pairs": pairs, "judged": JUDGED}
    content = {"template": TEMPLATE, "rows": rows, "tokens": tokens, "losses": LOSSES, "max_length": MAX_LENGTH}
    (FOLDER / "preferences.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    np.savez_compressed(FOLDER / "preferences.npz", **arrays)


if __name__ == "__main__":
    main()
