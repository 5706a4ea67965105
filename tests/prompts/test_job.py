"""Prompts in the training job: rows of several texts, evaluation, samples, and the way to PEFT."""

import json

import pytest
from little_data import sentences

from jlora.training.cli import main
from jlora.training.errors import SettingError
from jlora.training.model.selection import make_spec
from jlora.training.model.subject import abstract_subject, open_codec
from jlora.training.settings.defaults import resolve
from jlora.training.settings.fields import Settings

pytestmark = pytest.mark.newest


@pytest.mark.long
def test_a_job_trains_a_prefix_on_packed_rows_and_exports_it(tmp_path, capsys):
    run = tmp_path / "run"
    asked = [
        "--method",
        "prefixtuning",
        *(f"--set={each}" for each in ("tokens=4", "hidden=6", "width=5")),
        "--data",
        sentences(tmp_path),
    ]
    asked += ["--steps", "8", "--batch", "4", "--max-length", "48", "--learning-rate", "0.02", "--sample-tokens", "2"]
    assert main(["finetune", *asked, "--out", str(run)]) == 0
    assert "packed into" in capsys.readouterr().out
    found = json.loads((run / "results.json").read_text())
    assert found["after"]["loss"] < found["before"]["loss"] - 0.05
    assert main(["export", str(run), "--to", str(tmp_path / "peft")]) == 0
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_virtual_tokens"]) == ("PREFIX_TUNING", 4)


def spec_of(**settings):
    settings = resolve(Settings(**{"method": "prompttuning", "set": {"tokens": 5}, **settings}))
    codec, config = open_codec(settings)
    return make_spec(abstract_subject(settings, codec, config, ("a", "b")), settings)


def test_the_job_puts_prompts_where_tokens_are_looked_up():
    assert [(str(where), str(method)) for where, method in spec_of().items()] == [
        ("embed_tokens/embedding", "PromptTuning(tokens=5)")
    ]
    assert list(spec_of(method="prefixtuning")) == [r".*/(k|v)_proj/kernel"]


def test_what_a_prompt_has_no_room_for_is_refused(data):
    with pytest.raises(SettingError, match="max_length of 510 and 5 virtual tokens are more than the 512 positions"):
        spec_of(max_length=510)
    encoder = {"model": str(data / "minilm_l6_v2"), "task": "classify", "data": "rows.jsonl"}
    with pytest.raises(SettingError, match="an encoder's result would be pooled too"):
        spec_of(**encoder)
