"""The whole job on the shipped model, in a few steps: what it leaves, and what survives a stop."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jlora
from jlora.training.checkpoint import MANIFEST, last_whole
from jlora.training.errors import CheckpointError, FolderError, SettingError
from jlora.training.folder import claim
from jlora.training.job import finetune, read_settings
from jlora.training.metrics import Metrics, read_metrics
from jlora.training.settings import Settings

SMALL = Settings(
    steps=6,
    batch=8,
    max_length=16,
    rank=2,
    targets=".*/(q|v)_proj/kernel",
    learning_rate=3e-2,
    max_rows=8,
    max_validation_rows=1,
    checkpoint_every=2,
    evaluate_every=3,
    sample_tokens=0,
    progress="none",
)


def settings(out, **changes):
    return dataclasses.replace(SMALL, out=str(out), **changes)


def quiet(text):
    """Takes the lines that the job prints."""


def trained(out):
    return json.loads((out / "adapters" / "jlora.json").read_text())["adapters"]


def lines(out):
    """The metrics without the speed, which no two runs share."""
    return [{k: v for k, v in record.items() if k != "per_second"} for record in read_metrics(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from beginning to end, and what it printed."""
    out, said = tmp_path_factory.mktemp("job") / "run", []
    return finetune(settings(out, sample_tokens=4), said.append), "\n".join(said)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, unplugged):
    """The same run, stopped by an error in step 5, after the checkpoint of step 4."""
    out = tmp_path_factory.mktemp("job") / "run"
    with unplugged(5):
        finetune(settings(out), quiet)
    return out


@pytest.fixture
def stopped(interrupted, tmp_path):
    """A copy of the interrupted run."""
    return shutil.copytree(interrupted, tmp_path / "run")


def test_a_run_leaves_what_it_says(finished):
    result, said = finished
    assert result.after["loss"] < result.before["loss"] - 0.3
    for name in (
        "adapters",
        "report.html",
        "loss.png",
        "metrics.jsonl",
        "results.json",
        "samples.json",
        "settings.json",
    ):
        assert (result.out / name).exists()
        assert name in said
    assert "layers/self_attn/q_proj/kernel" in said
    assert f"{result.record['trained_values']:,}" in said
    assert "before:" in said and "after:" in said


def test_metrics_have_a_line_for_every_step_and_validation(finished):
    records = lines(finished[0].out)
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if r["kind"] == "validation"] == [0, 3, 6]
    assert records[-1]["loss"] == finished[0].after["loss"]


def test_two_checkpoints_are_kept_of_three(finished):
    assert sorted(os.listdir(finished[0].out / "checkpoints")) == ["4", "6"]


def test_the_report_needs_nothing_beside_it(finished):
    page = (finished[0].out / "report.html").read_text()
    assert "data:image/png;base64," in page and "layers/self_attn/v_proj/kernel" in page
    assert "http" not in page and 'src="data' in page
    assert page.count("<table>") == page.count("</table>") == 4


def test_the_adapters_load_onto_the_base_and_hold_no_base(finished):
    result = finished[0]
    loaded = jlora.load(result.out / "adapters", result.adapted.base)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, result.adapted.params)
    with pytest.raises(ValueError, match="made for another base"):
        jlora.load(result.out / "adapters", jax.tree.map(lambda leaf: leaf + 1, result.adapted.base))
    stored = sum(path.stat().st_size for path in (result.out / "checkpoints" / "6").rglob("*") if path.is_file())
    assert stored < 200_000  # the base alone takes 1,040,128 bytes


def test_a_resumed_run_ends_with_the_same_bits(finished, stopped):
    assert last_whole(stopped / "checkpoints") == 4
    finetune(settings(stopped, resume=True), quiet)
    assert trained(stopped) == trained(finished[0].out)
    assert lines(stopped) == lines(finished[0].out)


def damage_content(step):
    largest = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def damage_missing_file(step):
    next(path for path in sorted(step.rglob("*")) if path.is_file() and path.name != MANIFEST).unlink()


def damage_unfinished(step):
    (step / MANIFEST).unlink()


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (damage_content, "is not what was written"),
        (damage_missing_file, "is missing"),
        (damage_unfinished, "not finished"),
    ],
)
def test_a_damaged_checkpoint_is_recognised(stopped, damage, word):
    from jlora.training.checkpoint import find_whole

    damage(stopped / "checkpoints" / "4")
    whole = find_whole(stopped / "checkpoints")
    assert whole.step == 2
    assert len(whole.complaints) == 1 and "step 4" in whole.complaints[0] and word in whole.complaints[0]
    assert (stopped / "checkpoints" / "damaged-4").is_dir()


def test_after_damage_the_last_whole_checkpoint_is_taken_with_a_word(finished, stopped, capsys):
    damage_content(stopped / "checkpoints" / "4")
    finetune(settings(stopped, resume=True, progress="lines"), quiet)
    said = capsys.readouterr().out
    assert "the checkpoint of step 4 is damaged" in said and "resumed from the checkpoint of step 2" in said
    assert trained(stopped) == trained(finished[0].out)


