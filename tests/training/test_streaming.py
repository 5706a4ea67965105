"""Streamed data: the examples of data in memory, bit for bit, in memory that does not grow with the file."""

import csv
import dataclasses
import gzip
import json
import random
import tempfile
import tracemalloc
from datetime import datetime

import jax
import numpy as np
import pytest
from little_data import WORDS, sentences

from jlora.training import finetune
from jlora.training.data import dataset
from jlora.training.data import rows as files
from jlora.training.data.dataset import load_data
from jlora.training.data.streaming import opening
from jlora.training.errors import DataError, SettingError
from jlora.training.model.subject import open_codec
from jlora.training.settings.defaults import resolve
from jlora.training.settings.fields import Settings

pytestmark = pytest.mark.once
NOW = datetime(2026, 1, 1)


@pytest.fixture(scope="module")
def codec():
    return open_codec(resolve(Settings()))[0]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(dataset, "_BLOCK", 7)
    monkeypatch.setattr(files, "_BLOCK", 300)


def text(rng, most=40):
    return " ".join(rng.choices(WORDS, k=rng.randint(2, most)))


def lines(path, rows):
    content = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return str(path)


def texts(folder):
    """JSON lines with an empty row among them, and a compressed table."""
    import pyarrow
    from pyarrow import parquet

    rng = random.Random(0)
    rows = [{"text": text(rng)} for _ in range(40)] + [{"text": " "}]
    parquet.write_table(pyarrow.Table.from_pylist([{"text": text(rng)} for _ in range(30)]), folder / "b.parquet")
    return lines(folder / "a.jsonl.gz", rows) + "," + str(folder / "b.parquet")


def answers(folder):
    rng = random.Random(1)
    chat = lambda: {"messages": [{"role": r, "content": text(rng)} for r in ("user", "assistant")]}
    return lines(
        folder / "c.jsonl", [chat() if n % 3 else {"prompt": text(rng), "completion": text(rng)} for n in range(33)]
    )


def array(folder):
    """One array on one line, longer than a block that is read at once, with a row that is."""
    rng = random.Random(4)
    rows = [{"text": text(rng, 30)} for _ in range(60)] + [{"text": "a dog", "more": "é" * 9_000}, {"text": "a cat"}]
    (folder / "f.json").write_text(json.dumps(rows, ensure_ascii=False))
    return str(folder / "f.json")


def labelled(folder):
    rng = random.Random(2)
    with open(folder / "d.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([text(rng) + "\nand more", rng.choice(["good", "bad", "neither"])] for _ in range(30))
    return str(folder / "d.csv")


def pairs(folder):
    rng = random.Random(3)
    rows = ({"prompt": text(rng, 8), "chosen": " " + text(rng), "rejected": " " + text(rng)} for _ in range(24))
    return lines(folder / "e.jsonl", rows)


CASES = {
    "texts packed": (texts, {}),
    "texts in pieces": (texts, {"packing": False, "long_rows": "split", "max_validation_rows": 3}),
    "a mixture, some rows of it": (texts, {"weights": "3,2", "max_rows": 31}),
    "answers, long ones left out": (answers, {"long_rows": "drop", "packing": False, "max_length": 96}),
    "answers beside a validation file": (answers, {"validation": answers, "max_validation_rows": 9}),
    "an array": (array, {"max_rows": 50}),
    "labels": (labelled, {"task": "classify"}),
    "pairs": (pairs, {"task": "preference"}),
    "judged answers": (pairs, {"task": "preference", "preference_loss": "kto"}),
}


@pytest.mark.parametrize("case", CASES)
def test_streamed_data_are_those_in_memory_to_the_last_bit(tmp_path, codec, case):
    make, options = CASES[case]
    data = make(tmp_path)
    options = {"max_length": 24, **options, **({"validation": data} if "validation" in options else {})}
    settings = resolve(Settings(data=data, seed=3, out=str(tmp_path / "new" / "run"), **options))
    said = []
    here, there = (
        load_data(dataclasses.replace(settings, stream=stream), codec, NOW, say=said.append) for stream in (False, True)
    )
    assert len(said) == 1 and "streamed" in said[0] and here.streamed is None and there.streamed
    assert not isinstance(there.train, list) and "streamed from 0.0 MB" in there.amounts()
    for name in ("labels", "source", "fixed", "longest", "notes", "unpacked", "texts"):
        assert getattr(here, name) == getattr(there, name), name
    assert here.digest() == there.digest() and here.validation_digest() == there.validation_digest()
    assert (here.shortest_first() == there.shortest_first()).all()
    iterators = [data.training_batches(4, 5) for data in (here, there)]
    for _ in range(12):
        same(*map(next, iterators))
    # A streamed run goes on where one in memory stopped.
    iterators[1].set_state(json.loads(json.dumps(iterators[0].get_state())))
    same(*map(next, iterators))
    batches = [data.validation_batches(4) for data in (here, there)]
    assert len(batches[0]) == len(batches[1]) > 0
    for _ in range(2):  # they can be gone through again
        for one, other in zip(*batches, strict=True):
            same(one, other)
    assert [example.cut for example in here.train] == [example.cut for example in there.train]
    assert [len(each) for each in there.train[1:-1]] == [len(each) for each in here.train][1:-1]


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name]), name


