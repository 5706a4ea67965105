"""The command line: every command on a small run, and one sentence with exit code 2 for what the user got wrong."""

import html
import json
import random
import shutil

import jax
import pytest

from jlora import models
from jlora.training.cli import main

pytestmark = pytest.mark.once

WORDS = {"good": ["fine", "kind", "nice", "happy"], "bad": ["mean", "sad", "poor", "ugly"]}


def write_reviews(path, count, seed=0):
    """Rows whose label a few words tell."""
    rng = random.Random(seed)
    lines = ["sentence\tlabel"]
    for _ in range(count):
        label = rng.choice(list(WORDS))
        lines.append(f"the dog was {rng.choice(WORDS[label])} and {rng.choice(WORDS[label])}\t{label}")
    path.write_text("\n".join(lines) + "\n")
    return path


QUICK = [
    "--batch",
    "8",
    "--max-length",
    "16",
    "--progress",
    "none",
    "--sample-tokens",
    "0",
    "--max-validation-rows",
    "8",
]


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """A finished run that adapts the shipped model to a short text, configured by a TOML file."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "data.txt").write_text("A function is called with arguments and returns a value. " * 60)
    (folder / "run.toml").write_text(
        'learning_rate = 0.03\nsteps = 4\n[spec]\n".*/q_proj/kernel" = {method = "LoRA", rank = 2, alpha = 4}\n'
        '"norm/.*" = {method = "Full"}\n'
    )
    out = folder / "run"
    code = main(
        [
            "finetune",
            "--config",
            str(folder / "run.toml"),
            "--data",
            str(folder / "data.txt"),
            "--out",
            str(out),
            *QUICK,
        ]
    )
    assert code == 0
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """A finished run that classifies sentences by the shipped model."""
    folder = tmp_path_factory.mktemp("cli")
    write_reviews(folder / "train.tsv", 96)
    write_reviews(folder / "dev.tsv", 24, seed=1)
    arguments = ["--task", "classify", "--data", str(folder / "train.tsv"), "--validation", str(folder / "dev.tsv")]
    arguments += [
        "--text-column",
        "sentence",
        "--targets",
        ".*/(q|v)_proj/kernel",
        "--steps",
        "30",
        "--learning-rate",
        "0.02",
    ]
    assert main(["finetune", *arguments, "--out", str(folder / "run"), *QUICK, "--max-validation-rows", "24"]) == 0
    return folder


def test_a_spec_in_a_file_says_what_is_adapted(stories):
    settings = json.loads((stories / "run" / "settings.json").read_text())["settings"]
    assert (settings["learning_rate"], settings["rank"]) == (0.03, None)
    adapters = json.loads((stories / "run" / "adapters" / "jlora.json").read_text())
    assert {site["method"]["method"] for site in adapters["sites"]} == {"LoRA", "Full"}


def test_a_classifier_learns_what_words_tell(reviews):
    results = json.loads((reviews / "run" / "results.json").read_text())
    assert results["after"]["accuracy"] >= 0.9
    assert results["after"]["loss"] < results["before"]["loss"]


def test_eval_gives_what_the_run_measured(reviews, capsys):
    results = json.loads((reviews / "run" / "results.json").read_text())
    assert main(["eval", str(reviews / "run"), str(reviews / "dev.tsv")]) == 0
    assert f"accuracy {results['after']['accuracy']:.4f}" in capsys.readouterr().out
    assert main(["eval", str(reviews / "run"), str(reviews / "dev.tsv"), "--base"]) == 0
    assert f"loss {results['before']['loss']:.4f}" in capsys.readouterr().out


def test_merge_writes_a_model_that_loads(stories, tmp_path, capsys):
    assert main(["merge", str(stories / "run"), str(tmp_path / "merged")]) == 0
    model, _ = models.load(tmp_path / "merged")
    assert model.config.vocab_size == 512
    text = ["--prompt", "A function", "--tokens", "6", "--temperature", "0"]
    capsys.readouterr()
    assert main(["generate", str(stories / "run"), *text]) == 0
    wanted = capsys.readouterr().out
    assert main(["generate", "--model", str(tmp_path / "merged"), *text]) == 0
    assert capsys.readouterr().out == wanted
    assert wanted.startswith("A function")
    assert main(["merge", str(stories / "run"), str(tmp_path / "merged")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_merging_a_classifier_writes_encoder_and_head(reviews, tmp_path):
    assert main(["merge", str(reviews / "run"), str(tmp_path / "merged")]) == 0
    assert json.loads((tmp_path / "merged" / "labels.json").read_text()) == ["bad", "good"]
    assert (tmp_path / "merged" / "classifier.safetensors").exists()
    assert (tmp_path / "merged" / "config.json").exists()


def test_inspect_shows_what_a_spec_hits(capsys):
    assert main(["inspect", "--rank", "3"]) == 0
    said = capsys.readouterr().out
    assert "layers/mlp/up_proj/kernel" in said and "LoRA(rank=3" in said and "embed_tokens/embedding" in said
    assert "  what    Low-rank adaptation: `w + s * a @ b`" in said and "multiply-adds more for each row" in said
    assert main(["inspect", "--task", "classify", "--data", "x.csv", "--method", "probe"]) == 2
    assert "x.csv: no such file" in capsys.readouterr().err


def test_inspect_needs_no_weights(tmp_path, capsys):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(models.STORIES260K / name, tmp_path)
    assert main(["inspect", "--model", str(tmp_path), "--targets", ".*/v_proj/kernel"]) == 0
    assert "layers/self_attn/v_proj/kernel" in capsys.readouterr().out


def other_tokenizer(folder, data):
    """The shipped model with the tokenizer of another one."""
    shutil.copytree(models.STORIES260K, folder)
    shutil.copy(data / "minilm_l6_v2" / "tokenizer.json", folder / "tokenizer.json")
    return str(folder)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--targets", ".*/query/kernel"], "the pattern '.*/query/kernel' matches no leaf"),
        (["--rank", "65", "--targets", ".*/q_proj/kernel"], "layers/self_attn/q_proj/kernel"),
        (["--rank", "0"], "--rank must be at least 1, got 0"),
        (["--max-length", "600"], "--max-length of 600 is more than the 512 positions of the model"),
        (["--model", "nowhere"], "nowhere/config.json: no such file"),
        (
            ["--model", "org/name"],
            "downloads nothing: for a model of the Hugging Face Hub run `hf download org/name --local-",
        ),
        (["--data", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--mesh", "model=7"], "--mesh axis model=7 does not divide the 64 of axis 1 of embed_tokens/embedding"),
        (
            ["--batch", "1000000", "--accumulate", "500000"],
            "--batch takes 1000000 rows in 500000 parts, but the training",
        ),
        (["--config", "nowhere.toml"], "nowhere.toml: No such file or directory"),
    ],
)
def test_what_the_user_got_wrong_is_one_sentence_and_touches_nothing(flags, message, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["finetune", *flags, "--out", str(out), "--steps", "2"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("jlora finetune: ") and said.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("command", ["finetune", "inspect"])
def test_another_type_of_model_is_named_before_its_tokenizer_is_read(command, tmp_path, data, capsys):
    folder = other_tokenizer(tmp_path / "model", data)
    for config in ({"model_type": "gpt_neox", "vocab_size": 512}, {"model_type": "swin"}):
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        assert main([command, "--model", folder]) == 2
        said = capsys.readouterr().err
        assert f"model_type '{config['model_type']}' is not supported" in said and "docs/frameworks.md" in said


@pytest.mark.parametrize("command", ["finetune", "inspect"])
def test_a_model_of_images_is_told_that_commands_read_texts(command, tmp_path, data, capsys):
    folder = other_tokenizer(tmp_path / "model", data)
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert main([command, "--model", folder]) == 2
    assert "texts alone; load it by jlora.models.load" in capsys.readouterr().err


def test_a_wrong_tokenizer_is_one_sentence(tmp_path, data, capsys):
    assert main(["finetune", "--model", other_tokenizer(tmp_path / "model", data), "--out", str(tmp_path / "run")]) == 2
    assert "this is the tokenizer of another model" in capsys.readouterr().err


def test_a_run_that_makes_the_model_worse_ends_with_code_3_and_everything_written(stories, tmp_path, capsys):
    out, data = tmp_path / "run", str(stories / "data.txt")
    flags = [
        "--learning-rate",
        "30",
        "--steps",
        "3",
        "--data",
        data,
        "--targets",
        ".*/q_proj/kernel",
        "--out",
        str(out),
    ]
    assert main(["finetune", *flags, *QUICK, "--batch", "1000000"]) == 3
    said = capsys.readouterr()
    assert said.err.startswith("jlora finetune: the validation is worse than before the training: loss ")
    assert "the training diverged: lower --learning-rate from 30 to 0.01" in said.err and said.err.count("\n") == 1
    assert "note  --batch is " in said.out and ", not 1,000,000: the training data makes " in said.out
    complaint = json.loads((out / "results.json").read_text())["complaint"]
    report = (out / "report.html").read_text()
    assert complaint in said.err and html.escape(complaint) in report and "<li>--batch is " in report
    assert main(["generate", str(out), "--prompt", "A", "--tokens", "2"]) == 0


def test_rows_that_are_left_out_are_told_by_eval(stories, tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": p, "completion": " b"} for p in ("a", "long " * 30)]))
    assert main(["eval", str(stories / "run"), str(tmp_path / "a.json")]) == 0
    assert "note  1 row left out, because the answer begins after 16 tokens" in capsys.readouterr().out


def test_a_malformed_row_is_one_sentence_with_file_and_line(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    assert main(["finetune", "--data", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "run")]) == 2
    assert f"{tmp_path}/a.jsonl:2: there is no 'completion'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_encoder_cannot_predict_the_next_token_whatever_the_data(tmp_path, data, capsys):
    arguments = ["--model", str(data / "minilm_l6_v2"), "--data", str(tmp_path / "not_read.jsonl")]
    assert main(["finetune", *arguments, "--out", str(tmp_path / "run")]) == 2
    assert "--task lm needs a model that predicts the next token" in capsys.readouterr().err


def test_an_adapter_on_another_base_is_one_sentence(stories, tmp_path, capsys):
    assert main(["merge", str(stories / "run"), str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    assert main(["generate", str(stories / "run"), "--model", str(tmp_path / "merged")]) == 2
    assert "was made for another base: fingerprint" in capsys.readouterr().err


def test_a_model_without_weights_is_told_before_the_data_is_read(tmp_path, capsys):
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(models.STORIES260K / name, tmp_path)
    arguments = ["--model", str(tmp_path), "--data", str(tmp_path / "not_read.jsonl")]
    assert main(["finetune", *arguments, "--out", str(tmp_path / "run")]) == 2
    assert "neither model.safetensors nor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "a folder, wanted a file of rows"),
        ("rows.parquet", "rows.parquet: no such file"),
        ("one.jsonl", "the data makes 1 row; give more data, or other data to validate on (--validation)"),
    ],
)
def test_data_that_is_no_data_says_what_is_wanted(name, message, tmp_path, capsys):
    (tmp_path / "one.jsonl").write_text('{"text": "One row."}')
    assert main(["finetune", "--data", str(tmp_path / name), "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_run_is_one_sentence(tmp_path, capsys):
    assert main(["merge", str(tmp_path), str(tmp_path / "merged")]) == 2
    assert capsys.readouterr().err == f"jlora merge: {tmp_path} holds no run (no settings.json)\n"
    (tmp_path / "adapter_config.json").write_text("{}")
    assert main(["merge", str(tmp_path), str(tmp_path / "merged")]) == 2
    assert f"make one of this adapter by jlora import {tmp_path} --to RUN" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["finetune", "--ranc", "8"],
            "unrecognized arguments: --ranc 8; did you mean --rank? (see jlora finetune --help)",
        ),
        (
            ["finetune", "--lr=3", "--batch-size", "2"],
            "did you mean --learning-rate and --batch? (see jlora finetune --help)",
        ),
        (["finetune", "--method", "loar"], "got 'loar'; did you mean lora? (see jlora finetune --help)"),
        (
            ["finetune", "--schedule", "cosin"],
            "must be one of constant, linear, cosine, got 'cosin'; did you mean cosine?",
        ),
        (["export", "run", "--to", "x", "--profile", "peff"], "did you mean peft? (see jlora export --help)"),
        (["finetun"], "got 'finetun'; did you mean finetune? (see jlora --help)"),
        (["finetune", "--rank", "x"], "argument --rank: must be a whole number, got 'x' (see jlora finetune --help)"),
        (["generate", "run", "--tokens", "0"], "argument --tokens: must be at least 1, got 0"),
        (["generate", "run", "--top-p", "3"], "argument --top-p: must be above 0 and at most 1, got 3"),
    ],
)
def test_an_unknown_word_is_one_sentence_with_the_nearest_that_exists(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and message in said and said.count("\n") == 1


def test_what_a_setting_may_be_is_in_the_help_that_is_named(capsys):
    assert main(["finetune", "--steps", "5", "--warmup", "5"]) == 2
    assert capsys.readouterr().err == (
        "jlora finetune: --warmup must be less than the 5 steps, got 5 (see jlora finetune --help)\n"
    )


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    said = capsys.readouterr().out
    assert caught.value.code == 0 and said.startswith("jlora ") and f"JAX {jax.__version__}" in said


def test_help_shows_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    said = capsys.readouterr().out
    assert all(flag in said for flag in ("--lora-plus-ratio", "--mesh", "--resume", "--no-packing", "--config"))