def test_a_half_written_line_of_metrics_is_dropped(stopped):
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "kind": "train", "loss"')
    metrics = Metrics(stopped / "metrics.jsonl", resume_at=2)
    metrics.close()
    assert [r["step"] for r in lines(stopped) if r["kind"] == "train"] == [1, 2]
    with pytest.raises(ValueError, match="lacks some of the first 4 steps"):
        Metrics(stopped / "metrics.jsonl", resume_at=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-3}, r"learning_rate is 0\.001, but the run in .* was started with 0\.03"),
        ({"seed": 1}, "seed is 1, but the run in .* was started with 0"),
        ({"rank": 4}, "rank is 4, but the run in"),
    ],
)
def test_resuming_with_other_settings_names_the_setting(stopped, changes, message):
    before = (stopped / "settings.json").read_bytes()
    with pytest.raises(SettingError, match=message):
        finetune(settings(stopped, resume=True, **changes), quiet)
    assert (stopped / "settings.json").read_bytes() == before


def test_resuming_with_other_data_is_an_error(stopped):
    about = json.loads((stopped / "settings.json").read_text())
    (stopped / "settings.json").write_text(json.dumps(about | {"data_sha256": "0" * 64}))
    with pytest.raises(CheckpointError, match="the training data .* is not what the run in .* was started with"):
        finetune(settings(stopped, resume=True), quiet)


@pytest.mark.parametrize("content", ["[]", "null", "[" * 10**5, "{}", '{"asked": {}, "settings": null}', '{"asked": {}}',
    '{"asked": {"unheard": 1}, "settings": {}}', '{"asked": {}, "settings": {"rank": "4"}}', '{"asked": {}, "settings": {}}',
    '{"asked": {}, "settings": {}, "labels": 3}'])  # fmt: skip
def test_damaged_settings_of_a_run_are_named(content, tmp_path):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/settings.json is damaged or from another version: "):
        read_settings(tmp_path)


@pytest.mark.parametrize(
    "line", ["{", "[]", "null", "[" * 10**5, '{"step": "1", "kind": "train"}', '{"step": 1}', "\0"]
)
def test_a_damaged_line_of_metrics_is_named(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "kind": "train"}}\n{line}\n')
    with pytest.raises(ValueError, match=f"^{tmp_path}/metrics.jsonl:2: the line is damaged"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_resuming_on_another_base_is_an_error(stopped):
    about = json.loads((stopped / "settings.json").read_text())
    (stopped / "settings.json").write_text(json.dumps(about | {"base": "0" * 32}))
    with pytest.raises(CheckpointError, match="is not the one that the run in .* was started with: fingerprint"):
        finetune(settings(stopped, resume=True), quiet)


def test_a_folder_with_content_is_not_written_to(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FolderError, match="is not empty; choose another --out, or go on with its run by --resume"):
        finetune(settings(tmp_path), quiet)
    with pytest.raises(FolderError, match="holds no run to resume"):
        finetune(settings(tmp_path, resume=True), quiet)
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_a_folder_in_use_names_the_process(tmp_path):
    holder = """
import sys
from jlora.training.folder import claim
with claim(sys.argv[1], resume=False):
    print("held", flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", holder, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(FolderError, match=rf"run is in use by process {process.pid}; wait for it"):
            finetune(settings(tmp_path / "run"), quiet)
        process.kill()
    with claim(tmp_path / "run", resume=False) as out:  # the system has let go of it
        assert out.is_dir()


@pytest.mark.parametrize("place", ["metrics", "manifest", "room"])
def test_a_full_disk_is_one_sentence_and_leaves_the_earlier_checkpoints_whole(tmp_path, monkeypatch, place):
    from jlora.training import checkpoint

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write, write_json = Metrics.write, checkpoint.write_json
    if place == "metrics":
        monkeypatch.setattr(
            Metrics, "write", lambda self, step, kind, **v: full() if step == 5 else write(self, step, kind, **v)
        )
    elif place == "room":
        room = iter([10**9, 10**9, 0])  # of three checkpoints the last does not fit
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=next(room)))
    else:
        monkeypatch.setattr(checkpoint, "write_json", lambda path, v: full() if v["step"] == 6 else write_json(path, v))
    with pytest.raises(
        OSError, match=r"the disk of .*run is full; the checkpoint of step 4 is whole: free some space"
    ) as caught:
        finetune(settings(tmp_path / "run"), quiet)
    assert caught.value.errno == errno.ENOSPC
    assert last_whole(tmp_path / "run" / "checkpoints") == 4


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(ValueError, match=r"the loss is .* at step \d: the training diverged; lower --learning-rate"):
        finetune(settings(tmp_path / "run", learning_rate=1e38, clip=0.0), quiet)
