"""The tables of docs/peft.md are what the code does."""

import sys
from pathlib import Path

import pytest

import jlora
from jlora.disk import catalog
from jlora.interchange.files import config
from jlora.interchange.kinds.formats import formats

DOCS = Path(__file__).parents[2] / "docs"
sys.path.insert(0, str(DOCS))
import generated  # noqa: E402
import peft_table  # noqa: E402

pytestmark = pytest.mark.once


def test_the_tables_are_up_to_date_and_have_every_method_and_setting():
    text = peft_table.PAGE.read_text(encoding="utf-8")
    assert generated.filled(text, generated.makers(peft_table.PAGE)) == text, "run `python docs/generated.py`"
    assert all(f"| `{name}(" in text for name in catalog.methods())
    assert all(f"| `{key}` |" in text for key in (*config.USED, *config.REFUSED))
    assert all(f"`{kind}`" in text for kind in formats())


def test_the_table_tells_what_is_tried():
    assert peft_table.attempt(jlora.LoRA(rank=4), "peft") == "`LORA` of rank 4"
    assert peft_table.attempt(jlora.LoRA(rank=4, init="pissa"), "serving") == "`LORA` of rank 8"
    assert peft_table.attempt(jlora.SHiRA(rank=1), "serving") == "by `svd_rank=`"
