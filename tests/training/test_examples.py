"""Rows become tokens: the loss is taken where it should be."""

import numpy as np
import pytest

from jlora import models
from jlora.models.config import read_config
from jlora.training import chat
from jlora.training.encode import encode_classification, encode_language, label_names
from jlora.training.errors import DataError
from jlora.training.rows import Row
from jlora.training.tokens import Codec


@pytest.fixture(scope="module")
def codec():
    directory = models.STORIES260K
    return Codec(models.load_tokenizer(directory), read_config(directory), directory)


def row(**values):
    return Row(values, "a.jsonl", 7)


def encode(codec, rows, max_length=64, template="plain"):
    def make():
        return chat.template(template, codec.directory, codec.tokenizer.get_vocab())

    return encode_language(rows, codec, make, "text", max_length)


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
        ({"text": "  "}, "a.jsonl:7: 'text' is empty"),
        ({"prompt": "a"}, "a.jsonl:7: there is no 'completion'"),
        ({"messages": []}, "a.jsonl:7: 'messages' must be a list"),
        ({"messages": [{"role": "user", "content": ""}]}, "a.jsonl:7: message 1 must be"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "a.jsonl:7: message 1 has the role 'bot'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "a.jsonl:7: no message is by the assistant"),
        ({"prompt": "word " * 80, "completion": "x"}, "a.jsonl:7: nothing of the answer is left: it begins after"),
    ],
)
def test_a_row_that_cannot_be_learned_from_is_named(codec, values, message):
    with pytest.raises(DataError, match=message):
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
