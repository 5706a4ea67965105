"""The tables of docs/peft.md are what the code does."""

import sys
from pathlib import Path

import pytest

import jlora
from jlora.interchange import config
from jlora.interchange.formats import FORMATS

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))
import methods_table  # noqa: E402
import peft_table  # noqa: E402


def test_the_tables_are_up_to_date_and_have_every_method_and_setting():
    text = peft_table.PAGE.read_text(encoding="utf-8")
    assert peft_table.updated(text) == text, "run `python docs/peft_table.py`"
    assert all(f"| `{cls.__name__}(" in text for cls in methods_table.methods())
    assert all(f"| `{key}` |" in text for key in (*config.USED, *config.REFUSED))
    assert all(f"`{kind}`" in text for kind in FORMATS)


def test_the_table_tells_what_is_tried():
    assert peft_table.attempt(jlora.LoRA(rank=4), "peft") == "`LORA` of rank 4"
    assert peft_table.attempt(jlora.LoRA(rank=4, init="pissa"), "serving") == "`LORA` of rank 8"
    assert peft_table.attempt(jlora.SHiRA(rank=1), "serving") == "by `svd_rank=`"


def test_a_page_without_the_marks_is_refused():
    with pytest.raises(ValueError, match="must have the marks"):
        peft_table.updated("a page")
