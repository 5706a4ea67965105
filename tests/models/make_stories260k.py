"""Makes `jlora/models/stories260k`, a Hugging Face directory, from the files of the shared data.

    python tests/models/make_stories260k.py

The result is the same, bit for bit, on every run.
"""

import json
import pathlib
import struct

import numpy as np
from models_data import REPOSITORY, shared_data
from safetensors.numpy import save_file

TARGET = REPOSITORY / "jlora" / "models" / "stories260k"
BOS, EOS, UNKNOWN = 1, 2, 0
FIRST_PIECE = 259  # below: the three special tokens and the 256 bytes


def read_weights(path: pathlib.Path) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """The header and the arrays of a llama2.c checkpoint, version 0."""
    data = path.read_bytes()
    keys = ("dim", "hidden", "layers", "heads", "kv_heads", "vocab", "length")
    h = dict(zip(keys, struct.unpack("<7i", data[:28]), strict=True))
    d, n, kv = h["dim"], h["layers"], h["dim"] // h["heads"] * h["kv_heads"]
    shapes = {
        "embedding": (h["vocab"], d),
        "attention_norm": (n, d),
        "wq": (n, d, d),
        "wk": (n, kv, d),
        "wv": (n, kv, d),
        "wo": (n, d, d),
        "feed_forward_norm": (n, d),
        "w1": (n, h["hidden"], d),
        "w2": (n, d, h["hidden"]),
        "w3": (n, h["hidden"], d),
        "norm": (d,),
        "rotary": (2, h["length"], d // h["heads"] // 2),
    }
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    flat = np.frombuffer(data, "<f4", offset=28)
    if flat.size != sum(sizes):
        raise ValueError(f"{path}: wanted {sum(sizes)} numbers after the header, got {flat.size}.")
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return h, {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of each head from neighbouring pairs (0,1), (2,3), ... to the pairs (i, i + head_dim / 2)."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.transpose(0, 2, 1, 3).reshape(weight.shape)


def to_tensors(h: dict[str, int], w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under their Hugging Face names."""
    tensors = {"model.embed_tokens.weight": w["embedding"], "model.norm.weight": w["norm"]}
    for i in range(h["layers"]):
        layer = {
            "input_layernorm": w["attention_norm"][i],
            "self_attn.q_proj": half_split(w["wq"][i], h["heads"]),
            "self_attn.k_proj": half_split(w["wk"][i], h["kv_heads"]),
            "self_attn.v_proj": w["wv"][i],
            "self_attn.o_proj": w["wo"][i],
            "post_attention_layernorm": w["feed_forward_norm"][i],
            "mlp.gate_proj": w["w1"][i],
            "mlp.down_proj": w["w2"][i],
            "mlp.up_proj": w["w3"][i],
        }
        tensors.update({f"model.layers.{i}.{name}.weight": value for name, value in layer.items()})
    # safetensors writes the memory of a strided array, not its values.
    return {name: np.ascontiguousarray(value) for name, value in tensors.items()}


def read_pieces(path: pathlib.Path) -> list[tuple[str, float]]:
    """Tokens and their scores, in the order of their ids."""
    data, at, pieces = path.read_bytes(), 4, []
    while at < len(data):
        score, length = struct.unpack("<fi", data[at : at + 8])
        pieces.append((data[at + 8 : at + 8 + length].decode(), score))
        at += 8 + length
    # The file surrounds these with newlines, for printing.
    for special, name in ((UNKNOWN, "<unk>"), (BOS, "<s>"), (EOS, "</s>")):
        pieces[special] = (name, pieces[special][1])
    return pieces


def to_tokenizer(pieces: list[tuple[str, float]]) -> dict:
    """A `tokenizer.json` that merges as llama2.c does: always the pair whose union scores highest.

    Byte-pair encoding orders its merges by pair, the original by the union. So every way to cut a token in two tokens
    is a merge, and merges come in the order of the unions' scores. No token has a space but at its start, so that the
    text may be cut before each space first, which is faster.
    """
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    assert all(" " not in piece[1:] for piece, _ in pieces)
    ranked = sorted(range(FIRST_PIECE, len(pieces)), key=lambda i: -pieces[i][1])
    own = set(ranked)
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in (pieces[i][0] for i in ranked)
        for cut in range(1, len(piece))
        if ids.get(piece[:cut]) in own and ids.get(piece[cut:]) in own
    ]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    second = [{"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    first = [bos, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": pieces[i][0], **special} for i in (UNKNOWN, BOS, EOS)],
        "normalizer": {"type": "Prepend", "prepend": " "},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithNext",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": first,
            "pair": first + second,
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": merges,
        },
    }


def to_config(h: dict[str, int]) -> dict:
    """The `config.json`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "head_dim": h["dim"] // h["heads"],
        "hidden_act": "silu",
        "hidden_size": h["dim"],
        "intermediate_size": h["hidden"],
        "max_position_embeddings": h["length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": h["heads"],
        "num_hidden_layers": h["layers"],
        "num_key_value_heads": h["kv_heads"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": h["vocab"],
    }


TOKENIZER_CONFIG = {
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "model_max_length": 512,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<unk>",
}
GENERATION_CONFIG = {"bos_token_id": BOS, "eos_token_id": EOS}

PROVENANCE = """# stories260K

A Llama of 260,032 parameters with a vocabulary of 512, trained on TinyStories (short children's stories in English) by
Andrej Karpathy for llama2.c; here in the layout of Hugging Face. It is jlora's default model: small enough for two CPU
cores, and really trained.

- Origin: https://huggingface.co/karpathy/tinyllamas, folder `stories260K`, revision
  `0bd21da7698eaf29a0d7de3992de8a46ef624add`: `stories260K.bin` (SHA-256
  `b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696`) and `tok512.bin` (SHA-256
  `037cb335abb25d1fa9e8ecae30ed2a3a8ace9302862ebcdc05d51a6bbb10c312`).
- Licence: MIT (tinyllamas and llama2.c, (c) 2023 Andrej Karpathy; text in `LICENSE`). The training data, TinyStories
  (Eldan and Li, 2023, arXiv:2305.07759), is under CDLA-Sharing-1.0.
- Changes: tensors renamed; the rows of the q and k matrices reordered within each head from neighbouring rotary pairs
  to half-split ones; the unused rotary tables left out; the tokenizer's scores written as the merges of a byte-pair
  encoding that gives the same tokens. No weight was changed. Made by `tests/models/make_stories260k.py`.
- Format: float32, tied head, at most 512 tokens of context. `<s>` (1) begins a text; the model writes single newlines.
"""


def main() -> None:
    TARGET.mkdir(exist_ok=True)
    header, weights = read_weights(shared_data("stories260k/stories260K.bin"))
    save_file(to_tensors(header, weights), TARGET / "model.safetensors", metadata={"format": "pt"})
    (TARGET / "model.safetensors").chmod(0o644)  # the library makes it readable by its owner alone
    texts = {
        "config.json": to_config(header),
        "generation_config.json": GENERATION_CONFIG,
        "tokenizer_config.json": TOKENIZER_CONFIG,
        "tokenizer.json": to_tokenizer(read_pieces(shared_data("stories260k/tok512.bin"))),
    }
    for name, content in texts.items():
        (TARGET / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (TARGET / "PROVENANCE.md").write_text(PROVENANCE, encoding="utf-8")
    print(f"{TARGET}: {sum(file.stat().st_size for file in TARGET.iterdir())} bytes")


if __name__ == "__main__":
    main()
