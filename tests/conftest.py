"""Settings of the whole suite: eight virtual CPU devices, no silent rank promotion, fixed precision, quick compilation."""

import gc
import os
from pathlib import Path

from kernels import QUICK

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
# Nearly all the time is compilation, and the programs, those of subprocesses too, do little arithmetic. Only machine code
# is optimized less: a program's text, memory and cost, which some tests measure, stay the same to the byte.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA makes a kernel by way of MLIR, or by LLVM alone in half the time where a release still has both ways.
os.environ["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} {QUICK}".strip()

import pytest

# Traces make many objects and few cycles: at Python's own threshold the search for cycles takes a twentieth of the time.
gc.set_threshold(100_000, 20, 100)

DATA = Path(os.environ.get("JLORA_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data and pretrained models."""
    if not DATA.is_dir():
        raise FileNotFoundError(f"the test data is not at {DATA}; set JLORA_DATA to the folder that holds it")
    return DATA
