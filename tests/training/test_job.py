"""The whole job on the shipped model, in a few steps: what it leaves, and what survives a stop."""

import dataclasses
import errno
import html
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from little_data import sentences

import jlora
from jlora import models
from jlora.training.errors import CheckpointError, DivergenceError, FolderError, SettingError, Stopped
from jlora.training.folder import claim
from jlora.training.hosts.stopping import watched
from jlora.training.job import finetune
from jlora.training.reporting.metrics import Metrics, read_metrics
from jlora.training.run import trainer
from jlora.training.run.checkpoint import MANIFEST, last_whole
from jlora.training.run.record import read_settings
from jlora.training.run.schedule import make_optimizer
from jlora.training.settings.fields import Settings

SMALL = Settings(
    steps=6,
    batch=8,
    max_length=16,
    rank=2,
    targets=".*/(q|v)_proj/kernel",
    learning_rate=3e-2,
    max_validation_rows=1,
    checkpoint_every=2,
    evaluate_every=3,
    sample_tokens=0,
    progress="none",
)


@pytest.fixture(scope="module", autouse=True)
def few_sentences(tmp_path_factory):
    """What every run here trains on: the default data take longer to read than a run takes to train."""
    with pytest.MonkeyPatch.context() as patch:
        data = sentences(tmp_path_factory.mktemp("data"))
        patch.setitem(globals(), "SMALL", dataclasses.replace(SMALL, data=data))
        yield


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


def test_the_title_of_the_report_names_model_and_data_without_their_folders(finished):
    head = (finished[0].out / "report.html").read_text().split("<table>")[0]
    assert "<title>stories260k, fine-tuned by jlora</title>" in head
    assert "stories260k, trained by lora on sentences.jsonl" in head
    assert str(models.STORIES260K.parent) not in head and str(Path(SMALL.data).parent) not in head


def test_the_adapters_load_onto_the_base_and_hold_no_base(finished):
    result = finished[0]
    loaded = jlora.load(result.out / "adapters", result.adapted.base)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, result.adapted.params)
    with pytest.raises(ValueError, match="made for another base"):
        jlora.load(result.out / "adapters", jax.tree.map(lambda leaf: leaf + 1, result.adapted.base))
    stored = sum(path.stat().st_size for path in (result.out / "checkpoints" / "6").rglob("*") if path.is_file())
    assert stored < 200_000  # the base alone takes 1,040,128 bytes


def test_a_resumed_run_ends_with_the_same_bits(finished, stopped, capsys):
    assert last_whole(stopped / "checkpoints") == 4
    resumed = finetune(settings(stopped, resume=True), quiet)
    assert trained(stopped) == trained(finished[0].out)
    assert lines(stopped) == lines(finished[0].out)
    assert resumed.record["resumed_at"] == 4 and finished[0].record["resumed_at"] == 0
    assert "since the run was resumed at step 4" in (stopped / "report.html").read_text()
    finetune(settings(stopped, resume=True, progress="lines"), quiet)
    assert "resumed from the checkpoint of step 6, the last one: nothing is left to train" in capsys.readouterr().out


def test_a_run_goes_on_with_its_moments_on_the_host_and_ends_with_the_same_bits(finished, stopped, monkeypatch):
    kinds, make = [], trainer.make_step

    def seen(forward, tx, start, *how):
        kinds.append({leaf.sharding.memory_kind for leaf in jax.tree.leaves(start.opt_state) if leaf.ndim})
        return make(forward, tx, start, *how)

    monkeypatch.setattr(trainer, "make_step", seen)
    for offload in (True, False):  # the second goes on from what the first has stored
        assert finetune(settings(stopped, resume=True, offload=offload), quiet).record["resumed_at"] == 4
        assert trained(stopped) == trained(finished[0].out)
        if offload:
            shutil.rmtree(stopped / "checkpoints" / "6")
    assert kinds == [{"pinned_host"}, {"device"}]


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
    from jlora.training.run.checkpoint import find_whole

    damage(stopped / "checkpoints" / "4")
    whole = find_whole(stopped / "checkpoints")
    assert whole.step == 2
    assert len(whole.complaints) == 1 and "step 4" in whole.complaints[0] and word in whole.complaints[0]
    assert (stopped / "checkpoints" / "damaged-4").is_dir()


def test_after_damage_the_last_whole_checkpoint_is_taken_with_a_word(finished, stopped, capsys):
    damage_content(stopped / "checkpoints" / "4")
    finetune(settings(stopped, resume=True, progress="lines"), quiet)
    said = capsys.readouterr().out
    assert "compiling the training step …\ncompiled in " in said
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
    with pytest.raises(FolderError, match="is not empty; choose another --out$"):
        finetune(settings(tmp_path), quiet)
    with pytest.raises(FolderError, match="holds no run to resume .*; choose another --out$"):
        finetune(settings(tmp_path, resume=True), quiet)
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(FolderError, match="is not empty; choose another --out, or go on with its run by --resume$"):
        finetune(settings(tmp_path), quiet)
    assert sorted(os.listdir(tmp_path)) == ["mine.txt", "settings.json"]


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
    from jlora.training.run import checkpoint

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


