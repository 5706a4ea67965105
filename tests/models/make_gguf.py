"""Makes `golden_gguf/`: small random models as GGUF files, and what transformers makes of each file.

    python tests/models/make_gguf.py [NAME ...]

Needs PyTorch, transformers and gguf (made with torch 2.14, transformers 5.24, gguf 0.19). Each folder holds `model.gguf`, with
weights in the types of its case, and `expected.npz`: the logits of `tokens`, and the token ids of every text of `TEXTS` by
transformers' reading of the file's vocabulary.
"""

import functools
import json
import pathlib
import shutil
import sys

import gguf
import numpy as np

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden_gguf"
TEXTS = (
    "Hello world, 12 apples & 345.6!",
    "two  spaces\n\n\ttab é ü 漢字 🙂 don't",
    "<|user|>the other<|end|> 100,000",
    "Lo there he is; the theatre",
)
SPECIAL = ("<unk>", "<|user|>", "<|end|>")
WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS = 32, 64, 2, 4, 2


def bytes_alphabet() -> list[str]:
    """GPT-2's letters for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) if byte in plain else chr(256 + rest.index(byte)) for byte in range(256)]


def vocabulary_of_bytes(digits: bool = False) -> dict:
    """`digits`: two of them are a token, which the merges of a tokenizer that cuts them apart never make."""
    merges = [
        "t h",
        "Ġ t",
        "Ġt h",
        "h e",
        "Ġt he",
        "Ġth e",
        "l l",
        "ll o",
        "he llo",
        "o r",
        "Ġ w",
        "e r",
        "Ġ Ġ",
        *(["1 2"] if digits else []),
    ]
    tokens = [*SPECIAL, *bytes_alphabet(), *dict.fromkeys(merge.replace(" ", "") for merge in merges)]
    return {"model": "gpt2", "tokens": tokens, "kinds": [3, 3, 3] + [1] * (len(tokens) - 3), "merges": merges}


def vocabulary_of_pieces() -> dict:
    pieces = [
        "▁t",
        "he",
        "▁the",
        "▁",
        "t",
        "h",
        "e",
        "l",
        "o",
        "ll",
        "llo",
        "hello",
        "r",
        "w",
        "or",
        "▁w",
        "er",
        "a",
        "p",
        ",",
        "1",
    ]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    kinds = [2, 3, 3] + [6] * 256 + [1] * len(pieces)
    scores = [0.0] * 259 + [-float(n) for n in range(len(pieces))]
    return {"model": "llama", "tokens": tokens, "kinds": kinds, "scores": scores}


def quantized(array: np.ndarray, kind: str):
    return gguf.quants.quantize(array, gguf.GGMLQuantizationType[kind])


class File:
    """A GGUF file of random weights."""

    def __init__(self, name: str, arch: str, vocabulary: dict, pre: str | None, kinds: dict[str, str], more: dict):
        self.folder, self.arch, self.kinds = GOLDEN / name, arch, kinds
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.rng = np.random.default_rng(0)
        self.writer = gguf.GGUFWriter(self.folder / "model.gguf", arch)
        self.size = len(vocabulary["tokens"])
        self.head_dim = more.pop("head_dim", WIDTH // HEADS)
        self.settings(more)
        self.vocabulary(vocabulary, pre)

    def settings(self, more: dict) -> None:
        w = self.writer
        w.add_name(self.folder.name)
        w.add_context_length(64)
        w.add_embedding_length(WIDTH)
        w.add_block_count(LAYERS)
        w.add_feed_forward_length(HIDDEN)
        w.add_head_count(HEADS)
        w.add_head_count_kv(KV_HEADS)
        w.add_layer_norm_rms_eps(1e-5)
        w.add_rope_freq_base(10000.0)
        w.add_vocab_size(self.size)
        if self.head_dim != WIDTH // HEADS:
            w.add_key_length(self.head_dim)
            w.add_value_length(self.head_dim)
        for key, value in more.items():
            (w.add_uint32 if isinstance(value, int) else w.add_float32)(f"{self.arch}.{key}", value)

    def vocabulary(self, found: dict, pre: str | None) -> None:
        w = self.writer
        w.add_tokenizer_model(found["model"])
        if pre is not None:
            w.add_tokenizer_pre(pre)
        w.add_token_list(found["tokens"])
        w.add_token_types(found["kinds"])
        if "scores" in found:
            w.add_token_scores(found["scores"])
        if "merges" in found:
            w.add_token_merges(found["merges"])
        w.add_bos_token_id(1)
        w.add_eos_token_id(2)
        w.add_unk_token_id(0)
        w.add_add_bos_token(False)
        if self.arch.startswith("gemma"):
            w.add_add_space_prefix(False)
        w.add_chat_template("{% for m in messages %}{{ '<|user|>' + m.content + '<|end|>' }}{% endfor %}")

    def matrix(self, name: str, rows: int, columns: int) -> None:
        kind = self.kinds.get(name.split(".")[-2], self.kinds[""])
        array = self.rng.normal(size=(rows, columns)).astype(np.float32) * 0.3
        if kind in ("F32", "F16"):
            self.writer.add_tensor(name, array.astype({"F32": np.float32, "F16": np.float16}[kind]))
        else:
            self.writer.add_tensor(name, quantized(array, kind), raw_dtype=gguf.GGMLQuantizationType[kind])

    def vector(self, name: str, size: int, around: float) -> None:
        self.writer.add_tensor(name, (around + 0.3 * self.rng.normal(size=size)).astype(np.float32))

    def write(self, norms: tuple[str, ...], head: bool, biases: bool, head_norms: bool) -> None:
        self.matrix("token_embd.weight", self.size, WIDTH)
        self.vector("output_norm.weight", WIDTH, 1.0)
        if head:
            self.matrix("output.weight", self.size, WIDTH)
        for layer in range(LAYERS):
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS, "attn_v": KV_HEADS}
            for name, count in heads.items():
                self.matrix(f"blk.{layer}.{name}.weight", count * self.head_dim, WIDTH)
                if biases:
                    self.vector(f"blk.{layer}.{name}.bias", count * self.head_dim, 0.0)
                if head_norms and name != "attn_v":
                    self.vector(f"blk.{layer}.{name}_norm.weight", self.head_dim, 1.0)
            self.matrix(f"blk.{layer}.attn_output.weight", WIDTH, HEADS * self.head_dim)
            self.matrix(f"blk.{layer}.ffn_gate.weight", HIDDEN, WIDTH)
            self.matrix(f"blk.{layer}.ffn_up.weight", HIDDEN, WIDTH)
            self.matrix(f"blk.{layer}.ffn_down.weight", WIDTH, HIDDEN)
            for norm in norms:
                self.vector(f"blk.{layer}.{norm}.weight", WIDTH, 1.0)
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


NORMS = ("attn_norm", "ffn_norm")
OUTER = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
GEMMA2 = {
    "head_dim": 16,
    "attention.sliding_window": 5,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
GEMMA3 = {"head_dim": 16, "attention.sliding_window": 5}
BYTES, PIECES = vocabulary_of_bytes, vocabulary_of_pieces
DIGITS = functools.partial(vocabulary_of_bytes, digits=True)
# Name -> (architecture, vocabulary, pre, types, further keys), (norms, head, biases, norms of heads).
CASES = {
    "llama": (("llama", BYTES, "smollm", {"": "Q4_1", "token_embd": "Q8_0"}, {}), (NORMS, False, False, False)),
    "llama_pieces": (("llama", PIECES, None, {"": "Q5_0", "attn_v": "F16"}, {}), (NORMS, True, False, False)),
    "qwen2": (("qwen2", DIGITS, "qwen2", {"": "Q8_0", "ffn_down": "Q5_1"}, {}), (NORMS, True, True, False)),
    "gemma2": (("gemma2", PIECES, None, {"": "Q4_0"}, GEMMA2), (OUTER, False, False, False)),
    "gemma3": (("gemma3", PIECES, None, {"": "Q8_0"}, GEMMA3), (OUTER, False, False, True)),
    "qwen3": (("qwen3", BYTES, "qwen2", {"": "Q4_0"}, {"head_dim": 16}), (NORMS, False, False, True)),
}


def expected(folder: pathlib.Path, more: dict) -> dict[str, np.ndarray]:
    """What transformers makes of the file."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, gguf_file="model.gguf")
    # What it does not read of every architecture.
    for name, value in more.items():
        setattr(config, name.rpartition(".")[2], value)
    if "head_dim" in more:
        config.query_pre_attn_scalar = more["head_dim"]
    options = {"gguf_file": "model.gguf", "dtype": torch.float32, "config": config}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    tokens = torch.randint(3, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model.eval()(tokens).logits
    texts = {f"text{n}": np.array(tokenizer.encode(text, add_special_tokens=False)) for n, text in enumerate(TEXTS)}
    return {"tokens": tokens.numpy(), "logits": logits.numpy(), **texts}


if __name__ == "__main__":
    wanted = sys.argv[1:] or list(CASES)
    for case, ((arch, vocabulary, pre, kinds, more), how) in CASES.items():
        if case not in wanted:
            continue
        file = File(case, arch, vocabulary(), pre, kinds, dict(more))
        file.write(*how)
        found = expected(file.folder, more)
        np.savez_compressed(file.folder / "expected.npz", **found)
        sizes = {path.name: path.stat().st_size for path in file.folder.iterdir()}
        print(case, json.dumps(sizes), found["text1"].tolist())
