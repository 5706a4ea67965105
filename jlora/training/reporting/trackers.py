"""The lines of `metrics.jsonl`, reported while a run goes: to TensorBoard, Weights & Biases or MLflow, and to a function."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from jlora.disk.json_files import read_object
from jlora.training.errors import SettingError
from jlora.training.files import write_json
from jlora.training.hosts import processes
from jlora.training.reporting.metrics import Record
from jlora.training.settings.fields import TRACKERS, Settings, trackers_of

#: Under which numbers the run goes on at the services that gave them.
RUNS = "trackers.json"
_PROJECT = "jlora"


class Tracker(Protocol):
    """One service that shows runs."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Report values by name (`train/loss`) after a step."""

    def close(self, whole: bool) -> None:
        """The run is over, or broken off where it is not `whole`."""


class TensorBoard(Tracker):
    """Curves in `tensorboard/` of the run's folder, by the package tensorboardX."""

    def __init__(self, out: Path, settings: Mapping[str, Any], resumed_at: int | None):
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

        # What a stopped run had reported after its checkpoint is taken back.
        purge = None if resumed_at is None else resumed_at + 1
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=purge)
        rows = (f"| {name} | {value} |" for name, value in settings.items())
        self._writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, whole: bool) -> None:
        self._writer.close()


class WeightsAndBiases(Tracker):
    """A run of the project `$WANDB_PROJECT` (jlora); `$WANDB_MODE=offline` leaves it in `wandb/` of the run's folder."""

    def __init__(self, out: Path, settings: Mapping[str, Any], resumed_at: int | None):
        import wandb  # pyright: ignore[reportMissingImports]

        known = _known(out, "wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=os.environ.get("WANDB_NAME", out.name),
            id=known,
            resume="allow" if known else None,
            config=dict(settings),
            dir=str(out),
        )
        _keep(out, "wandb", self._run.id)
        # By a step of our own: a resumed run goes on from its checkpoint, and W&B refuses steps before its last one.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self, whole: bool) -> None:
        self._run.finish(exit_code=0 if whole else 1)


class MLflow(Tracker):
    """A run of the experiment `$MLFLOW_EXPERIMENT_NAME` (jlora) at `$MLFLOW_TRACKING_URI`."""

    def __init__(self, out: Path, settings: Mapping[str, Any], resumed_at: int | None):
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]

        self._client, self._metric, known = MlflowClient(), Metric, _known(out, "mlflow")
        if known:
            self._run: str = known
            self._client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        self._run = self._client.create_run(number, run_name=out.name).info.run_id
        self._client.log_batch(self._run, params=[Param(key, str(value)[:500]) for key, value in settings.items()])
        _keep(out, "mlflow", self._run)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, whole: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if whole else "FAILED")


_MADE: dict[str, Callable[..., Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}


def _known(out: Path, name: str) -> str | None:
    """The number of this run at a service, where it was given one."""
    return read_object(out / RUNS).get(name) if (out / RUNS).exists() else None


def _keep(out: Path, name: str, number: str) -> None:
    known = read_object(out / RUNS) if (out / RUNS).exists() else {}
    write_json(out / RUNS, {**known, name: number})


def check_trackers(settings: Settings) -> None:
    """What `--report-to` names is installed.

    Raises:
        SettingError: with the extra to install.
    """
    for name in trackers_of(settings):
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise SettingError("report_to", f"{name} needs the package {TRACKERS[name]}: pip install 'jlora[{name}]'")


@contextlib.contextmanager
def reported(
    out: Path,
    settings: Settings,
    given: Mapping[str, Any],
    resumed_at: int | None,
    listener: Callable[[Record], None] | None,
    say: Callable[[str], None],
) -> Iterator[Callable[[Record], None]]:
    """A function to call with each line of the metrics; process 0 reports it.

    A service that fails is told of once, and left alone from then on: the run goes on, and `metrics.jsonl` has every line.
    What the listener raises ends the run.

    Args:
        out: the output folder.
        settings: of the run.
        given: the settings to show with it, by name.
        resumed_at: the step that the run goes on from; None for a new one.
        listener: called with each line, as a dict.
        say: takes a sentence about a service that fails.
    """
    names = trackers_of(settings) if processes.first() else []
    trackers = {name: _MADE[name](out, given, resumed_at) for name in names}

    def report(record: Record) -> None:
        if listener is not None and processes.first():
            listener(record)
        values = {f"{record['kind']}/{name}": value for name, value in record.items() if name not in ("step", "kind")}
        for name in list(trackers):
            with _told(name, trackers, say):
                trackers[name].log(record["step"], values)

    whole = False
    try:
        yield report
        whole = True
    finally:
        for name in list(trackers):
            with _told(name, trackers, say):
                trackers[name].close(whole)


@contextlib.contextmanager
def _told(name: str, trackers: dict[str, Tracker], say: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        del trackers[name]
        say(f"note  --report-to {name} failed ({type(error).__name__}: {error}): no more is reported there")
