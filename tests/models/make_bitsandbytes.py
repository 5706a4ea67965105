"""Makes `checkpoints_of_bitsandbytes/`: small models as transformers and bitsandbytes write them, and loads what jlora wrote.

    python tests/models/make_bitsandbytes.py               makes the folders
    python tests/models/make_bitsandbytes.py check FOLDER  loads a folder that `jlora.models.save(format="bitsandbytes")`
                                                           wrote, and compares every byte of what it holds

Needs PyTorch, transformers, accelerate and bitsandbytes (made with torch 2.13, transformers 5.24, bitsandbytes 0.50). Each
folder is a Hugging Face directory with `expected.npz`: token ids, and the logits of the same model with the weights that
bitsandbytes decodes, in the model's dtype, computed in float32.
"""

import pathlib
import shutil
import sys
import tempfile

import bitsandbytes
import numpy as np
import torch
import transformers
from safetensors.torch import load_file

FOLDER = (
    pathlib.Path(__file__).resolve().parent / "checkpoints_of_bitsandbytes"
)  # not as the package: the folder of this file is on the path of imports
VOCAB = 32
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
# Name of the folder -> dtype of the model, settings of bitsandbytes.
CASES = {
    "nf4_double": ("bfloat16", {**NF4, "bnb_4bit_use_double_quant": True}),
    "nf4": ("float32", NF4),
    "nf4_stored_as_bfloat16": ("bfloat16", {**NF4, "bnb_4bit_quant_storage": torch.bfloat16}),
    "fp4": ("float16", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
    "int8": ("float16", {"load_in_8bit": True}),
}


def random_model(dtype):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape)
        value.data = 1 + 0.3 * noise if "norm" in name else 0.1 * noise
    return model.to(getattr(torch, dtype))


def decoded(weight, layer):
    """A weight that bitsandbytes keeps, as it decodes it."""
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
        return bitsandbytes.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    return weight.data


def plain_logits(quantized, tokens):
    """The logits of the decoded weights in float32."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    for name, module in quantized.named_modules():
        for kind, value in module.named_parameters(recurse=False):
            model.get_parameter(f"{name}.{kind}").data = decoded(value, module).to(quantized.dtype).float()
    with torch.no_grad():
        return model(tokens).logits


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, **options)


def make(name, dtype, settings):
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as plain:
        random_model(dtype).save_pretrained(plain)
        quantized = load(plain, quantization_config=transformers.BitsAndBytesConfig(**settings), dtype=dtype)
    quantized.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokens = torch.arange(1, 25).reshape(2, 12)
    np.savez_compressed(folder / "expected.npz", tokens=tokens, logits=plain_logits(quantized, tokens).numpy())
    print(name, sum(file.stat().st_size for file in folder.iterdir()), "bytes")


def check(folder):
    model = load(folder)
    kept = sum(isinstance(m, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt) for m in model.modules())
    ours, theirs = load_file(pathlib.Path(folder) / "model.safetensors"), model.state_dict()
    if model.config.tie_word_embeddings:
        theirs.pop("lm_head.weight")
    assert kept, "no layer was loaded by bitsandbytes"
    assert sorted(ours) == sorted(theirs), set(ours) ^ set(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name
    tokens = torch.arange(1, 25).reshape(2, 12)
    with torch.no_grad():
        logits = model(tokens).logits
    print(
        f"{folder}: {kept} layers of bitsandbytes, {len(ours)} tensors equal; logits of size {logits.abs().max():.3f}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["check"]:
        check(sys.argv[2])
    else:
        for name, case in CASES.items():
            make(name, *case)
