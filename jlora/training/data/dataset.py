"""The data of a run: read, checked, encoded, split into training and validation, packed."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from jlora.training.data import chat
from jlora.training.data.encode import Example, encode_classification, encode_language, label_names
from jlora.training.data.formats.mixture import files_of, read_files
from jlora.training.data.packing import packed
from jlora.training.data.pipeline import Batch, training_batches, validation_batches
from jlora.training.data.preferences.encode import encode_preferences
from jlora.training.data.preferences.pairs import Pair, mismatched
from jlora.training.data.rows import Row, given_rows
from jlora.training.data.tokens import Codec
from jlora.training.errors import DataError, SettingError
from jlora.training.settings.fields import Settings


@dataclasses.dataclass(frozen=True)
class Data:
    """Encoded data.

    Attributes:
        train: examples to train on (packed, if so set); for preferences pairs of them.
        validation: examples to validate on (packed likewise).
        labels: names of the labels in the order of their indices; empty for language models.
        source: where the data came from, in words.
        fixed: whether all rows are padded to the longest.
        longest: tokens of the longest row.
        notes: what became of rows that are not learned from as they are, with numbers, in words.
        template: how chats became text; None where there are none.
        unpacked: rows to train and to validate on before they were packed; None where they were not.
    """

    train: list[Any]
    validation: list[Any]
    labels: list[str]
    source: str
    fixed: bool
    longest: int
    notes: list[str]
    template: chat.Template | None = None
    unpacked: tuple[int, int] | None = None

    @property
    def texts(self) -> int:
        """The most texts that are packed into one row."""
        return most_texts((*self.train, *self.validation))

    def amounts(self) -> str:
        """How many rows there are, in words."""
        rows = len(self.train), len(self.validation)
        train, validation = unpacked = self.unpacked or rows
        packed = f", packed into {rows[0]:,} and {rows[1]:,} of {self.longest} tokens" if unpacked != rows else ""
        return f"{train:,} rows to train on, {validation:,} to validate{packed}"

    def digest(self) -> str:
        """SHA-256 of the training data: a resumed run must see the same."""
        return _digest(repr((self.labels, self.fixed, self.longest)), self.train)

    def validation_digest(self) -> str:
        """SHA-256 of the validation data."""
        return _digest("", self.validation)

    def training_batches(self, batch: int, seed: int):
        """An endless grain iterator over training batches."""
        return training_batches(self.train, batch, self.longest, seed, self.fixed)

    def validation_batches(self, batch: int) -> list[Batch]:
        """Every validation example once."""
        return validation_batches(self.validation, batch, self.longest, self.fixed)


def _digest(head: str, examples: Sequence[Any]) -> str:
    sha = hashlib.sha256(head.encode())
    for example in _rows_of(examples):
        for array in (example.tokens, example.targets, example.weights, example.types, example.segments):
            sha.update(np.int64(array.size).tobytes() + np.ascontiguousarray(array).tobytes())
        sha.update(np.int64(example.label).tobytes())
    return sha.hexdigest()


def most_texts(examples: Sequence[Any]) -> int:
    """The most texts that are packed into one row; pairs are never packed."""
    rows = (row for row in examples if isinstance(row, Example))
    return max((int(row.segments.max(initial=1)) for row in rows), default=1)


def _rows_of(examples: Sequence[Any]) -> Iterator[Example]:
    """The examples; of pairs both rows, the first with the label of an answer by itself."""
    for example in examples:
        if isinstance(example, Pair):
            yield from (dataclasses.replace(example.first, label=example.desirable), example.second)
        else:
            yield example


def load_data(
    settings: Settings, codec: Codec, now: datetime | None = None, given: Mapping[str, Any] | None = None
) -> Data:
    """Read and encode what the (resolved) settings name.

    Args:
        settings: resolved.
        codec: the model's tokenizer.
        now: the time that chat templates may write.
        given: rows in place of the files of `data` and `validation`, see `jlora.training.data.rows.given_rows`.

    Raises:
        DataError: for a row that cannot be used, naming file and line.
        SettingError: if a part comes out empty.
        OSError: if a file cannot be read.
    """
    assert settings.max_length is not None
    if settings.data is None:
        rows, held_out = documentation_rows(settings.validation_fraction or 0.1)
        source = "the Python documentation (pydoc_data.topics)"
    else:
        rows, held_out = _rows(settings, given or {})
        source = ", ".join(files_of(settings.data))
    labels = label_names(rows, settings.label_column) if settings.task == "classify" else []
    rows, counts = subset(rows, settings.max_rows, settings.seed), collections.Counter()
    template = functools.cache(lambda: chat_template(settings, codec, now))  # made when the first chat comes
    train = encode(rows, settings, codec, labels, counts, template)
    if settings.data is None or settings.validation is not None:
        held_out = subset(held_out, settings.max_validation_rows, settings.seed)
        validation = encode(held_out, settings, codec, labels, counts, template)
    else:
        train, validation = split(train, settings, one_text=len(rows) == 1)
    fixed, notes = bool(settings.packing), notes_on(counts, settings)
    unpacked = (len(train), len(validation)) if fixed else None
    train, validation = arranged(train, settings), arranged(validation, settings)
    longest = settings.max_length if fixed else max(len(example) for example in (*train, *validation))
    made = template() if template.cache_info().currsize else None
    notes += made.notes if made is not None else []
    return Data(train, validation, labels, source, fixed, longest, notes, made, unpacked)


def _rows(settings: Settings, given: Mapping[str, Any]) -> tuple[list[Row], list[Row]]:
    """The rows to train on, and those to validate on where the settings name them."""
    assert settings.data is not None
    if "data" in given:
        rows = given_rows(given["data"])
    else:
        rows = read_files(settings.data, settings.format, settings.weights, settings.seed)
    if settings.validation is None:
        return rows, []
    if "validation" in given:
        return rows, given_rows(given["validation"])
    return rows, read_files(settings.validation, settings.format)


def arranged(examples: list[Any], settings: Settings) -> list[Any]:
    """The examples of a part as they are trained on: packed, or beside those that they are compared with."""
    assert settings.max_length is not None
    if settings.packing:
        return packed(examples, settings.max_length)
    return mismatched(examples, settings.max_length) if settings.preference_loss == "kto" else examples


def chat_template(settings: Settings, codec: Codec, now: datetime | None = None) -> chat.Template:
    """The settings' chat template for the model."""
    return chat.template(settings.chat_template, codec.directory, codec.tokenizer.get_vocab(), now)


