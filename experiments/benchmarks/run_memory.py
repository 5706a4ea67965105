"""What a whole LoRA run holds beyond its base: at the start, in training, at the merge and at the save.

Every phase runs in this process with the high-water mark of its memory reset before (Linux); what is counted is what came
on top of what was there. Arrays that are live after the phase are counted by JAX.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
import variants
from problems import Settings, problem

import jlora


def status(field: str) -> int | None:
    """A size in bytes from the process's status; None where the system has no such file."""
    path = Path("/proc/self/status")
    if not path.exists():
        return None
    return next((int(line.split()[1]) * 1024 for line in path.read_text().splitlines() if line.startswith(field)), None)


def on_top(phase: Callable[[], Any]) -> tuple[Any, dict[str, float | None]]:
    """A phase's result, and in MB what it left in arrays, and the most it took of the process's memory meanwhile."""
    gc.collect()
    live = sum(x.nbytes for x in jax.live_arrays())
    reset = Path("/proc/self/clear_refs")
    peak = None
    if reset.exists():
        reset.write_text("5")
    before = status("VmRSS:")
    result = jax.block_until_ready(phase())
    if reset.exists() and before is not None:
        peak = (status("VmHWM:") or 0) - before
    gc.collect()
    left = sum(x.nbytes for x in jax.live_arrays()) - live
    return result, {"left_mb": left / 1e6, "peak_mb": None if peak is None else peak / 1e6}


def measure(s: Settings) -> dict[str, Any]:
    """{phase: MB left and at most}, with the base's size beside it."""
    p = problem(s)
    base = sum(x.nbytes for x in jax.tree.leaves(p.params))
    report = jlora.sites(p.net.apply, {"params": p.params}, *p.inputs)
    spec = {p.kernels: jlora.LoRA(s.rank, alpha=2 * s.rank)}
    found: dict[str, Any] = {"base_mb": base / 1e6}
    jlora.adapterize(p.params, spec, sites=report)  # compiles what draws the starting values
    adapted, found["adapterize"] = on_top(lambda: jlora.adapterize(p.params, spec, sites=report))
    tx = jlora.optimizer(adapted, optax.adamw, 1e-4)
    _, found["optimizer"] = on_top(lambda: tx.init(adapted.params))
    step, plain = variants.lifted(p, adapted), variants.bound(p)
    for name, each in (("step", step), ("step of the bound", plain)):
        memory = each.step.lower(*each.arguments).compile().memory_analysis()
        more = memory.output_size_in_bytes - memory.alias_size_in_bytes
        found[name] = {"left_mb": more / 1e6, "peak_mb": (memory.temp_size_in_bytes + more) / 1e6}
    with tempfile.TemporaryDirectory() as folder:
        jlora.save(Path(folder) / "first", adapted)
        _, found["save"] = on_top(lambda: jlora.save(Path(folder) / "adapters", adapted))
    found["merge into the base's memory"] = merged(adapted)
    return found


def merged(adapted: jlora.Adapted) -> dict[str, float]:
    """By `jax.jit(merge, donate_argnums=0)`, whose result takes the base's place; XLA's account."""
    memory = jax.jit(jlora.merge, donate_argnums=0, keep_unused=True).lower(adapted).compile().memory_analysis()
    more = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {"left_mb": more / 1e6, "peak_mb": (memory.temp_size_in_bytes + more) / 1e6}


def show(found: dict[str, Any]) -> str:
    """The table as text."""
    lines = [f"beyond the base of {found['base_mb']:.1f} MB{'':12}{'left MB':>12}{'at most MB':>12}"]
    for name, row in found.items():
        if isinstance(row, dict):
            peak = "-" if row["peak_mb"] is None else f"{row['peak_mb']:.1f}"
            lines.append(f"{name:38}{row['left_mb']:12.1f}{peak:>12}")
    return "\n".join(lines)
