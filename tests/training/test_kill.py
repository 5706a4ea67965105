"""A run killed by SIGKILL again and again ends with the same bits as one that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from little_data import sentences

from jlora.training.reporting.metrics import read_metrics

SETTINGS = """
steps = 40
batch = 4
max_length = 32
checkpoint_every = 3
evaluate_every = 10
sample_tokens = 0
progress = "none"
rank = 4
dropout = 0.1
targets = ".*/(q|v)_proj/kernel"
method = "raclora"
"""


def start(out, cache):
    one_device = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1"
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": one_device,
        "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }  # fmt: skip
    resume = ["--resume"] if (out / "settings.json").exists() else []
    config = cache.with_suffix(".toml")
    config.write_text(SETTINGS + f"data = {json.dumps(sentences(cache.parent))}\n")
    flags = ["--config", str(config), "--out", str(out), *resume]
    command = [sys.executable, "-m", "jlora.training.cli", "finetune", *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def outcome(out):
    adapters = json.loads((out / "adapters" / "jlora.json").read_text())["adapters"]
    lines = [{k: v for k, v in r.items() if k != "per_second"} for r in read_metrics(out / "metrics.jsonl")]
    return adapters, lines


def kill_after(process, out, count):
    """Kills the process once it has written `count` more lines; a little later, so as to meet every phase."""
    path = out / "metrics.jsonl"
    size = path.stat().st_size if path.exists() else 0
    written = 0
    while process.poll() is None and written < count:
        now = path.stat().st_size if path.exists() else 0
        written += now > size
        size = now
        time.sleep(0.001)
    time.sleep(random.Random(count).uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.long
def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    """RAC-LoRA has all that LoRA has to keep, and the links that it has finished and the rate that rises anew."""
    cache = tmp_path / "cache"
    whole = start(tmp_path / "whole", cache)
    assert whole.wait() == 0, whole.stdout.read()
    out = tmp_path / "killed"
    for count in (0, 1, 2, 3):
        process = start(out, cache)
        if count == 0:  # before the first step: the folder is claimed, little more
            while not (out / "settings.json").exists():
                time.sleep(0.001)
        kill_after(process, out, count)
        assert process.returncode == -signal.SIGKILL
    last = start(out, cache)
    assert last.wait() == 0, last.stdout.read()
    assert outcome(out) == outcome(tmp_path / "whole")
    assert [r["step"] for r in outcome(out)[1] if r["kind"] == "train"] == list(range(1, 41))
