"""The data of a run: read, checked, encoded, split into training and validation, packed."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from jlora.training.data import chat
from jlora.training.data.encode import Example, encode_classification, encode_language, label_names
from jlora.training.data.formats.mixture import files_of
from jlora.training.data.packing import packed
from jlora.training.data.pipeline import Batch, by_length, training_batches, validation_batches
from jlora.training.data.preferences.encode import encode_preferences
from jlora.training.data.preferences.pairs import Pair, mismatched, one_prompt
from jlora.training.data.rows import Row
from jlora.training.data.streaming.lazy import Chosen, Lazy, Mismatched, Packed, lengths_of
from jlora.training.data.streaming.opening import open_rows, size, streams
from jlora.training.data.streaming.sources import DataRows, StreamedRows
from jlora.training.data.streaming.spool import Spool
from jlora.training.data.tokens import Codec
from jlora.training.errors import DataError, SettingError
from jlora.training.settings.fields import Settings

_ONE_PROMPT = (
    "have the same prompt: kto estimates how far the model is from its base by answers to other prompts, and takes those to "
    "the same one here, which it trains on; give rows of several prompts, or pairs to --preference-loss dpo"
)
# Streamed rows that are encoded at once.
_BLOCK = 1_000


@dataclasses.dataclass(frozen=True)
class Data:
    """Encoded data.

    Attributes:
        train: examples to train on (packed, if so set); for preferences pairs of them. Streamed ones are a `Lazy`.
        validation: examples to validate on (packed likewise).
        labels: names of the labels in the order of their indices; empty for language models.
        source: where the data came from, in words.
        fixed: whether all rows are padded to the longest.
        longest: tokens of the longest row.
        notes: what became of rows that are not learned from as they are, with numbers, in words.
        template: how chats became text; None where there are none.
        unpacked: rows to train and to validate on before they were packed; None where they were not.
        streamed: bytes on the disk that the examples are read from, step by step; None where they are in memory.
    """

    train: Sequence[Any]
    validation: Sequence[Any]
    labels: list[str]
    source: str
    fixed: bool
    longest: int
    notes: list[str]
    template: chat.Template | None = None
    unpacked: tuple[int, int] | None = None
    streamed: int | None = None

    @functools.cached_property
    def texts(self) -> int:
        """The most texts that are packed into one row."""
        return max(most_texts(self.train), most_texts(self.validation))

    def amounts(self) -> str:
        """How many rows there are, in words."""
        rows = len(self.train), len(self.validation)
        train, validation = unpacked = self.unpacked or rows
        packed = f", packed into {rows[0]:,} and {rows[1]:,} of {self.longest} tokens" if unpacked != rows else ""
        streamed = "" if self.streamed is None else f", streamed from {size(self.streamed)} of tokens on the disk"
        return f"{train:,} rows to train on, {validation:,} to validate{packed}{streamed}"

    @functools.cached_property
    def _digest(self) -> str:
        return _digest(repr((self.labels, self.fixed, self.longest)), self.train)

    def digest(self) -> str:
        """SHA-256 of the training data: a resumed run must see the same."""
        return self._digest

    def validation_digest(self) -> str:
        """SHA-256 of the validation data."""
        return _digest("", self.validation)

    def training_batches(self, batch: int, seed: int):
        """An endless grain iterator over training batches."""
        return training_batches(self.train, batch, self.longest, seed, self.fixed)

    def validation_batches(self, batch: int) -> Sequence[Batch]:
        """Every validation example once, in the order of `shortest_first`; streamed ones are made when they are asked for."""
        return validation_batches(self.validation, batch, self.longest, self.fixed)

    def shortest_first(self) -> np.ndarray:
        """The numbers of the validation examples in the order of their batches."""
        return by_length(self.validation)


def _digest(head: str, examples: Sequence[Any]) -> str:
    sha = hashlib.sha256(head.encode())
    for example in _rows_of(examples):
        for array in (example.tokens, example.targets, example.weights, example.types, example.segments):
            sha.update(np.int64(array.size).tobytes() + np.ascontiguousarray(array).tobytes())
        sha.update(np.int64(example.label).tobytes())
    return sha.hexdigest()


def most_texts(examples: Sequence[Any]) -> int:
    """The most texts that are packed into one row; pairs are never packed."""
    if isinstance(examples, Lazy):
        return examples.texts
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
    settings: Settings,
    codec: Codec,
    now: datetime | None = None,
    given: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Data:
    """Read and encode what the (resolved) settings name.

    Streamed data (`--stream`) are the same examples, bit for bit, but lie encoded in a file, and are read from it when a batch
    wants them.

    Args:
        settings: resolved.
        codec: the model's tokenizer.
        now: the time that chat templates may write.
        given: rows in place of the files of `data` and `validation`, see `jlora.training.data.rows.given_rows`.
        say: takes what is worth knowing while the data are read, which may take long.

    Raises:
        DataError: for a row that cannot be used, naming file and line.
        SettingError: if a part comes out empty, or can't be streamed.
        OSError: if a file cannot be read.
    """
    assert settings.max_length is not None
    stream = streams(settings, given or {}, say)
    rows, held_out, source = _rows(settings, given or {}, stream)
    labels = label_names(rows, settings.label_column) if settings.task == "classify" else []
    rows, counts = subset(rows, settings.max_rows, settings.seed), collections.Counter()
    template = functools.cache(lambda: chat_template(settings, codec, now))  # made when the first chat comes
    spools = [Spool(Path(settings.out)) for _ in range(2)] if stream else [None, None]

    def read(rows: DataRows, spool: Spool | None) -> Sequence[Any]:
        if spool is None:
            return encode(rows, settings, codec, labels, counts, template)
        return encode_into(spool, rows, settings, codec, labels, counts, template)

    train = read(rows, spools[0])
    if settings.data is None or settings.validation is not None:
        validation = read(subset(held_out, settings.max_validation_rows, settings.seed), spools[1])
    else:
        train, validation = split(train, settings, one_text=is_one(rows))
    fixed, notes = bool(settings.packing), notes_on(counts, settings)
    unpacked = (len(train), len(validation)) if fixed else None
    train, validation = arranged(train, settings), arranged(validation, settings)
    if settings.preference_loss == "kto":
        parts = {"to train on": train, "to validate": validation}
        notes += [f"all rows {what} {_ONE_PROMPT}" for what, part in parts.items() if one_prompt(part)]
    longest = settings.max_length if fixed else max(int(lengths_of(part).max()) for part in (train, validation))
    made = template() if template.cache_info().currsize else None
    notes += made.notes if made is not None else []
    streamed = sum(spool.bytes for spool in spools if spool is not None) if stream else None
    return Data(train, validation, labels, source, fixed, longest, notes, made, unpacked, streamed)


def _rows(settings: Settings, given: Mapping[str, Any], stream: bool) -> tuple[DataRows, DataRows, str]:
    """The rows to train on, those to validate on where the settings name them, and where the first came from."""
    if settings.data is None:
        return *documentation_rows(settings.validation_fraction or 0.1), "the Python documentation (pydoc_data.topics)"
    rows, source = open_rows(settings, given, stream), ", ".join(files_of(settings.data))
    if settings.validation is None:
        return rows, [], source
    held_out = dataclasses.replace(settings, data=settings.validation, validation=None, weights=None)
    return rows, open_rows(held_out, {"data": given["validation"]} if "validation" in given else {}, stream), source


def arranged(examples: Sequence[Any], settings: Settings) -> Sequence[Any]:
    """The examples of a part as they are trained on: packed, or beside those that they are compared with."""
    assert settings.max_length is not None
    if isinstance(examples, Lazy):
        if settings.packing:
            return Packed(examples, settings.max_length)
        return Mismatched(examples, settings.max_length) if settings.preference_loss == "kto" else examples
    if settings.packing:
        return packed(examples, settings.max_length)
    return mismatched(examples, settings.max_length) if settings.preference_loss == "kto" else examples


def chat_template(settings: Settings, codec: Codec, now: datetime | None = None) -> chat.Template:
    """The settings' chat template for the model."""
    return chat.template(settings.chat_template, codec.directory, codec.tokenizer.get_vocab(), now)


