"""One of two processes that run jobs in which they differ, one after another: what came of each is a line of JSON.

Run as `python differing_hosts.py ADDRESS PROCESS FOLDER`.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import jax

ADDRESS, PROCESS, FOLDER = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
jax.distributed.initialize(ADDRESS, 2, PROCESS)

from safetensors.numpy import load_file, save_file  # noqa: E402  (JAX is joined before anything is done with it)

import jlora  # noqa: E402
from jlora import models  # noqa: E402
from jlora.training import Settings, finetune  # noqa: E402
from jlora.training.hosts import agreement, versions  # noqa: E402
from jlora.training.reporting.metrics import Metrics  # noqa: E402

OTHER = PROCESS == 1
ROWS = [{"text": f"the cat number {n} sat on the mat and looked at the dog"} for n in range(16)]
MODEL = FOLDER / f"model{PROCESS}"


def write_rows(rows):
    """Both have a file of this name on a disk of their own."""
    path = FOLDER / f"host{PROCESS}" / "train.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def job(name, rows=ROWS, **changes):
    given = {
        "model": str(MODEL),
        "data": write_rows(rows),
        "steps": 8,
        "batch": 4,
        "max_length": 16,
        "rank": 2,
        "targets": ".*/q_proj/kernel",
        "mesh": "data=2",
        "out": str(FOLDER / name),
        "sample_tokens": 0,
        "progress": "none",
    }
    since = time.monotonic()
    try:
        finetune(Settings(**{**given, **changes}), say=lambda text: None)
        found = "trained", ""
    except BaseException as error:
        found = type(error).__name__, str(error)
    print(json.dumps([name, *found, time.monotonic() - since]), flush=True)


def interrupted_after_the_first_step():
    """Ctrl-C in one of the processes, while the other waits for it in a step."""
    write = Metrics.write

    def acting(self, step, kind, **values):
        write(self, step, kind, **values)
        if OTHER and (step, kind) == (1, "train"):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(3)

    Metrics.write = acting
    job("stopped")
    Metrics.write = write


shutil.copytree(models.STORIES260K, MODEL)
signal.signal(signal.SIGINT, signal.default_int_handler)
agreement._SEEN_WITHIN = 1.0
job("rate", learning_rate=0.002 if OTHER else 0.001)
job("resume", resume=OTHER)
job("folder", out=str(FOLDER / f"own{PROCESS}"))
job("rows", rows=ROWS[1:] if OTHER else ROWS)
job("one misses its file", **({"data": "nothing.jsonl"} if OTHER else {}))
job("the first misses its file", **({} if OTHER else {"data": "nothing.jsonl"}))
installed = versions.installed
versions.installed = lambda package: "1.0" if OTHER and package == "numpy" else installed(package)
job("version")
versions.installed = installed
jax.config.update("jax_enable_x64", OTHER)
job("switch")
jax.config.update("jax_enable_x64", False)
weights = load_file(MODEL / "model.safetensors")
changed = {name: array.copy() for name, array in weights.items()}
changed[min(changed)].flat[0] += 1e-3 * OTHER
save_file(changed, MODEL / "model.safetensors", {"format": "pt"})
job("weights")
save_file(weights, MODEL / "model.safetensors", {"format": "pt"})
job("whole")
interrupted_after_the_first_step()
job("stopped", resume=True)
kept = {"rank": None, "targets": None, "steps": 2}  # adapters have their own
job("continued", adapter=str(FOLDER / "whole"), **kept)
adapted = jlora.load(FOLDER / "whole" / "adapters", models.load(MODEL)[1])
for number in range(2):  # process 0 writes them
    scaled = jax.tree.map(lambda x: x * (1 + number), adapted.params)
    jlora.save(FOLDER / f"adapter{number}", adapted.replace(params=scaled))
job("adapter", adapter=str(FOLDER / f"adapter{PROCESS}"), **kept)