@pytest.mark.once
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_its_report(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(
        ValueError, match=r"the loss is .* at step \d: the training diverged; lower --learning-rate from 1e\+38"
    ):
        finetune(settings(out, learning_rate=1e38, clip=0.0), quiet)
    complaint, page = json.loads((out / "results.json").read_text())["complaint"], (out / "report.html").read_text()
    assert "the training diverged" in complaint and html.escape(complaint) in page
    assert "<td>report.html</td>" in page and "<td>adapters</td>" not in page
    said = []
    with pytest.raises(DivergenceError, match="the training diverged"):
        finetune(settings(out, learning_rate=1e38, clip=0.0, resume=True), said.append)
    assert any(line.startswith("note  this run ended before: ") for line in said)


def altered(monkeypatch, alter):
    """Training steps whose state and result pass through `alter`."""
    made = trainer.make_step

    def make_step(*arguments):
        step = made(*arguments)
        return lambda *given: alter(*step(*given))

    monkeypatch.setattr(trainer, "make_step", make_step)


@pytest.mark.once
def test_a_gradient_that_stays_0_stops_the_run_and_the_last_good_checkpoint_stays(tmp_path, monkeypatch):
    altered(monkeypatch, lambda state, result: (state, result._replace(gradient_norm=3.0 * (state.step <= 4))))
    with pytest.raises(
        DivergenceError, match="in each of the last 10 steps to step 14.*the checkpoint of step 4 is the last"
    ):
        finetune(settings(tmp_path / "run", steps=20), quiet)
    assert last_whole(tmp_path / "run" / "checkpoints") == 4


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    def alter(state, result):
        factor = jax.numpy.where(state.step < 4, 1.0, jax.numpy.inf)
        return state._replace(params=jax.tree.map(lambda leaf: leaf * factor, state.params)), result

    altered(monkeypatch, alter)
    with pytest.raises(
        DivergenceError, match="the weights are not finite after step 4.*the checkpoint of step 2 is the last"
    ):
        finetune(settings(tmp_path / "run"), quiet)


def at_metrics_of(step, monkeypatch, action):
    write = Metrics.write

    def acting(self, at, kind, **values):
        if at == step and kind == "train":
            action()
        write(self, at, kind, **values)

    monkeypatch.setattr(Metrics, "write", acting)


@pytest.fixture
def interruptible():
    """A shell has its jobs in the background ignore SIGINT, and with them a suite that runs there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.once
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_a_step_with_a_checkpoint(finished, tmp_path, interruptible, number):
    out, before = tmp_path / "run", signal.getsignal(number)
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(Stopped, match="stopped after step 5; jlora finetune") as caught,
    ):
        at_metrics_of(4, patch, lambda: os.kill(os.getpid(), number))
        finetune(settings(out), quiet)
    assert caught.value.code == 4 and last_whole(out / "checkpoints") == 5
    assert signal.getsignal(number) is before
    finetune(settings(out, resume=True), quiet)
    assert trained(out) == trained(finished[0].out) and lines(out) == lines(finished[0].out)


def test_a_run_leaves_the_handlers_of_signals_as_they_were(interruptible):
    def handlers():
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    before = handlers()
    with watched() as asked:
        assert not asked() and not set(handlers()) & set(before)
    assert handlers() == before

    def elsewhere():
        with watched() as asked:
            seen.append((asked(), handlers()))

    seen = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [(False, before)]  # Python lets the main thread alone catch signals


def test_a_second_signal_ends_the_run_at_once(tmp_path, monkeypatch, interruptible):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_metrics_of(3, monkeypatch, twice)
    with pytest.raises(KeyboardInterrupt) as caught:
        finetune(settings(tmp_path / "run"), quiet)
    assert not isinstance(caught.value, Stopped) and last_whole(tmp_path / "run" / "checkpoints") == 2


def test_a_step_is_logged_with_the_rate_that_it_was_taken_with(finished):
    rates = [record["learning_rate"] for record in lines(finished[0].out) if record["kind"] == "train"]
    resolved = Settings(**json.loads((finished[0].out / "settings.json").read_text())["settings"])
    adapted = finished[0].adapted
    tx, moved = make_optimizer(adapted, dataclasses.replace(resolved, clip=0.0)), []
    ones, opt_state = jax.tree.map(jax.numpy.ones_like, adapted.params), tx.init(adapted.params)
    for _ in rates:
        # AdamW moves by the rate itself where all gradients so far were 1.
        updates, opt_state = tx.update(ones, opt_state, adapted.params)
        moved.append(-float(jax.tree.leaves(updates)[0].ravel()[0]))
    np.testing.assert_allclose(rates, moved, rtol=1e-4)
    assert len(set(rates)) > 3