def encode(
    rows: DataRows,
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
    rows = list(rows)
    examples = _encoded(rows, settings, codec, labels, counts, template)
    _check_any(rows[0], len(rows), len(examples), settings, counts)
    return examples


def encode_into(
    spool: Spool,
    rows: DataRows,
    settings: Settings,
    codec: Codec,
    labels: Sequence[str],
    counts: collections.Counter[str],
    template: Callable[[], chat.Template] | None = None,
) -> Lazy:
    """The examples of `encode`, made block by block and kept in a file; what it raises is raised at the block's turn."""
    number, first, left = 0, None, iter(rows)
    while block := list(itertools.islice(left, _BLOCK)):
        spool.add(_encoded(block, settings, codec, labels, counts, template))
        number, first = number + len(block), first or block[0]
    assert first is not None
    _check_any(first, number, len(spool), settings, counts)
    return spool.examples()


def _encoded(
    rows: Sequence[Row],
    settings: Settings,
    codec: Codec,
    labels: Sequence[str],
    counts: collections.Counter[str],
    template: Callable[[], chat.Template] | None,
) -> list[Any]:
    assert settings.max_length is not None
    template = template or functools.partial(chat_template, settings, codec)
    if settings.task == "classify":
        columns = (settings.text_column, settings.text_pair_column, settings.label_column)
        numbers = {label: index for index, label in enumerate(labels)}
        examples = encode_classification(rows, codec, columns, numbers, settings.max_length)
        if settings.long_rows == "drop":
            counts["dropped"] += sum(example.cut for example in examples)
            examples = [example for example in examples if not example.cut]
    elif settings.task == "preference":
        judged_by = settings.label_column if settings.preference_loss == "kto" else None
        options = settings.max_length, judged_by, settings.long_rows == "drop", counts
        examples = encode_preferences(rows, codec, template, *options)
    else:
        limits = settings.max_length, settings.long_rows, counts
        examples = encode_language(rows, codec, template, settings.text_column, *limits)
    counts["cut"] += sum(example.cut for example in examples)
    return examples


def _check_any(first: Row, rows: int, examples: int, settings: Settings, counts: collections.Counter[str]) -> None:
    """Something is left of the rows."""
    if rows == 1 and settings.task == "lm":
        del counts["split"]  # a text file becomes pieces by its nature
    if not examples:
        why = "; ".join(["the file has nothing to learn from", *notes_on(counts, settings)])
        raise DataError(first.path, None, why)


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


def subset(rows: DataRows, count: int | None, seed: int) -> DataRows:
    """`count` of the rows drawn by the seed, in the file's order; all by default."""
    if count is None or count >= len(rows):
        return rows
    chosen = np.sort(np.random.default_rng(seed).choice(len(rows), count, replace=False))
    return rows.chosen(chosen) if isinstance(rows, StreamedRows) else [rows[i] for i in chosen]


def is_one(rows: DataRows) -> bool:
    """Whether there is a single row."""
    return len(list(itertools.islice(rows, 2))) == 1


def split(examples: Sequence[Any], settings: Settings, one_text: bool) -> tuple[Sequence[Any], Sequence[Any]]:
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
    train, held_out = np.sort(order[:-count]), np.sort(order[-count:])[: settings.max_validation_rows]
    if isinstance(examples, Lazy):
        return Chosen(examples, train), Chosen(examples, held_out)
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
