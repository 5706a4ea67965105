"""Methods as tables, and what is said of a table that is wrong."""

import json
import re

import pytest

import jlora


def test_a_table_gives_the_method_and_what_it_leaves_out_is_the_default():
    assert jlora.method_from_dict({"method": "LoRA", "rank": 4}) == jlora.LoRA(rank=4)
    assert jlora.method_from_dict({"method": "Full"}) == jlora.Full()


def test_inner_methods_are_nested_tables():
    method = jlora.DoRA(jlora.LoRA(rank=4, scaling="rslora"))
    table = json.loads(json.dumps(jlora.method_to_dict(method)))
    assert table["method"] == "DoRA" and table["inner"]["method"] == "LoRA" and table["inner"]["rank"] == 4
    assert jlora.method_from_dict(table) == method


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"rank": 4}, "a method table needs method = one of ["),
        ({"method": "Lora"}, "'LoRA'"),
        ({"method": ["LoRA"]}, "a method table needs method = one of ["),
        ("LoRA", "a method table needs method = one of ["),
        ({"method": "LoRA", "rnk": 4, "alpa": 1}, "LoRA has no hyperparameter alpa, rnk; it has ['alpha', 'dropout',"),
        ({"method": "LoRA", "rank": 0}, "LoRA's rank must be a positive integer, got 0"),
        ({"method": "LoRA", "rank": "8"}, "LoRA's rank must be a positive integer, got '8'"),
        ({"method": "LoRA", "alpha": "8"}, "LoRA's alpha must be positive and finite, got '8'"),
        (
            {"method": "DoRA", "inner": 3},
            "DoRA: DoRA goes around a method that adapts a matrix, such as LoRA(8); got 3",
        ),
        ({"method": "DoRA", "inner": {"method": "LoRA", "rank": -1}}, "LoRA's rank must be a positive integer, got -1"),
    ],
)
def test_a_wrong_table_is_refused_with_what_would_do(table, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jlora.method_from_dict(table)
