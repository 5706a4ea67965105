"""Tokenizers: the model's own is loaded, another's is refused."""

import json
import shutil

import pytest

import jlora.models as models


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
