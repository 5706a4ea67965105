"""Batches of examples, by grain: shuffled anew in every epoch, by random access, with a position that can be saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from jlora.training.data.preferences.pairs import Pair
from jlora.training.data.streaming.lazy import Lazy, Made, lengths_of

Batch = dict[str, np.ndarray]

# Rows are padded to one of these lengths (then to multiples of 256): few shapes, so few compilations, and at most half
# of a row is padding.
_LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# Batches among which examples are sorted by length: more saves padding, fewer mixes the examples better.
_WINDOW = 16


def padded_length(length: int, longest: int) -> int:
    """The length to which a row of `length` tokens is padded, never above `longest`."""
    bucket = next((size for size in _LENGTHS if size >= length), -(-length // 256) * 256)
    return min(bucket, longest)


def collate(examples: Sequence[Any], length: int, rows: int | None = None) -> Batch:
    """Examples as the arrays of a batch, padded to `length` tokens and `rows` rows.

    Args:
        examples: at most `rows` examples, or pairs of them, of at most `length` tokens.
        length: tokens of a row.
        rows: rows of the batch; as many as there are examples by default. Rows beyond them weigh nothing.

    Returns:
        `tokens`, `positions`, `segment_ids` (0 at padding), and `targets`, `weights` `[rows, length]` for language
        models or `types` `[rows, length]`, `labels`, `weights` `[rows]` for classification. Of pairs the arrays of language
        models are `[rows, 2, length]`, with `mask` in place of those weights, and `weights` and `desirable` are `[rows]`.
    """
    rows = rows or len(examples)
    if isinstance(examples[0], Pair):
        return _collate_pairs(examples, length, rows)
    classify = examples[0].label >= 0
    batch: Batch = {name: np.zeros((rows, length), np.int32) for name in ("tokens", "positions", "segment_ids")}
    if classify:
        batch |= {"types": np.zeros((rows, length), np.int32), "labels": np.zeros(rows, np.int32)}
        batch["weights"] = np.zeros(rows, np.float32)
    else:
        batch |= {"targets": np.zeros((rows, length), np.int32), "weights": np.zeros((rows, length), np.float32)}
    for row, example in enumerate(examples):
        size = len(example)
        batch["tokens"][row, :size] = example.tokens
        batch["segment_ids"][row, :size] = example.segments
        batch["positions"][row, :size] = _positions(example.segments)
        if classify:
            batch["types"][row, :size] = example.types
            batch["labels"][row], batch["weights"][row] = example.label, 1.0
        else:
            batch["targets"][row, :size] = example.targets
            batch["weights"][row, :size] = example.weights
    return batch


def _collate_pairs(pairs: Sequence[Any], length: int, rows: int) -> Batch:
    sides = [collate([getattr(pair, side) for pair in pairs], length, rows) for side in ("first", "second")]
    batch = {name: np.stack([side[name] for side in sides], axis=1) for name in sides[0]}
    batch["mask"] = batch["weights"]
    batch["weights"], batch["desirable"] = np.zeros(rows, np.float32), np.zeros(rows, np.int32)
    batch["weights"][: len(pairs)] = 1
    batch["desirable"][: len(pairs)] = [pair.desirable for pair in pairs]
    return batch


def _positions(segments: np.ndarray) -> np.ndarray:
    """0, 1, 2, … from the start of each segment."""
    index = np.arange(len(segments))
    starts = np.where(np.diff(segments, prepend=0) != 0, index, 0)
    return index - np.maximum.accumulate(starts)


class LengthWindows(grain.MapDataset):
    """Indices of examples, reordered within windows so that a batch holds examples of similar length.

    Window after window of the shuffled parent is sorted by length, cut into batches, and the batches shuffled. Access
    stays random: what is at an index depends on its window alone, so a saved position needs no buffer.
    """

    def __init__(self, parent: grain.MapDataset, lengths: Sequence[int] | np.ndarray, batch: int, seed: int):
        super().__init__(parent)
        self._lengths, self._batch, self._window, self._seed = np.asarray(lengths), batch, batch * _WINDOW, seed
        self._cached: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index):
        window, place = divmod(index, self._window)
        number, order = self._cached  # read once: another thread may replace it
        if number != window:
            order = self._order(window)
            self._cached = (window, order)
        return int(order[place])

    def _order(self, window: int) -> np.ndarray:
        found = np.array([self._parent[window * self._window + i] for i in range(self._window)])
        found = found[np.argsort(self._lengths[found], kind="stable")].reshape(_WINDOW, self._batch)
        return np.random.default_rng((self._seed, window)).permutation(found, axis=0).reshape(-1)


def training_batches(
    examples: Sequence[Any], batch: int, longest: int, seed: int, fixed: bool
) -> grain.DatasetIterator:
    """An endless iterator over batches, with `get_state` and `set_state`.

    Args:
        examples: the training data.
        batch: rows of a batch.
        longest: the longest row in tokens.
        seed: of the order; every epoch has another one.
        fixed: pad every row to `longest` (packed rows); otherwise batches hold rows of similar length.
    """
    order: grain.MapDataset = (
        grain.MapDataset.range(len(examples)).shuffle(seed=seed).repeat(None, reseed_each_epoch=True)
    )
    if not fixed:
        order = LengthWindows(order, lengths_of(examples), batch, seed)

    def assemble(indices: Sequence[Any]) -> Batch:
        chosen = [examples[int(i)] for i in indices]
        length = longest if fixed else padded_length(max(map(len, chosen)), longest)
        return collate(chosen, length)

    # An endless order has no remainder, and one more batch than grain's largest length can't be counted.
    dataset = order.batch(batch, drop_remainder=True, batch_fn=assemble)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def validation_batches(examples: Sequence[Any], batch: int, longest: int, fixed: bool) -> Sequence[Batch]:
    """All examples once, the shortest first; the last batch is filled up with rows that weigh nothing.

    Batches of a `Lazy` are made each time that they are asked for.
    """
    order = by_length(examples)

    def make(number: int) -> Batch:
        chosen = [examples[int(i)] for i in order[number * batch : (number + 1) * batch]]
        length = longest if fixed else padded_length(len(chosen[-1]), longest)
        return collate(chosen, length, batch)

    batches = Made(-(-len(examples) // batch), make)
    return batches if isinstance(examples, Lazy) else list(batches)


def by_length(examples: Sequence[Any]) -> np.ndarray:
    """The numbers of the examples, the shortest first."""
    return np.argsort(lengths_of(examples), kind="stable")
