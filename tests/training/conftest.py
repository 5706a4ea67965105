"""The job's tests compile the same small programs again and again: a cache for the session."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import pytest

import jlora
from jlora.training.job import finetune
from jlora.training.reporting.metrics import Metrics


@pytest.fixture(scope="package", autouse=True)
def compilation_cache(tmp_path_factory):
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def unplugged():
    """`with unplugged(step):` runs what stops with an error when it writes the metrics of that step."""

    @contextlib.contextmanager
    def stop(at):
        write = Metrics.write

        def fail(self, step, kind, **values):
            if step == at:
                raise RuntimeError("pulled the plug")
            write(self, step, kind, **values)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Metrics, "write", fail)
            with pytest.raises(RuntimeError, match="pulled the plug"):
                yield

    return stop


@pytest.fixture
def stopped_and_resumed(tmp_path):
    """Runs settings as a whole, and goes on from what a stop after a step would have left: both end with the same bits."""

    def run(settings, at=4):
        whole, stopped = (dataclasses.replace(settings, out=str(tmp_path / name)) for name in ("whole", "stopped"))
        result = finetune(dataclasses.replace(whole, keep=settings.steps), _quiet)
        _left_by_a_stop(Path(whole.out), Path(stopped.out), at)
        with pytest.MonkeyPatch.context() as patch:
            # A resumed run has the ranks that it began with.
            patch.setattr(jlora, "intrinsic_dimensions", None)
            resumed = finetune(dataclasses.replace(stopped, resume=True), _quiet)
        assert resumed.record["resumed_at"] == at
        assert _adapters(whole) == _adapters(stopped)
        return result

    return run


def _left_by_a_stop(whole, stopped, at):
    """A folder with what is written until the checkpoint of a step, and with the metrics, which are ahead of it."""
    stopped.mkdir()
    for name in ("settings.json", "metrics.jsonl"):
        shutil.copy(whole / name, stopped)
    for checkpoint in (whole / "checkpoints").iterdir():
        if int(checkpoint.name) <= at:
            shutil.copytree(checkpoint, stopped / "checkpoints" / checkpoint.name)


def _quiet(text):
    pass


def _adapters(settings):
    """What the saved adapters say of themselves, the hashes of their arrays included."""
    return json.loads((Path(settings.out) / "adapters" / "jlora.json").read_text())["adapters"]