def encode(
    rows: Sequence[Row],
    settings: Settings,
    codec: Codec,
    labels: Sequence[str],
    counts: collections.Counter[str],
    template: Callable[[], chat.Template] | None = None,
) -> list[Any]:
    """Rows as examples, for the settings' task.

    Args:
        rows: the rows.
        settings: resolved.
        codec: the model's tokenizer.
        labels: names of the labels.
        counts: counts rows that did not become whole examples, for `notes_on`.
        template: makes the template of chats, by default the settings'.

    Raises:
        DataError: for a row that cannot be used, or if nothing is left.
    """
    assert settings.max_length is not None
    if settings.task == "classify":
        columns = (settings.text_column, settings.text_pair_column, settings.label_column)
        numbers = {label: index for index, label in enumerate(labels)}
        examples = encode_classification(rows, codec, columns, numbers, settings.max_length)
        if settings.long_rows == "drop":
            counts["dropped"] += sum(example.cut for example in examples)
            examples = [example for example in examples if not example.cut]
    elif settings.task == "preference":
        template = template or functools.partial(chat_template, settings, codec)
        judged_by = settings.label_column if settings.preference_loss == "kto" else None
        options = settings.max_length, judged_by, settings.long_rows == "drop", counts
        examples = encode_preferences(rows, codec, template, *options)
    else:
        limits = settings.max_length, settings.long_rows, counts
        template = template or functools.partial(chat_template, settings, codec)
        examples = encode_language(rows, codec, template, settings.text_column, *limits)
        if len(rows) == 1:
            del counts["split"]  # a text file becomes pieces by its nature
    counts["cut"] += sum(example.cut for example in examples)
    if not examples:
        why = "; ".join(["the file has nothing to learn from", *notes_on(counts, settings)])
        raise DataError(rows[0].path, None, why)
    return examples


def notes_on(counts: collections.Counter[str], settings: Settings) -> list[str]:
    """What was counted, in words."""
    long = f"longer than {settings.max_length} tokens (--max-length)"
    words = {
        "cut": f"{long}, cut at the end (--long-rows)",
        "split": f"{long}, cut into pieces (--long-rows)",
        "dropped": f"{long}, left out (--long-rows)",
        "answerless": f"left out, because the answer begins after {settings.max_length} tokens (--max-length)",
        "empty": "left out, because a text, prompt or answer in them is empty",
        "preferences": "with 'chosen' and 'rejected': the chosen answer is trained on, the rejected one is not used "
        "(--task preference learns from both)",
        "same": "left out, because both answers are the same, as far as they are read",
    }
    return [f"{n:,} {'row' if n == 1 else 'rows'} {text}" for key, text in words.items() if (n := counts[key])]


def subset(rows: Sequence[Row], count: int | None, seed: int) -> list[Row]:
    """`count` of the rows drawn by the seed, in the file's order; all by default."""
    if count is None or count >= len(rows):
        return list(rows)
    chosen = np.random.default_rng(seed).choice(len(rows), count, replace=False)
    return [rows[i] for i in sorted(chosen)]


def split(examples: list[Any], settings: Settings, one_text: bool) -> tuple[list[Any], list[Any]]:
    """Training and validation: the end of a single text, otherwise examples drawn by the seed.

    The end, because neighbouring pieces of one text resemble each other.
    """
    fraction = settings.validation_fraction or 0.0
    count = max(1, round(fraction * len(examples)))
    if count >= len(examples):
        raise SettingError(
            "validation_fraction",
            f"of {fraction} leaves nothing to train on: the data makes {len(examples)} {'row' if count == 1 else 'rows'}; "
            "give more data, or other data to validate on (--validation)",
        )
    order = np.arange(len(examples))
    if not one_text:
        order = np.random.default_rng(settings.seed).permutation(order)
    train, held_out = sorted(order[:-count]), sorted(order[-count:])
    if settings.max_validation_rows is not None:
        held_out = held_out[: settings.max_validation_rows]
    return [examples[i] for i in train], [examples[i] for i in held_out]


def documentation_rows(fraction: float) -> tuple[list[Row], list[Row]]:
    """Topics of Python's own documentation, and every so many of them held out, evenly by size.

    Topics are ordered by length, so that the part held out has short and long ones.
    """
    from pydoc_data.topics import topics

    path = "pydoc_data.topics"
    ordered = [
        Row({"text": topics[name]}, path, 1) for name in sorted(topics, key=lambda name: (len(topics[name]), name))
    ]
    every = max(2, round(1 / fraction))
    held_out = ordered[every // 2 :: every]
    return [row for i, row in enumerate(ordered) if i % every != every // 2], held_out
