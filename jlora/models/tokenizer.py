"""Loading the tokenizer of a Hugging Face directory."""

import os

from tokenizers import Tokenizer

from jlora.models import files
from jlora.models.config import of_file, read_config, whole


def load_tokenizer(directory: str | os.PathLike) -> Tokenizer:
    """The tokenizer of `directory/tokenizer.json`, without the padding and truncation it may ask for.

    That of a GGUF file is made of its metadata.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It can't be read, or has ids beyond the `vocab_size` of `config.json`: it is another model's.
    """
    directory = files.located(directory)
    path = files.place(directory, "tokenizer.json")
    if not files.has_file(directory, "tokenizer.json"):
        raise FileNotFoundError(
            f"{path}: no such file; the tokenizer is read from tokenizer.json alone (transformers can write one)."
        )
    try:
        tokenizer = Tokenizer.from_str(files.read_text(directory, "tokenizer.json"))
    # The tokenizers library raises bare Exception.
    except Exception as error:
        raise ValueError(f"{path}: not a tokenizer ({error}).") from error
    config = read_config(directory)
    with of_file(directory):
        size = whole(config, "vocab_size")
    token, largest = max(
        tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1], default=("", -1)
    )
    if largest >= size:
        raise ValueError(
            f"{path}: token {token!r} has id {largest}, but the model has a vocabulary of {size} (config.json); "
            "this is the tokenizer of another model."
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
