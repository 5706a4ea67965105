"""Rows become tokens: the loss is taken where it should be."""

import collections

import numpy as np
import pytest

from jlora import models
from jlora.models.config import read_config
from jlora.training.data import chat
from jlora.training.data.encode import encode_classification, encode_language, label_names
from jlora.training.data.rows import Row
from jlora.training.data.tokens import Codec
from jlora.training.errors import DataError


@pytest.fixture(scope="module")
def codec():
    directory = models.STORIES260K
    return Codec(models.load_tokenizer(directory), read_config(directory), directory)


def row(**values):
    return Row(values, "a.jsonl", 7)


def encode(codec, rows, max_length=64, template="plain", **options):
    def make():
        return chat.template(template, codec.directory, codec.tokenizer.get_vocab())

    return encode_language(rows, codec, make, "text", max_length, **options)


def learned(codec, example):
    return codec.tokenizer.decode(example.targets[example.weights > 0].tolist(), skip_special_tokens=False)


def test_every_token_of_a_text_is_predicted_once(codec):
    text = "Once upon a time there was a little dog. " * 5
    examples = encode(codec, [row(text=text)], max_length=10)
    targets = np.concatenate([example.targets for example in examples])
    ids = codec.encode_many([text])[0][0]
    np.testing.assert_array_equal(targets, [*ids, codec.end])
    assert examples[0].tokens[0] == codec.begin
    assert all(example.weights.all() and len(example) <= 10 for example in examples)


def test_the_loss_is_on_the_completion_and_its_end_alone(codec):
    example = encode(codec, [row(prompt="Two and two is", completion=" four.")])[0]
    assert not example.cut and encode(codec, [row(prompt="A", completion="word " * 80)])[0].cut
    assert learned(codec, example).strip() == "four.</s>"
    assert example.tokens[0] == codec.begin


def test_the_loss_is_on_the_answers_of_a_chat_alone(codec):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi you"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you"},
    ]
    example = encode(codec, [row(messages=messages)])[0]
    assert learned(codec, example).split() == ["Hi", "you", "See", "you", "</s>"]
    read = codec.decode(example.tokens)
    assert "System: Be kind.\nUser: Hello\nAssistant: Hi you\nUser: Bye\nAssistant: See you" in read


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": "half \ud800"}, "a.jsonl:7: the text has half of a character"),
        ({"prompt": "a"}, "a.jsonl:7: there is no 'completion'"),
        ({"messages": []}, "a.jsonl:7: 'messages' must be a list"),
        ({"messages": [{"role": "user", "content": ""}]}, "a.jsonl:7: message 1 must be"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "a.jsonl:7: message 1 has the role 'bot'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "a.jsonl:7: no message is by the assistant"),
    ],
)
def test_a_row_that_cannot_be_learned_from_is_named(codec, values, message):
    with pytest.raises(DataError, match=message):
        encode(codec, [row(**values)])


LONG = [row(text="word " * 40), row(prompt="Say", completion=" word" * 40), row(prompt="Say " * 40, completion=" x")]


@pytest.mark.parametrize(
    ("long_rows", "examples", "counted"),
    [
        # By default a text is split, an answer loses its end, and a row without an answer before that end is left out.
        (None, 7, {"split": 1, "answerless": 1}),
        ("truncate", 2, {"answerless": 1}),
        ("drop", 0, {"dropped": 3}),
        # Of the third row, the piece with the answer is learned, those of its prompt alone are not.
        ("split", 13, {"split": 3}),
    ],
)
def test_rows_that_are_too_long_are_cut_split_or_left_out_and_counted(codec, long_rows, examples, counted):
    counts = collections.Counter()
    found = encode(codec, LONG, max_length=24, long_rows=long_rows, counts=counts)
    assert len(found) == examples and {name: n for name, n in counts.items() if n} == counted
    assert all(len(example) <= 24 and example.weights.any() for example in found)


def test_a_long_answer_in_pieces_is_learned_token_by_token_once(codec):
    whole, pieces = (encode(codec, LONG[1:2], n, long_rows="split") for n in (500, 24))
    assert len(whole) == 1 and len(pieces) > 1
    assert "".join(learned(codec, piece) for piece in pieces).replace(" ", "") == learned(codec, whole[0]).replace(
        " ", ""
    )


