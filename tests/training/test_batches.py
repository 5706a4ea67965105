"""Packing and batches: nothing lost, nothing doubled, the same order again."""

import dataclasses

import numpy as np
import pytest

from jlora.training.data.dataset import Data, split
from jlora.training.data.encode import Example, language_example
from jlora.training.data.packing import join, pack, packed
from jlora.training.data.pipeline import collate, padded_length, training_batches, validation_batches
from jlora.training.settings.fields import Settings


def examples(lengths):
    """Language examples whose tokens tell which example they are of."""
    return [language_example(np.full(n + 1, i + 1, np.int32), np.ones(n + 1, bool)) for i, n in enumerate(lengths)]


def classified(lengths):
    none = np.zeros(0, np.int32)
    return [
        Example(
            np.full(n, i + 1, np.int32),
            none,
            none.astype(np.float32),
            np.zeros(n, np.int32),
            i % 2,
            np.ones(n, np.int32),
        )
        for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("one_text", [True, False])
def test_what_is_held_out_is_not_trained_on(one_text):
    train, held_out = split(list(range(20)), Settings(validation_fraction=0.25, seed=3), one_text)
    assert len(held_out) == 5 and sorted(train + held_out) == list(range(20))
    assert (held_out == [15, 16, 17, 18, 19]) == one_text


def test_packing_keeps_every_example_once_within_the_capacity():
    lengths = np.random.default_rng(0).integers(1, 33, 500).tolist()
    rows = pack(lengths, 32)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert all(sum(lengths[i] for i in row) <= 32 for row in rows)
    assert len(rows) <= 1.06 * sum(lengths) / 32 + 1
    with pytest.raises(ValueError, match="example 0 has 33 tokens, a row holds 32"):
        pack([33], 32)


def test_packed_rows_have_segments_and_positions_that_restart():
    batch = collate([join(examples([3, 2]))], 8)
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 0]]
    assert batch["tokens"].tolist() == [[1, 1, 1, 2, 2, 0, 0, 0]]
    assert batch["weights"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]]


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_an_epoch_shows_every_example_once_in_an_order_of_its_own():
    iterator = training_batches(examples([4] * 12), 4, 8, seed=0, fixed=True)
    epochs = [np.concatenate([b["tokens"][:, 0] for b in take(iterator, 3)]) for _ in range(2)]
    assert all(sorted(epoch) == list(range(1, 13)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()


@pytest.mark.parametrize("fixed", [True, False])
def test_the_position_restores_the_order(fixed):
    data = examples(np.random.default_rng(0).integers(1, 60, 40).tolist())
    first = training_batches(data, 4, 64, seed=3, fixed=fixed)
    take(first, 5)
    position, wanted = first.get_state(), take(first, 15)
    second = training_batches(data, 4, 64, seed=3, fixed=fixed)
    second.set_state(position)
    for one, other in zip(wanted, take(second, 15)):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_another_seed_is_another_order():
    one, other = (next(training_batches(examples([4] * 50), 8, 8, seed=s, fixed=True))["tokens"] for s in (0, 1))
    assert not np.array_equal(one, other)


def test_batches_of_similar_length_pad_little_and_show_everything():
    lengths = np.random.default_rng(1).integers(4, 128, 512).tolist()
    iterator = training_batches(classified(lengths), 8, 128, seed=0, fixed=False)
    batches = take(iterator, 64)
    shown = np.concatenate([batch["tokens"][:, 0] for batch in batches])
    assert sorted(shown) == list(range(1, 513))
    padding = 1 - sum(lengths) / sum(batch["tokens"].size for batch in batches)
    assert padding < 0.25
    assert len({batch["tokens"].shape for batch in batches}) <= 9


def test_padded_lengths_are_few_and_never_too_long():
    assert {padded_length(n, 300) for n in range(1, 301)} == {8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 300}
    assert padded_length(1000, 2048) == 1024


def test_validation_shows_everything_once_and_fills_up_with_rows_that_weigh_nothing():
    batches = validation_batches(classified([5, 3, 9, 4, 7]), 2, 16, fixed=False)
    assert [batch["tokens"].shape for batch in batches] == [(2, 8), (2, 8), (2, 16)]
    assert sum(batch["weights"].sum() for batch in batches) == 5
    assert batches[-1]["weights"].tolist() == [1, 0]


def test_packing_drops_no_target():
    data = examples([3, 9, 4, 7, 2])
    rows = packed(data, 10)
    assert sum(row.weights.sum() for row in rows) == sum(example.weights.sum() for example in data)


def test_one_changed_label_is_other_data():
    """By the digest a resumed run is refused that would go on with other data."""
    examples = classified([3, 4, 5])
    data = Data(examples, examples[:1], ["bad", "good"], "file", False, 5, 0)
    other = dataclasses.replace(examples[1], label=1 - examples[1].label)
    changed = dataclasses.replace(data, train=[examples[0], other, examples[2]])
    assert changed.digest() != data.digest() == dataclasses.replace(data, train=list(examples)).digest()


def test_packed_rows_are_told_from_the_rows_they_hold():
    data = Data(classified([3, 4]), classified([3]), [], "file", True, 8, [], unpacked=(5, 1))
    assert data.amounts() == "5 rows to train on, 1 to validate, packed into 2 and 1 of 8 tokens"
    assert dataclasses.replace(data, unpacked=None).amounts() == "2 rows to train on, 1 to validate"


@pytest.mark.once
@pytest.mark.parametrize("fixed", [True, False])
def test_a_batch_may_be_of_one_row(fixed):
    found = take(training_batches(examples([4] * 3), 1, 8, seed=0, fixed=fixed), 3)
    assert all(batch["tokens"].shape[0] == 1 for batch in found)
    if fixed:
        assert sorted(int(batch["tokens"][0, 0]) for batch in found) == [1, 2, 3]
