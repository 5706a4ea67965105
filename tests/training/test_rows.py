"""Rows of every format; a row that cannot be used is named by file and line."""

import json

import pytest

from jlora.training.data import rows
from jlora.training.data.dataset import documentation_rows
from jlora.training.data.rows import read_rows
from jlora.training.errors import DataError


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_csv_has_quotes_and_fields_of_several_lines(tmp_path):
    rows = read_rows(write(tmp_path, "a.csv", 'text,label\r\n"one, ""two""",x\r\n"three\nfour",y\r\nfive,z\r\n'))
    assert [row.values["text"] for row in rows] == ['one, "two"', "three\nfour", "five"]
    assert [row.line for row in rows] == [2, 3, 5]


def test_a_quote_in_tsv_is_an_ordinary_character(tmp_path):
    rows = read_rows(write(tmp_path, "a.tsv", 'sentence\tlabel\n"quoted\t1\n'))
    assert rows[0].values == {"sentence": '"quoted', "label": "1"}


def test_json_lines_keep_their_values(tmp_path):
    rows = read_rows(write(tmp_path, "a.jsonl", '{"text": "a"}\n{"prompt": "b", "completion": "c"}\n'))
    assert rows[1].values == {"prompt": "b", "completion": "c"}
    assert rows[1].line == 2


def test_a_text_file_is_one_row(tmp_path):
    assert read_rows(write(tmp_path, "a.txt", "one\n\ntwo\n"))[0].values == {"text": "one\n\ntwo\n"}


def test_one_array_of_objects_is_rows_with_their_lines(tmp_path):
    for name in ("a.json", "a.jsonl"):
        rows = read_rows(write(tmp_path, name, ' [\n {"text": "a"}, {"text": "b\\n"},\n\n {\n"text": "c"}\n]\n'))
        assert [(row.line, row.values["text"]) for row in rows] == [(2, "a"), (2, "b\n"), (4, "c")]
    assert read_rows(write(tmp_path, "lines.json", '{"text": "a"}\n'))[0].values == {"text": "a"}


@pytest.mark.parametrize("block", [3, 7, 1000])
def test_an_array_is_read_in_blocks_of_any_size(tmp_path, monkeypatch, block):
    monkeypatch.setattr(rows, "_BLOCK", block)
    values = [{"text": "é, ]"}, {"text": "b", "n": [1.5, {"c": None}]}, {"text": "\\"}]
    lines = ",\n".join(json.dumps(value, ensure_ascii=False) for value in values)
    found = read_rows(write(tmp_path, "a.json", f"\ufeff[{lines}\n]\n"))
    assert [row.values for row in found] == values and [row.line for row in found] == [1, 2, 3]
    with pytest.raises(DataError, match=r"a\.json:2: the array of rows is not JSON here"):
        read_rows(write(tmp_path, "a.json", '[{"text": "a"},\n{"text": "b", ]'))
    with pytest.raises(DataError, match=r"a\.json:2: the line is not UTF-8"):
        read_rows(write(tmp_path, "a.json", b'[{"text": "a"},\n{"text": "\xff"}]'))
    with pytest.raises(DataError, match=r"a\.json:1: after this row of the array there is neither"):
        read_rows(write(tmp_path, "a.json", '[{"text": "a"}'))


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.jsonl", '\n{"text": "a"}\n  \n\n{"text": "b"}\n\n', ["a", "b"]),
        ("a.csv", 'text,n\n\n"a\n\nb",1\n\nc,2\n', ["a\n\nb", "c"]),
        ("a.tsv", "text\tn\n\na\t1\n   \nb\t2\n", ["a", "b"]),
    ],
)
def test_blank_lines_between_rows_are_passed_over(tmp_path, name, content, texts):
    assert [row.values["text"] for row in read_rows(write(tmp_path, name, content))] == texts


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", "one\r\ntwo\r\n", "one\ntwo\n"),
        ("a.jsonl", '{"text": "a"}\r\n', "a"),
        ("a.json", '[\r\n{"text": "a"}\r\n]', "a"),
        ("a.csv", 'text,n\r\n"a\r\nb",1\r\n', "a\nb"),
        ("a.tsv", "text\tn\r\na\t1\r\n", "a"),
    ],
)
def test_byte_order_marks_and_line_ends_of_windows_leave_no_trace(tmp_path, name, content, text):
    for mark in (b"", b"\xef\xbb\xbf"):
        rows = read_rows(write(tmp_path, name, mark + content.encode()))
        assert [row.values["text"] for row in rows] == [text]


