"""Files of rows beside plain text, several files as one, rows given in Python, and what `jlora data` shows of them."""

import gzip
import json
import sys

import pytest

from jlora.training import finetune
from jlora.training.cli import main
from jlora.training.data.formats.mixture import files_of, read_files, shares_of
from jlora.training.data.rows import given_rows, read_rows
from jlora.training.errors import DataError, SettingError
from jlora.training.settings.fields import Settings

pytestmark = pytest.mark.once
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}


def write(path, values):
    path.write_text("".join(json.dumps(each) + "\n" for each in values))
    return str(path)


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", b'{"text": "a"}\n\n{"text": "b"}\n'), ("a.csv", b"text\na\nb\n"),
                                               ("a.json", b'[{"text": "a"}, {"text": "b"}]')])  # fmt: skip
def test_a_compressed_file_has_the_rows_of_the_plain_one(tmp_path, name, content):
    plain, packed = tmp_path / name, tmp_path / f"{name}.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    found = [[(row.values, row.line) for row in read_rows(path)] for path in (plain, packed)]
    assert found[0] == found[1] and [values["text"] for values, _ in found[0]] == ["a", "b"]


@pytest.mark.parametrize("damage", [lambda packed: packed[:-9], lambda packed: b"plain text",
                                    lambda packed: packed[:12] + b"\0\xff\xff" + packed[15:]])  # fmt: skip
def test_a_damaged_compressed_file_is_one_sentence(tmp_path, damage):
    (tmp_path / "a.jsonl.gz").write_bytes(damage(gzip.compress(b'{"text": "a"}\n' * 9)))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: the file is not a whole gzip file"):
        read_rows(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream"])
def test_tables_have_rows_without_the_nulls_that_fill_them(tmp_path, kind):
    import pyarrow
    from pyarrow import parquet

    values = [
        {**CHAT, "tools": None},
        {"text": "plain"},
        {"messages": [{"role": "user", "content": "x", "name": "Tom"}]},
    ]
    table = pyarrow.Table.from_pylist([{"messages": None, "text": None, **each} for each in values])
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    if kind == "parquet":
        parquet.write_table(table, path, row_group_size=2)
    else:
        make = pyarrow.ipc.new_file if kind == "arrow" else pyarrow.ipc.new_stream
        with pyarrow.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    rows = read_rows(path)
    assert [row.values for row in rows] == [CHAT, values[1], values[2]] and [row.line for row in rows] == [1, 2, 3]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=r"the file is not a whole (parquet|arrow) file"):
        read_rows(path)


def test_without_pyarrow_a_table_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"a\.parquet: reading parquet files needs pyarrow: pip install 'jlora\[arrow\]'"
    ):
        read_rows(tmp_path / "a.parquet")


def test_several_files_are_one_in_the_shares_that_are_asked_for(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"text": f"a{n}"} for n in range(30)])
    b = write(tmp_path / "b.jsonl", [{"text": f"b{n}"} for n in range(8)])
    whole = [row.values["text"] for row in read_files(f"{a}, {b}", None)]
    assert whole == [*(f"a{n}" for n in range(30)), *(f"b{n}" for n in range(8))]
    drawn = [row.values["text"] for row in read_files(f"{a},{b}", None, "0.6,0.4", seed=3)]
    # All of the smaller one, and as many of the other as its share asks for; none twice, in their order.
    assert [text[0] for text in drawn] == ["a"] * 12 + ["b"] * 8 and len(set(drawn)) == 20
    assert drawn[:12] == sorted(drawn[:12], key=lambda text: int(text[1:]))
    assert drawn == [row.values["text"] for row in read_files(f"{a},{b}", None, "3,2", seed=3)]
    assert drawn != [row.values["text"] for row in read_files(f"{a},{b}", None, "3,2", seed=4)]
    odd = write(tmp_path / "a,b.jsonl", [{"text": "c"}])
    assert files_of(odd) == [odd] and len(read_files(odd, None)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("1,x", "weights must be numbers above 0"), ("1,0", "above 0"), ("1", "has 1 numbers for 2 files")],
)
def test_wrong_shares_are_refused(text, message):
    with pytest.raises(SettingError, match=message):
        shares_of(text, 2)


def test_shares_without_files_are_refused():
    with pytest.raises(SettingError, match="weights needs several data files"):
        Settings(weights="1,2")


class Table:
    """What a Hugging Face data set can do, as far as it is used."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if not 0 <= index < len(self.rows):
            raise IndexError(index)
        return self.rows[index]


def test_rows_may_be_given_in_python():
    rows = given_rows(Table([{"text": "a", "messages": None}, {"text": "b"}]))
    assert [row.values for row in rows] == [{"text": "a"}, {"text": "b"}] and [row.line for row in rows] == [1, 2]
    for wrong, error, message in (
        (Table(["a"]), DataError, "rows given in Python:1: the row must be a dict, got 'a'"),
        ([], DataError, "there are no rows"),
        (
            {"text": ["a"]},
            TypeError,
            r"data must be a file, or rows with len\(rows\) and rows\[0\], each a dict; got dict",
        ),
        (iter([]), TypeError, "got list_iterator"),
    ):
        with pytest.raises(error, match=message):
            given_rows(wrong)


@pytest.mark.long
def test_a_job_trains_on_rows_given_in_python(tmp_path):
    rows = [
        {"text": f"{who} saw a {what} in the sun."} for who in ("Tom", "Sue", "Ben") for what in ("dog", "cat", "boy")
    ]
    said, options = [], {"steps": 2, "batch": 4, "max_length": 16, "rank": 2, "sample_tokens": 0, "progress": "none"}
    result = finetune(data=Table(rows), validation=rows[:3], out=tmp_path / "run", say=said.append, **options)
    assert result.after["loss"] < result.before["loss"] and len(result.adapted.params)
    assert any("rows given in Python: 9 rows to train on, 3 to validate" in line for line in said)
    assert "rows given in Python" in (result.out / "report.html").read_text()


@pytest.mark.parametrize(
    ("flags", "rows", "shown"),
    [
        (
            [],
            [CHAT, {"text": "One day."}],
            ["1 of messages, 1 of a text", "Assistant:« Hello.\n</s>»", "« One day.</s>»"],
        ),
        ([], [{"text": "word " * 900}], ["1 of 1 rows are longer", "proposal: --max-length 512", "[…]"]),
        (
            ["--task", "preference"],
            [{"prompt": "Tom", "chosen": " ran.", "rejected": " sat."}],
            ["chosen: <s> Tom« ran.</s>»", "rejected: <s> Tom« sat.</s>»"],
        ),
        (
            ["--task", "classify"],
            [{"text": "good", "label": "yes"}, {"text": "bad", "label": "no"}],
            ["label: yes", "label: no", "proposal: --max-length 8"],
        ),
    ],
)
def test_the_command_data_shows_how_rows_are_read(tmp_path, capsys, flags, rows, shown):
    assert main(["data", write(tmp_path / "a.jsonl", rows), *flags]) == 0
    printed = capsys.readouterr().out
    assert [text for text in shown if text not in printed] == []
    assert (f"{tmp_path}/a.jsonl:1" in printed and "tokens, " in printed) or "classify" in flags


def test_the_command_data_names_a_row_that_cannot_be_used(tmp_path, capsys):
    assert main(["data", write(tmp_path / "a.jsonl", [{"text": "a b"}, {"txt": "c"}])]) == 2
    assert "a.jsonl:2: there is no 'text'; the row has 'txt'" in capsys.readouterr().err
