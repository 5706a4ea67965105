"""Every way to run the job that a flag opens, in two steps each: it trains, and its loss is finite."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from little_data import sentences
from safetensors.numpy import load_file, save_file

from jlora import models
from jlora.training.job import finetune
from jlora.training.settings.fields import Settings

BASE = Settings(
    steps=2, batch=4, max_length=16, rank=2, targets=".*/q_proj/kernel", sample_tokens=0, progress="none",
)  # fmt: skip
UNADAPTED = {"rank": None, "targets": None}
ROWS = list(range(300, 512))  # longer tokens: the shipped vocabulary begins with bytes, which are rare
GRADIENTS = {
    ".*/q_proj/kernel": {"method": "SHiRA", "mask": "gradient", "rank": 1},
    ".*/v_proj/kernel": {"method": "DeepLoRA", "compressed": True, "rank": 4},
    "norm/.*": {"method": "Full"},
}


def quiet(text):
    """Takes the lines that the job prints."""


def chats(folder):
    path = folder / "chats.jsonl"
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The dog."}]
    path.write_text((json.dumps({"messages": messages}) + "\n") * 12)
    return {"data": str(path), "packing": False, "max_length": 40}


def labelled(folder):
    path = folder / "pairs.csv"
    rows = [f"the dog,{'a' if i % 2 else 'the'} cat {i},{i % 3}" for i in range(24)]
    path.write_text("\n".join(["one,two,kind", *rows]) + "\n")
    columns = {"text_column": "one", "text_pair_column": "two", "label_column": "kind", "packing": None}
    return {"data": str(path), "task": "classify", **columns}


def stored_in(dtype):
    """The shipped model with its files in another number format."""

    def make(folder):
        shutil.copytree(models.STORIES260K, folder / "model")
        file = folder / "model" / "model.safetensors"
        save_file({name: tensor.astype(dtype) for name, tensor in load_file(file).items()}, file)
        return {"model": str(folder / "model")}

    return make


VARIANTS = {
    "dora in bfloat16 with LoRA+": lambda folder: {"method": "dora", "dtype": "bfloat16", "lora_plus_ratio": 8.0},
    "files in bfloat16": stored_in(ml_dtypes.bfloat16),
    "files in float16": stored_in(np.float16),
    "masks by gradients, in parts": lambda folder: {"method": "shira", "set": {"mask": "snip"}, "accumulate": 2},
    "compressed Deep LoRA": lambda folder: {"method": "deeplora", "set": {"compressed": "true"}},
    "rows of the embedding": lambda folder: {"method": "rows", "set": {"indices": ROWS}, **UNADAPTED},
    "vera": lambda folder: {"method": "vera", "rank": None},
    "a start from the weight": lambda folder: {"method": "dora", "init": "olora"},
    "a table of methods that start from gradients": lambda folder: {"spec": GRADIENTS, **UNADAPTED},
    "full": lambda folder: {"method": "full", **UNADAPTED},
    "full on a mesh": lambda folder: {"method": "full", "mesh": "data=2,model=2", **UNADAPTED},
    "layers unrolled and recomputed": lambda folder: {"scan_layers": False, "remat": True},
    "chat without packing": chats,
    "pairs to classify": labelled,
    "probe": lambda folder: {**labelled(folder), "method": "probe", **UNADAPTED},
    "no clipping, decay, constant": lambda folder: {
        "clip": 0.0,
        "weight_decay": 0.1,
        "schedule": "constant",
        "warmup": 0,
    },
}


@pytest.mark.long
@pytest.mark.parametrize("name", VARIANTS)
def test_every_way_to_run_the_job_trains(tmp_path, name):
    given = {"data": sentences(tmp_path), **VARIANTS[name](tmp_path)}
    settings = dataclasses.replace(BASE, **given, out=str(tmp_path / "run"))
    result = finetune(settings, quiet)
    assert np.isfinite(result.after["loss"])
    assert result.after["loss"] != result.before["loss"]