def test_a_field_of_a_csv_may_be_a_whole_book(tmp_path):
    assert len(read_rows(write(tmp_path, "a.csv", "text\n" + "word " * 50_000))[0].values["text"]) == 250_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " \n\n", r"a\.txt: the file has no text"),
        ("a.txt", b"good\nbad \xff\n", r"a\.txt:2: the line is not UTF-8"),
        ("a.jsonl", "", r"a\.jsonl: the file has no rows"),
        ("a.jsonl", "\n \n", r"a\.jsonl: the file has no rows"),
        ("a.jsonl", '\n{"n": ' + "9" * 5000 + "}", r"a\.jsonl:2: the row cannot be read"),
        ("a.jsonl", '{"text": ' + "[" * 10**5, r"a\.jsonl:1: the row"),
        ("a.json", "[]", r"a\.json: the file has no rows"),
        (
            "a.json",
            '{\n "text": "a"\n}\n',
            r"a\.json:1: the row is not JSON .*; wanted one object a line, or one array",
        ),
        ("a.json", '[{"text": "a"},\n\n{"text": }]', r"a\.json:3: the array of rows is not JSON here"),
        ("a.json", '[{"text": "a"},\n 3]', r"a\.json:2: the row must be a JSON object, got 3"),
        (
            "a.json",
            '[{"text": "a"}\n{"text": "b"}]',
            r"a\.json:1: after this row of the array there is neither a comma",
        ),
        ("a.json", '[{"text": "a"}]\n[{}]', r"a\.json:2: after the array of rows there is more: '\[{}\]'"),
        ("a.txt", "one".encode("utf-16"), r"a\.txt: the file is UTF-16; save it as UTF-8"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl:2: the row is not JSON"),
        ("a.jsonl", '["text"]\n', r"a\.jsonl:1: the row must be a JSON object"),
        ("a.csv", "", r"a\.csv:1: the first line must name the columns"),
        ("a.csv", "text,text\na,b\n", r"a\.csv:1: the first line must name the columns, each once"),
        ("a.csv", "text,label\na,b\nc\n", r"a\.csv:3: the row has 1 fields, but the header names 2"),
        ("a.csv", "text,label\n,\n", r"a\.csv:2: the row is empty"),
        ("a.csv", 'text,label\na,b\n"c"d,e\n', r"a\.csv:3: the row is not well-formed"),
        ("a.csv", "text,label\n", r"a\.csv: the file has no rows"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read_rows(write(tmp_path, name, content))


def test_an_unknown_suffix_asks_for_the_format(tmp_path):
    path = write(tmp_path, "a.dat", "x")
    with pytest.raises(ValueError, match=r"a\.dat: the format is not known from the name, .* or say --format"):
        read_rows(path)
    assert read_rows(path, "text")[0].values == {"text": "x"}


def test_a_missing_or_blank_value_names_the_row(tmp_path):
    row = read_rows(write(tmp_path, "a.jsonl", '{"text": " ", "n": 3}\n'))[0]
    with pytest.raises(DataError, match=r"a\.jsonl:1: 'text' is empty"):
        row.text("text")
    with pytest.raises(DataError, match=r"a\.jsonl:1: 'n' must be a text, got 3"):
        row.text("n")
    with pytest.raises(DataError, match=r"a\.jsonl:1: there is no 'prompt'; the row has 'text', 'n'"):
        row.text("prompt")


def test_without_data_pythons_documentation_is_cut_into_training_and_held_out_topics_of_every_length():
    from pydoc_data.topics import topics

    train, held_out = ([row.values["text"] for row in part] for part in documentation_rows(0.1))
    assert sorted(train + held_out) == sorted(topics.values())
    assert abs(len(held_out) - len(topics) / 10) < 1
    assert min(map(len, held_out)) < sorted(map(len, train))[len(train) // 10]
    assert max(map(len, held_out)) > sorted(map(len, train))[-len(train) // 10]
