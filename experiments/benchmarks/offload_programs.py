"""What `jlora.offload` leaves of an optimizer's state on a TPU: a step's program, compiled without a TPU.

    pip install -U "jax[tpu]"     (only its libtpu is needed: the compiler; no TPU)
    python experiments/benchmarks/offload_programs.py

Layers of width 1,024, one after another, with an adapter of rank 256 in each, in float32 on a base in bfloat16; Adam after
clipping by the gradient's global norm; replicated on the four chips of a v5e, eight rows. From XLA's count of one chip's
memory come the table and the numbers beside it, in results/offload_programs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tpu_programs import topology_devices

import jlora

RESULTS = Path(__file__).parent / "results" / "offload_programs"
WIDTH, RANK = 1024, 256
METHODS = {"LoRA": jlora.LoRA(RANK), "AdaLoRA": jlora.AdaLoRA(RANK, target=RANK // 2, steps=100)}
# (layers, method); `group_bytes`, None for the optimizer without `offload`.
PROGRAMS = ((24, "LoRA"), (16, "AdaLoRA"))
GROUPS = (None, 1, 2**22, 2**24, 2**40)
MIB = 2**20


def model(params: Any, x: jax.Array) -> jax.Array:
    for layer in params.values():
        x = jnp.tanh(x @ layer["kernel"])
    return jnp.mean(x**2)


def placed(tree: Any, place: Callable[[Any], NamedSharding]) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf)), tree)


def measure(layers: int, method: str, group: int | None, mesh: Mesh) -> dict[str, Any]:
    """The bytes of a step's program in one chip's memory and in its host's."""
    whole = NamedSharding(mesh, PartitionSpec())
    on_device, host = (lambda leaf: whole), whole.with_memory_kind("pinned_host")
    base = {f"layer{n:02}": {"kernel": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.bfloat16)} for n in range(layers)}
    adapted = placed(jlora.adapterize(base, {".*": METHODS[method]}), on_device)
    tx = optax.chain(optax.clip_by_global_norm(1.0), jlora.optimizer(adapted, optax.adamw, 1e-3))
    state = jax.eval_shape(tx.init, adapted.params)
    if group is not None:
        tx = jlora.offload(tx, group_bytes=group)
    state = placed(state, lambda leaf: host if group is not None and leaf.ndim else whole)
    x = jax.ShapeDtypeStruct((8, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("data")))

    def step(params, state, rest, x):
        def loss(p):
            return jlora.lift(model)(rest.replace(params=p), x)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    program = jax.jit(step, donate_argnums=(0, 1)).lower(adapted.params, state, adapted.replace(params={}), x).compile()
    memory = program.memory_analysis()
    return {
        "layers": layers,
        "method": method,
        "group_bytes": group,
        "state_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "host_argument_bytes": memory.host_argument_size_in_bytes,
        "host_alias_bytes": memory.host_alias_size_in_bytes,
        "host_temp_bytes": memory.host_temp_size_in_bytes,
        "jax": jax.__version__,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each program; MiB a chip."""
    lines = [
        "| layers | group | state | device: arguments | device: temporary | device: both | host |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        group = row["group_bytes"]
        words = "without offload" if group is None else "one array" if group == 1 else f"{group / MIB:,.0f} MiB"
        words = "whole state" if group == 2**40 else words
        both = row["argument_bytes"] + row["temp_bytes"]
        sizes = [row["state_bytes"], row["argument_bytes"], row["temp_bytes"], both, row["host_argument_bytes"]]
        cells = " | ".join(f"{size / MIB:.1f}" for size in sizes)
        lines.append(f"| {row['layers']}, {row['method']} | {words} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    mesh = Mesh(np.array(topology_devices("v5e:2x2")), ("data",))
    rows = [measure(*program, group, mesh) for program in PROGRAMS for group in GROUPS]
    RESULTS.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(f"MiB of one chip, XLA's count, JAX {jax.__version__}.\n\n{table(rows)}\n")
    print(table(rows))
