"""Several processes of one run, as on the hosts of a pod: they train as one, and go on after one of them was killed."""

import dataclasses
import fnmatch
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from little_data import sentences

import jlora
from jlora import models
from jlora.training.cli import main
from jlora.training.job import finetune
from jlora.training.reporting.metrics import read_metrics
from jlora.training.settings.fields import Settings

pytestmark = pytest.mark.releases

ROOT = Path(__file__).resolve().parents[1]
JOB = Settings(
    steps=24,
    batch=8,
    accumulate=2,
    max_length=16,
    rank=2,
    targets=".*/(q_proj|down_proj)/kernel",
    learning_rate=3e-2,
    checkpoint_every=6,
    evaluate_every=12,
    sample_tokens=4,
)


def flags(**changes):
    """The job's settings, those that are not left open, as a user would write them."""
    given = {field.name: getattr(JOB, field.name) for field in dataclasses.fields(JOB)} | changes
    default = Settings()
    words = []
    for name, value in given.items():
        if value is not None and name != "spec" and value != getattr(default, name):
            words += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    return words


def start(processes, logs, devices=1, **changes):
    """One command for each process, of so many devices; their output goes to files, so that none waits for its reader."""
    address, environment = free_address(), own_environment(logs, devices)
    started = []
    for process in range(processes):
        command = [sys.executable, "-m", "jlora.training.cli", "finetune", *flags(**changes)]
        command += ["--coordinator", address, "--processes", str(processes), "--process", str(process)]
        with open(logs / f"{process}.txt", "w") as log:
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return started


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def own_environment(logs, devices=1):
    """So many devices for each process, and a cache of programs that the runs of a test share."""
    own_devices = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    cache = {"JAX_COMPILATION_CACHE_DIR": str(logs / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": own_devices, **cache}


def end(started, seconds=600):
    """Exit codes; whoever is still there after the time is killed."""
    until = time.monotonic() + seconds
    try:
        return [process.wait(max(0.1, until - time.monotonic())) for process in started]
    except subprocess.TimeoutExpired:
        return [process.poll() for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()


def words(logs, process):
    return (logs / f"{process}.txt").read_text()


def losses(out):
    return [(record["step"], record["kind"], record["loss"]) for record in read_metrics(Path(out) / "metrics.jsonl")]


@pytest.mark.long
@pytest.mark.once  # the run's own code: that processes find each other on an older release is seen by the next ones
def test_a_run_of_processes_one_of_which_was_killed_ends_as_one_that_was_left_alone(tmp_path):
    processes, devices, logs = 2, 2, tmp_path
    given = {"mesh": "data=2,model=2", "data": sentences(tmp_path)}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert end(start(processes, logs, devices, **given, out=str(whole))) == [0] * processes, words(logs, 0)
    assert "validation loss" in words(logs, 0) and "validation" not in words(logs, 1)

    started = start(processes, logs, devices, **given, out=str(broken))
    until = time.monotonic() + 400
    while not (broken / "checkpoints" / "6" / "manifest.json").exists():
        assert time.monotonic() < until and started[1].poll() is None, words(logs, 1)
        time.sleep(0.02)
    started[1].send_signal(signal.SIGKILL)
    assert end(started) == [5, -signal.SIGKILL, *[5] * (processes - 2)]
    for process in {*range(processes)} - {1}:
        assert words(logs, process).count("process 1 died; start all processes again with --resume") == 1
        assert "stack trace" not in words(logs, process)
    assert not (broken / "results.json").exists()
    assert end(start(processes, logs, devices, **given, out=str(broken), resume=True)) == [0] * processes, words(
        logs, 0
    )
    assert "resumed from the checkpoint of step" in words(logs, 0)

    assert losses(broken) == losses(whole)
    base = models.load(models.STORIES260K)[1]
    found, wanted = (jlora.load(out / "adapters", base) for out in (broken, whole))
    for name in ("q_proj", "down_proj"):
        where = "self_attn" if name == "q_proj" else "mlp"
        for factor in "ab":
            ours, theirs = (x.params["layers"][where][name]["kernel"][factor] for x in (found, wanted))
            np.testing.assert_array_equal(ours, theirs)
    alone = finetune(dataclasses.replace(JOB, data=given["data"], out=str(tmp_path / "alone"), progress="none"), print)
    np.testing.assert_allclose([x[2] for x in losses(whole)], [x[2] for x in losses(alone.out)], rtol=1e-3)
    assert json.loads((whole / "results.json").read_text())["steps"] == JOB.steps


@pytest.mark.long
def test_a_mesh_that_leaves_out_devices_and_a_folder_in_use_are_told_in_every_process(tmp_path):
    codes = end(start(2, tmp_path, mesh="data=1", out=str(tmp_path / "run")))
    assert codes == [2, 2], words(tmp_path, 0)
    wanted = "mesh of 1 devices leaves out some of the 2 that the 2 processes have: the product of its axes must be 2"
    assert all(wanted in words(tmp_path, process) for process in (0, 1))
    (tmp_path / "run").mkdir()
    shutil.copy(ROOT / "README.md", tmp_path / "run")
    assert end(start(2, tmp_path, mesh="data=2", out=str(tmp_path / "run"))) == [2, 2]
    assert all("is not empty; choose another --out" in words(tmp_path, process) for process in (0, 1))


ALL, ALIKE = "all processes must have the same", "all processes must be given the same"
DIFFERENCES = {
    "rate": ("SettingError", f"learning_rate is 0.002 in process 1 and 0.001 in process 0: {ALIKE}"),
    "resume": ("SettingError", f"resume is True in process 1 and False in process 0: {ALIKE}"),
    "folder": (
        "FolderError",
        "process 1 does not see in FOLDER/own1 what process 0 wrote to FOLDER/own0: --out must be in a file system that all "
        "hosts share",
    ),
    "rows": (
        "DisagreementError",
        "process 1 reads other rows from FOLDER/host1/train.jsonl: 27 to train on, sha256 * where process 0 has 29 to train "
        f"on, sha256 *; {ALL}",
    ),
    "version": ("DisagreementError", f"process 1 has another numpy: 1.0 where process 0 has {np.__version__}; {ALL}"),
    "switch": ("DisagreementError", f"process 1 has another jax_enable_x64: True where process 0 has False; {ALL}"),
    "weights": (
        "DisagreementError",
        f"process 1 reads other weights from FOLDER/model1: fingerprint * where process 0 has fingerprint *; {ALL}",
    ),
    "adapter": (
        "DisagreementError",
        f"process 1 reads other adapters from FOLDER/adapter1: sha256 * where process 0 has sha256 *; {ALL}",
    ),
}


@pytest.mark.long
def test_hosts_that_differ_are_told_so_by_both_and_those_that_do_not_stop_and_go_on_together(tmp_path):
    """Many jobs in one pair of processes, as from Python: what takes time is to start processes."""
    script = [sys.executable, str(ROOT / "tests" / "differing_hosts.py"), free_address()]
    started = []
    for process in range(2):
        with open(tmp_path / f"{process}.txt", "w") as log:
            command = [*script, str(process), str(tmp_path)]
            started.append(subprocess.Popen(command, cwd=ROOT, env=own_environment(tmp_path), stdout=log, stderr=log))
    assert end(started, seconds=300) == [0, 0], words(tmp_path, 0) + words(tmp_path, 1)
    told = [
        [json.loads(line) for line in words(tmp_path, process).splitlines() if line.startswith('["')]
        for process in (0, 1)
    ]
    for found in told:
        by_name = {name: (kind, text) for name, kind, text, _ in found}
        for name, (kind, text) in DIFFERENCES.items():
            assert by_name[name][0] == kind
            assert fnmatch.fnmatchcase(by_name[name][1], text.replace("FOLDER", str(tmp_path))), by_name[name]
        assert max(seconds for name, *_, seconds in found if name in DIFFERENCES) < 30
    missing = {kind: text for found in told for name, kind, text, _ in found if "misses" in name}
    assert missing["LostError"].endswith("gave up: nothing.jsonl: no such file")
    for found in told:
        (_, whole, *_), (_, stopped, text, _), (_, resumed, *_), (_, *continued, _) = found[-5:-1]
        assert (whole, stopped, resumed, continued) == ("trained", "Stopped", "trained", ["trained", ""])
        assert re.match("stopped after step [2-7]; the same commands with --resume go on", text)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    states = [json.loads((tmp_path / out / "adapters" / "jlora.json").read_text()) for out in ("stopped", "whole")]
    assert states[0]["adapters"] == states[1]["adapters"]
    # A run goes on from adapters where the run before ended, in both processes.
    before, after = (losses(tmp_path / out) for out in ("whole", "continued"))
    assert [step for step, kind, _ in after if kind == "train"] == [1, 2]
    assert after[0][:2] == (0, "validation") and after[0][2] == pytest.approx(before[-1][2], rel=1e-6)
    assert after[-1][2] < before[-1][2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--processes", "2", "--process", "0"), "--coordinator is missing: --coordinator, --processes and"),
        (("--coordinator", "here:1", "--process", "0"), "--processes is missing"),
        (
            ("--coordinator", "here", "--processes", "2", "--process", "0"),
            "--coordinator must be host:port, got 'here'",
        ),
        (("--coordinator", "here:1", "--processes", "2", "--process", "2"), "--process must be from 0 to 1"),
    ],
)
def test_what_is_wrong_about_a_process_is_told_in_a_sentence(given, message, capsys):
    assert main(["finetune", *given]) == 2
    assert message in capsys.readouterr().err


def test_without_a_cluster_around_it_a_process_says_what_to_give(tmp_path):
    """In a process of its own: JAX joins a cluster only before anything else is done with it."""
    clusters = ("SLURM_", "OMPI_", "TPU_", "JAX_COORD", "KUBER")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(clusters)}
    command = [sys.executable, "-m", "jlora.training.cli", "finetune", "--distributed", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "finds no cluster in its surroundings" in done.stderr
    assert "give --coordinator, --processes and --process" in done.stderr
