"""Tokenizers: the model's own is loaded, another's is refused."""

import json
import shutil

import pytest

import jlora.models as models
from jlora.training.model.subject import open_codec
from jlora.training.settings.fields import Settings


def folder_with(tmp_path, vocab_size: int | None = None):
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(models.STORIES260K / name, tmp_path / name)
    if vocab_size is not None:
        settings = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(settings | {"vocab_size": vocab_size}))
    return tmp_path


def test_a_missing_tokenizer_is_named(tmp_path):
    folder = folder_with(tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(
        FileNotFoundError, match="tokenizer.json: no such file; the tokenizer is read from tokenizer.json"
    ):
        models.load_tokenizer(folder)


def test_the_tokenizer_of_a_larger_vocabulary_is_refused(tmp_path):
    message = (
        r"token .* has id 511, but the model has a vocabulary of 511 .config.json.; this is the tokenizer of another"
    )
    with pytest.raises(ValueError, match=message):
        models.load_tokenizer(folder_with(tmp_path, vocab_size=511))


def test_a_damaged_tokenizer_is_named(tmp_path):
    folder = folder_with(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer"):
        models.load_tokenizer(folder)


def test_a_vocabulary_smaller_than_the_embedding_is_fine(tmp_path):
    assert models.load_tokenizer(folder_with(tmp_path, vocab_size=640)).get_vocab_size() == 512


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "config.json",
            {"vocab_size": "512"},
            "config.json: 'vocab_size' must be a whole number from 1 to 2147483647, got",
        ),
        ("config.json", {"vocab_size": None}, "config.json: key 'vocab_size' is missing"),
        ("config.json", {"eos_token_id": "</s>"}, "eos_token_id is '</s>' in config.json of"),
        ("config.json", {"eos_token_id": [2, -1]}, "eos_token_id is -1 in config.json of"),
        ("config.json", {"bos_token_id": 10**30}, "bos_token_id is 10000"),
        ("tokenizer_config.json", {"bos_token": 3}, "tokenizer_config.json: bos_token must be a text, got 3"),
        (
            "tokenizer_config.json",
            {"eos_token": {"content": ["</s>"]}},
            "tokenizer_config.json: eos_token must be a text",
        ),
    ],
)
def test_special_tokens_that_are_none_are_named_with_their_file(file, change, message, tmp_path):
    shutil.copytree(models.STORIES260K, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / file).read_text())
    (tmp_path / "model" / file).write_text(json.dumps(settings | change))
    with pytest.raises(ValueError, match=message) as caught:
        open_codec(Settings(model=str(tmp_path / "model")))
    assert str(tmp_path / "model") in str(caught.value)