def peak(path, codec, rows, stream):
    """Memory that reading the rows and a few batches took at most, in bytes."""
    rng = random.Random(0)
    data = lines(path / f"{rows}.jsonl", ({"text": text(rng, 300)} for _ in range(rows)))
    settings = resolve(Settings(data=data, stream=stream, max_length=512, max_validation_rows=4, out=str(path / "run")))
    tracemalloc.start()
    try:
        found = load_data(settings, codec, NOW)
        found.digest()
        next(found.training_batches(2, 0))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_grows_by_some_numbers_a_row_and_not_with_its_text(tmp_path, codec):
    grown = {
        stream: (peak(tmp_path, codec, 400, stream) - peak(tmp_path, codec, 100, stream)) / 300
        for stream in (True, False)
    }
    assert grown[True] < 500 and grown[False] > 3_000


@pytest.mark.long
def test_a_streamed_run_ends_with_the_bits_of_one_in_memory_and_resumes(tmp_path, stopped_and_resumed):
    settings = Settings(
        data=sentences(tmp_path),
        stream=True,
        steps=6,
        batch=8,
        max_length=16,
        rank=2,
        targets=".*/(q|v)_proj/kernel",
        learning_rate=3e-2,
        checkpoint_every=2,
        evaluate_every=3,
        sample_tokens=0,
        progress="none",
    )
    streamed = stopped_and_resumed(settings)
    here = finetune(dataclasses.replace(settings, stream=False), out=tmp_path / "here", say=lambda text: None)
    assert streamed.after == here.after and streamed.after["loss"] < streamed.before["loss"]
    for one, other in zip(*(jax.tree.leaves(result.adapted.params) for result in (streamed, here)), strict=True):
        assert np.array_equal(one, other)


def test_a_row_that_cannot_be_used_is_named_and_an_empty_file_too(tmp_path, codec):
    bad = lines(tmp_path / "a.jsonl", [{"text": "a dog"}] * 20 + [{"txt": "b"}])
    settings = resolve(Settings(data=bad, stream=True, out=str(tmp_path / "run")))
    with pytest.raises(DataError, match=r"a\.jsonl:21: there is no 'text'"):
        load_data(settings, codec, NOW)
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"b\.jsonl: the file has no rows"):
        load_data(dataclasses.replace(settings, data=str(tmp_path / "b.jsonl")), codec, NOW)
    blank = lines(tmp_path / "c.jsonl", [{"text": " "}] * 9)
    with pytest.raises(DataError, match=r"c\.jsonl: the file has nothing to learn from; 9 rows left out"):
        load_data(dataclasses.replace(settings, data=blank), codec, NOW)


def test_a_text_is_not_streamed_and_says_so(tmp_path, codec, monkeypatch):
    (tmp_path / "a.txt").write_text("one day")
    settings = resolve(Settings(data=str(tmp_path / "a.txt"), validation=sentences(tmp_path, 3), stream=True))
    with pytest.raises(SettingError, match=r"stream can't be: .*a\.txt is one text, a single row; rows of \.jsonl"):
        load_data(settings, codec, NOW)
    monkeypatch.setattr(opening, "LARGE", 2)
    said = []
    assert load_data(dataclasses.replace(settings, stream=None), codec, NOW, say=said.append).streamed is None
    assert f"read into memory: {tmp_path / 'a.txt'} is one text" in said[0]
    with pytest.raises(SettingError, match="stream needs a data file"):
        load_data(resolve(Settings(stream=True)), codec, NOW)


def test_large_files_are_streamed_unless_that_is_refused(tmp_path, codec, monkeypatch):
    settings = resolve(Settings(data=sentences(tmp_path, 9), max_length=16, out=str(tmp_path / "run")))
    size = len((tmp_path / "sentences.jsonl").read_bytes())
    for large, stream, wanted in ((size, None, True), (size + 1, None, False), (size, False, False)):
        monkeypatch.setattr(opening, "LARGE", large)
        assert (load_data(dataclasses.replace(settings, stream=stream), codec, NOW).streamed is not None) == wanted


def test_rows_given_in_python_are_streamed_where_asked_for(tmp_path, codec):
    settings = resolve(Settings(data="rows given in Python", max_length=16, stream=True, out=str(tmp_path / "run")))
    rows = [{"text": f"a dog saw {n} cats"} for n in range(20)]
    there = load_data(settings, codec, NOW, {"data": rows})
    here = load_data(dataclasses.replace(settings, stream=False), codec, NOW, {"data": rows})
    assert there.streamed and there.digest() == here.digest()
    with pytest.raises(TypeError, match="data must be a file, or rows with"):
        load_data(settings, codec, NOW, {"data": iter(rows)})


def test_a_full_disk_is_one_sentence(tmp_path, codec, monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **kind: open("/dev/full", "r+b"))  # noqa: SIM115
    settings = resolve(Settings(data=sentences(tmp_path, 9), stream=True, out=str(tmp_path / "run")))
    with pytest.raises(OSError, match=rf"the disk of {tmp_path} is full: .*choose another disk by --out"):
        load_data(settings, codec, NOW)