def test_rows_with_an_empty_text_or_answer_are_left_out_and_counted(codec):
    counts = collections.Counter()
    rows = [row(text=" "), row(prompt="a", completion=""), row(instruction="a", output="\n"), row(text="b")]
    assert len(encode(codec, rows, counts=counts)) == 1 and counts["empty"] == 3


QUESTION, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("values", "read", "answer"),
    [
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "User: Q\nAssistant: A", "A"),
        ({"conversations": [QUESTION, ANSWER], "system": "S"}, "System: S\nUser: Q\nAssistant: A", "A"),
        ({"instruction": "Q", "input": "", "output": "A"}, "User: Q\nAssistant: A", "A"),
        ({"instruction": "Q", "input": "I", "output": "A", "text": "Q I A"}, "User: Q\n\nI\nAssistant: A", "A"),
        ({"messages": [{**QUESTION, "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "R"}]}, ANSWER]},
         "User: QR\nAssistant: A", "A"),
        ({"prompt": "Q", "chosen": " A", "rejected": " B"}, "Q A", "A"),
        ({"prompt": "Q", "chosen": [QUESTION, ANSWER], "rejected": []}, "User: Q\nAssistant: A", "A"),
        ({"prompt": [QUESTION], "completion": [ANSWER]}, "User: Q\nAssistant: A", "A"),
        ({"prompt": "Q", "chosen": [ANSWER], "rejected": []}, "User: Q\nAssistant: A", "A"),
    ],
)  # fmt: skip
def test_the_layouts_of_datasets_are_recognised(codec, values, read, answer):
    example = encode(codec, [row(**values)])[0]
    assert codec.decode(example.tokens).strip() == read
    assert learned(codec, example).removesuffix("</s>").strip() == answer


def test_a_text_column_that_is_named_comes_before_a_layout(codec):
    rows = [row(body="B", prompt="P", completion="C")]
    found = encode_language(rows, codec, lambda: None, "body", 64)
    assert learned(codec, found[0]).strip() == "B</s>"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"question": "a", "answer": "b"}, r"there is no 'text'; the row has 'question', 'answer'; rows are read like"),
        (
            {"question": "a"},
            r'.*\{"conversations": \[\{"from": "human", "value": "…"\}, .* or \{"instruction": "…", "input": "…"',
        ),
        ({"instruction": "a"}, "there is no 'output'"),
        ({"chosen": "a", "rejected": "b"}, "there is no 'prompt'; .* a text as 'chosen' needs it"),
        ({"conversations": ["a"]}, r"'conversations' must be a list of \{from, value\}"),
        ({"conversations": [{"from": "bot", "value": "a"}]}, "message 1 has the role 'bot'"),
        ({"messages": [{**QUESTION, "content": [{"type": "image_url"}]}]}, "message 1 has a part of type 'image_url'"),
        (
            {"messages": [QUESTION, {**ANSWER, "weight": 0}]},
            "message 2 has the weight 0, but the loss is taken on every",
        ),
    ],
)
def test_a_layout_that_is_not_read_is_named_with_what_is(codec, values, message):
    with pytest.raises(DataError, match="a.jsonl:7: " + message):
        encode(codec, [row(**values)])


def test_labels_are_ordered_and_checked(codec):
    rows = [row(text="a", label="10"), row(text="b", label="9"), row(text="c", label=9)]
    assert label_names(rows, "label") == ["9", "10"]
    with pytest.raises(DataError, match="the column 'label' has the one label '9'"):
        label_names(rows[1:], "label")
    with pytest.raises(DataError, match="a.jsonl:7: the label '7' does not occur in the training data"):
        encode_classification([row(text="a", label="7")], codec, ("text", None, "label"), {"9": 0}, 16)


def test_pairs_have_two_types(data):
    directory = data / "minilm_l6_v2"
    bert = Codec(models.load_tokenizer(directory), read_config(directory), directory)
    rows = [row(a="one", b="two three", label="x")]
    example = encode_classification(rows, bert, ("a", "b", "label"), {"x": 0}, 16)[0]
    assert example.types.tolist() == [0, 0, 0, 1, 1, 1]
    assert codec_text(bert, example.tokens) == ["[CLS]", "one", "[SEP]", "two", "three", "[SEP]"]
    short = encode_classification(rows, bert, ("a", "b", "label"), {"x": 0}, 5)[0]
    assert len(short) == 5 and short.cut and not example.cut


def codec_text(codec, ids):
    return [codec.tokenizer.id_to_token(int(i)) for i in ids]
