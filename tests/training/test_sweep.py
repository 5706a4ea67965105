"""Sweeps: each run is what it is alone, is left as a run, is stopped and resumed; what can't be one program is refused."""

import dataclasses
import html
import json
from pathlib import Path

import numpy as np
import pytest
from little_data import sentences

import jlora
from jlora.training.cli import main
from jlora.training.commands.runs import evaluate_file, open_run
from jlora.training.errors import CheckpointError, SettingError
from jlora.training.job import finetune
from jlora.training.reporting.metrics import read_metrics
from jlora.training.settings.fields import Settings
from jlora.training.settings.sweeps import points
from jlora.training.sweep.job import name_of, sweep

SWEPT = Settings(
    steps=4,
    batch=8,
    max_length=16,
    rank=2,
    dropout=0.1,
    targets=".*/(q|v)_proj/kernel",
    weight_decay=0.1,
    clip=0.5,
    evaluate_every=1,
    checkpoint_every=2,
    sample_tokens=0,
    progress="none",
    sweep={"learning_rate": ["1e-2", "3e-2"]},
    seeds=2,
)


@pytest.fixture(scope="module", autouse=True)
def few_sentences(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        data, held_out = (
            sentences(tmp_path_factory.mktemp(name), count) for name, count in (("data", 60), ("more", 8))
        )
        patch.setitem(globals(), "SWEPT", dataclasses.replace(SWEPT, data=data, validation=held_out))
        yield


def quiet(text):
    """Takes the lines that the job prints."""


def lines(out):
    return [{k: v for k, v in record.items() if k != "per_second"} for record in read_metrics(out / "metrics.jsonl")]


def arrays(out):
    """The trained arrays of a run's folder."""
    adapted = open_run(out).adapted
    assert adapted is not None
    return {"/".join(k): np.asarray(v) for k, v in jlora.paths.flatten_with_keys(adapted.params)[0]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep from beginning to end, and what it printed."""
    out, said = tmp_path_factory.mktemp("sweep") / "out", []
    return sweep(dataclasses.replace(SWEPT, out=str(out), keep=4), said.append), "\n".join(said)


def test_each_run_of_a_sweep_is_what_it_is_alone(finished, tmp_path):
    result, _ = finished
    out = result.out / "runs" / "learning-rate-0.03_seed-1"
    one = dataclasses.replace(SWEPT, sweep={}, seeds=None, learning_rate=3e-2, seed=1, out=str(tmp_path / "one"))
    finetune(one, quiet)
    for mine, theirs in zip(lines(out), lines(tmp_path / "one"), strict=True):
        assert mine.keys() == theirs.keys() and mine["step"] == theirs["step"]
        np.testing.assert_allclose(list(map(float, list(mine.values())[2:])), list(theirs.values())[2:], rtol=2e-5)
    wanted = arrays(tmp_path / "one")
    for path, found in arrays(out).items():
        np.testing.assert_allclose(found, wanted[path], rtol=0, atol=1e-4 * np.abs(wanted[path]).max())


@pytest.mark.once
def test_a_sweep_leaves_runs_that_other_commands_take_and_a_page_that_compares_them(finished):
    result, said = finished
    names = [run.name for run in result.runs]
    assert sorted(names) == sorted(f"learning-rate-{rate}_seed-{seed}" for rate in (0.01, 0.03) for seed in (0, 1))
    losses = [run.record["after"]["loss"] for run in result.runs]
    assert losses == sorted(losses) and len(set(losses)) == 4 and result.complaint is None
    page = html.unescape((result.out / "sweep.html").read_text())
    assert "4 runs at once: learning-rate 0.01, 0.03, seed 0, 1" in said and f"best  {names[0]}" in said
    assert [page.index(f"runs/{name}") for name in names] == sorted(page.index(f"runs/{name}") for name in names)
    of_rate = [run.record["after"]["loss"] for run in result.runs if run.point["learning_rate"] == 0.03]
    assert f"{np.mean(of_rate):.4g} ± {np.std(of_rate, ddof=1):.2g}" in page
    record = json.loads((result.out / "results.json").read_text())
    assert [each["run"] for each in record["runs"]] == names
    best = result.out / "runs" / names[0]
    assert json.loads((best / "settings.json").read_text())["settings"]["learning_rate"] == 0.03
    assert (best / "report.html").exists() and (best / "loss.png").exists()
    told = evaluate_file(open_run(best), SWEPT.validation, max_rows=None, say=quiet)
    assert told["loss"] < result.runs[0].record["before"]["loss"]
    with pytest.raises(CheckpointError, match="holds a sweep: name one of its runs"):
        open_run(result.out)


@pytest.mark.once
def test_a_sweep_that_was_stopped_goes_on_to_the_same_bits(finished, tmp_path, unplugged):
    result, _ = finished
    settings = dataclasses.replace(SWEPT, out=str(tmp_path / "out"))
    with unplugged(4):
        sweep(settings, quiet)
    assert not list(tmp_path.glob("out/runs/*/adapters"))
    resumed = sweep(dataclasses.replace(settings, resume=True), quiet)
    assert resumed.record["resumed_at"] == 2
    for run in result.runs:
        whole, again = (out / "runs" / run.name for out in (result.out, resumed.out))
        assert lines(whole) == lines(again)
        found = [json.loads((each / "adapters" / "jlora.json").read_text())["adapters"] for each in (whole, again)]
        assert found[0] == found[1]


@pytest.mark.once
def test_a_run_that_diverges_or_gets_no_better_stops_alone(tmp_path):
    swept = {"learning-rate": [1e-2, 1e30, 1e-30]}
    settings = dataclasses.replace(
        SWEPT, sweep=swept, seeds=None, patience=2, steps=6, dropout=0.0, clip=0.0, out=str(tmp_path / "out")
    )
    result = sweep(settings, quiet)
    assert [run.name for run in result.runs] == [f"learning-rate-{rate}" for rate in (0.01, 1e-30, 1e30)]
    good, still, bad = result.runs
    assert good.record["steps"] == 6 and good.record["complaint"] is None
    # As a run alone: its best validation is the first one after a step, and it waits for two more.
    assert still.record["steps"] == 3 and still.record["after"]["loss"] == still.record["before"]["loss"]
    assert "diverged" in bad.record["complaint"] and bad.record["steps"] < 6
    assert (result.out / "runs" / still.name / "adapters").exists()
    assert not (result.out / "runs" / bad.name / "adapters").exists()
    assert "What went wrong" in (result.out / "sweep.html").read_text() and result.complaint is None


@pytest.mark.once
def test_runs_of_other_ranks_and_scales_are_saved_with_their_own(tmp_path):
    swept = {"rank": [1, 3], "alpha": [2.0, 8.0]}
    settings = dataclasses.replace(SWEPT, sweep=swept, seeds=None, steps=1, out=str(tmp_path / "out"))
    result = sweep(settings, quiet)
    for run in result.runs:
        adapted = open_run(result.out / "runs" / run.name).adapted
        assert {(site.method.rank, site.method.alpha) for site in adapted.plan.sites} == {tuple(run.point.values())}
        assert adapted.params["layers"]["self_attn"]["q_proj"]["kernel"]["a"].shape[-1] == run.point["rank"]


@pytest.mark.once
def test_points_are_all_combinations_and_named_by_their_values():
    found = points(Settings(sweep={"learning-rate": ["1e-4", "3e-4"], "weight_decay": [0, 0.1]}, seeds=2, seed=5))
    assert len(found) == 8 and found[1] == {"learning_rate": 1e-4, "weight_decay": 0.0, "seed": 6}
    assert name_of(found[-1]) == "learning-rate-0.0003_weight-decay-0.1_seed-6"
    assert points(Settings(sweep={"seed": ["3", "1"], "alpha": ["4"]})) == [{"alpha": 4.0, "seed": s} for s in (3, 1)]


@pytest.mark.once
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep", "steps=3,4"], "--sweep can't train runs of different steps in one program"),
        (["--sweep", "learnin-rate=1,2"], "did you mean learning-rate"),
        (["--sweep", "learning-rate=1e-3,x"], "learning-rate must be numbers, got 1e-3, x"),
        (["--sweep", "learning-rate=1e-3,0.001"], "has a value twice"),
        (["--sweep", "learning-rate"], "must be NAME=VALUE,VALUE"),
        (["--sweep", "seed=1,2", "--seeds", "2"], "--seeds and seed in --sweep both say which seeds"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--seeds", "2", "--metric", "perplexity"], "--metric of a sweep is the loss"),
        (["--seeds", "2", "--best"], "--best can't be given with --sweep or --seeds"),
        (["--sweep", "rank=2,4", "--optimizer", "muon"], "--optimizer muon sees what fills up smaller ranks"),
        (["--seeds", "2", "--mesh", "data=2"], "--mesh can't be given with --sweep or --seeds"),
        (["--seeds", "2", "--method", "cola"], "--seeds can't train cola"),
        (["--sweep", "init=pissa,kaiming"], "--sweep can't be one program"),
    ],
)
def test_what_can_not_be_swept_is_told_in_one_sentence(words, message, tmp_path, capsys):
    quick = ["--data", SWEPT.data, "--steps", "2", "--batch", "8", "--max-length", "16", "--out", str(tmp_path / "out")]
    try:
        code = main(["finetune", *quick, *words])
    except SystemExit as stop:
        code = stop.code
    told = capsys.readouterr().err
    assert code == 2 and message in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.once
def test_one_run_of_a_sweep_is_resumed_with_the_others(finished):
    result, _ = finished
    run = result.out / "runs" / result.runs[0].name
    with pytest.raises(CheckpointError, match="is one run of the sweep in"):
        finetune(dataclasses.replace(SWEPT, sweep={}, seeds=None, out=str(run), resume=True), quiet)
    with pytest.raises(SettingError, match="is for jlora.training.sweep.job.sweep"):
        finetune(SWEPT, quiet)
    assert Path(run, "adapters").is_dir()
