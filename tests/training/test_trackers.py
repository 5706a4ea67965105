"""Metrics reported to services: the real packages where they are installed, and a fake of what is used of them elsewhere."""

import importlib.util
import json
import sys
import types

import pytest

from jlora.training.cli import main
from jlora.training.errors import SettingError
from jlora.training.reporting import trackers
from jlora.training.reporting.trackers import check_trackers, reported
from jlora.training.settings.fields import TRACKERS, Settings

RECORDS = [
    {"step": 1, "kind": "train", "loss": 2.0, "tokens": 30},
    {"step": 2, "kind": "train", "loss": 1.5, "tokens": 31},
    {"step": 2, "kind": "validation", "loss": 1.75},
]


# Before any fake is in its place.
_INSTALLED = {name: importlib.util.find_spec(package) is not None for name, package in TRACKERS.items()}
installed = _INSTALLED.__getitem__


def report(out, name, records, resumed_at=None, **options):
    out.mkdir(exist_ok=True)
    given = {"rank": 8, "set": {}}
    with reported(out, Settings(report_to=name), given, resumed_at, None, options.get("say", print)) as listener:
        for record in records:
            listener(record)


def test_an_unknown_service_is_refused_with_the_nearest():
    with pytest.raises(
        SettingError, match="must be some of tensorboard, wandb, mlflow, got 'tensorbord'; did you mean"
    ):
        Settings(report_to="wandb,tensorbord")


def test_a_package_that_is_missing_is_told_with_its_extra_before_anything_is_read(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "mlflow" else object())
    with pytest.raises(SettingError, match=r"mlflow needs the package mlflow: pip install 'jlora\[mlflow\]'"):
        check_trackers(Settings(report_to="wandb,mlflow"))
    out = tmp_path / "run"
    assert main(["finetune", "--report-to", "mlflow", "--data", "nowhere.jsonl", "--out", str(out)]) == 2
    assert "--report-to mlflow needs the package mlflow" in capsys.readouterr().err and not out.exists()


class Calls(list):
    """Notes every call of whatever is asked of it."""

    def __init__(self, **values):
        super().__init__()
        self.values = values

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self.values:
            return self.values[name]

        def call(*given, **named):
            self.append((name, given, named))

        return call


def module(monkeypatch, name, **content):
    made = types.ModuleType(name)
    for key, value in content.items():
        setattr(made, key, value)
    monkeypatch.setitem(sys.modules, name, made)


def test_tensorboard_gets_every_value_with_its_step(monkeypatch, tmp_path):
    if installed("tensorboard"):
        report(tmp_path / "run", "tensorboard", RECORDS)
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import RecordWriter  # noqa: F401  (the format that is read below)

        (path,) = (tmp_path / "run" / "tensorboard").iterdir()
        found, content = [], path.read_bytes()
        while content:  # length, its checksum, the event, its checksum
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            content = content[16 + size :]
        scalars = [each for each in found if "/" in each[1] and not each[1].startswith("settings")]
    else:
        writer = Calls()
        module(monkeypatch, "tensorboardX", SummaryWriter=lambda *given, **named: writer)
        report(tmp_path / "run", "tensorboard", RECORDS)
        scalars = [(step, name, value) for call, (name, value, step), _ in (c for c in writer if c[0] == "add_scalar")]
        assert writer[-1][0] == "close"
    assert scalars == [
        (1, "train/loss", 2.0),
        (1, "train/tokens", 30),
        (2, "train/loss", 1.5),
        (2, "train/tokens", 31),
        (2, "validation/loss", 1.75),
    ]


def test_a_resumed_run_is_the_same_run_at_weights_and_biases(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    begun = []
    if installed("wandb"):
        import wandb

        begin = wandb.init
        monkeypatch.setattr(wandb, "init", lambda **named: begun.append((named, begin(**named))) or begun[-1][1])
    else:
        module(monkeypatch, "wandb", init=lambda **named: begun.append((named, Calls(id="7"))) or begun[-1][1])
    report(tmp_path / "run", "wandb", RECORDS)
    report(tmp_path / "run", "wandb", RECORDS[1:], resumed_at=1)
    (first, run), (second, again) = begun
    known = json.loads((tmp_path / "run" / "trackers.json").read_text())
    assert known == {"wandb": run.id} and again.id == run.id
    assert (first["id"], second["id"], second["resume"]) == (None, run.id, "allow")
    assert first["project"] == "jlora" and first["name"] == "run" and first["config"] == {"rank": 8, "set": {}}
    if not installed("wandb"):
        logged = [given[0] for name, given, _ in run if name == "log"]
        assert logged[0] == {"train/loss": 2.0, "train/tokens": 30, "step": 1} and len(logged) == 3
        assert run[-1] == ("finish", (), {"exit_code": 0})


def test_a_resumed_run_is_the_same_run_at_mlflow(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = None
    if not installed("mlflow"):
        client = Calls(
            get_experiment_by_name=lambda name: None,
            create_experiment=lambda name: "1",
            create_run=lambda number, run_name: types.SimpleNamespace(
                info=types.SimpleNamespace(run_id=f"{run_name}-1")
            ),
        )
        module(monkeypatch, "mlflow", MlflowClient=lambda: client)
        pair = lambda *given: given
        module(monkeypatch, "mlflow.entities", Metric=pair, Param=pair)
    report(tmp_path / "run", "mlflow", RECORDS)
    report(tmp_path / "run", "mlflow", RECORDS[1:], resumed_at=1)
    run = json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"]
    if client is None:
        from mlflow import MlflowClient

        kept = MlflowClient().get_run(run)
        assert kept.info.status == "FINISHED" and kept.data.params == {"rank": "8", "set": "{}"}
        losses = [(each.step, each.value) for each in MlflowClient().get_metric_history(run, "train/loss")]
    else:
        batches = [named["metrics"] for name, _, named in client if name == "log_batch" and "metrics" in named]
        losses = [(step, value) for batch in batches for name, value, _, step in batch if name == "train/loss"]
        assert client[-1] == ("set_terminated", (run, "FINISHED"), {})
    assert losses == [(1, 2.0), (2, 1.5), (2, 1.5)]


def test_a_service_that_fails_is_told_of_once_and_the_others_go_on(monkeypatch, tmp_path):
    class Failing(Calls):
        def log(self, step, values):
            raise OSError("no route")

    whole, said = Calls(), []
    monkeypatch.setattr(trackers, "_MADE", {"wandb": lambda *given: Failing(), "mlflow": lambda *given: whole})
    report(tmp_path / "run", "wandb,mlflow", RECORDS, say=said.append)
    assert said == ["note  --report-to wandb failed (OSError: no route): no more is reported there"]
    assert [call[0] for call in whole] == ["log", "log", "log", "close"]


def test_what_the_listener_raises_ends_the_run_and_closes_the_services(monkeypatch, tmp_path):
    whole = Calls()
    monkeypatch.setattr(trackers, "_MADE", {"mlflow": lambda *given: whole})

    def prune(record):
        raise RuntimeError("pruned")

    with (
        pytest.raises(RuntimeError, match="pruned"),
        reported(tmp_path, Settings(report_to="mlflow"), {}, None, prune, print) as listener,
    ):
        listener(RECORDS[0])
    assert whole == [("close", (False,), {})]
