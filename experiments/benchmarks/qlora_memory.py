"""What a step of QLoRA takes on one GPU, compiled without a GPU and without a weight.

    pip install jax-cuda13-plugin jax-cuda13-pjrt      (of JAX's own version: the compiler; no GPU, no other package)
    python experiments/benchmarks/qlora_memory.py                        every program; minutes on two cores
    python experiments/benchmarks/qlora_memory.py --model 65b --base nf4 --tokens 512 [--offload]

Shapes go in; XLA's GPU compiler gives back the program of one H100, with the bytes of its arguments and of what it keeps
on the way. Rank 64 on all linear weights but the head, AdamW, activations in bfloat16, layers scanned and rematerialised,
trained arrays and moments in float32 and donated; `--rows` rows of `--tokens` tokens.

bf16      a base of bfloat16.
nf4       NF4 with double quantization in blocks of 64, as `jlora.models.load(..., quantize="nf4")` keeps it.

With `--offload` AdamW's moments lie in the host's memory (`jlora.offload`) and come leaf by leaf. A line tells what the
arguments are made of: the base's `codes_gib`, `plain_gib` (embedding, head, norms), `trained_gib`, and `moments_gib`, which
with `--offload` are `host_gib` and no arguments of the device.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # CUDA's own libraries are not needed to compile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jlora
from jlora.models import Llama, LlamaConfig
from jlora.training.commands.chips import H100

GIB = 2**30
BASES = ("bf16", "nf4")
# vocabulary, width, feed-forward, layers, heads, key and value heads
SIZES = {
    "7b": (32000, 4096, 11008, 32, 32, 32),
    "8b": (128256, 4096, 14336, 32, 32, 8),
    "65b": (32000, 8192, 22016, 80, 64, 64),
    "70b": (32000, 8192, 28672, 80, 64, 8),
}
# Model, base, rows, tokens, and whether the moments lie on the host.
PROGRAMS = (
    ("7b", "bf16", 8, 512, False),
    ("7b", "nf4", 8, 512, False),
    ("7b", "nf4", 1, 4096, False),
    ("8b", "nf4", 4, 512, False),
    ("65b", "nf4", 1, 512, False),
    ("65b", "nf4", 1, 512, True),
    ("70b", "nf4", 1, 512, False),
    ("70b", "nf4", 1, 512, True),
)
OPTIONS = {"xla_gpu_autotune_level": 0}  # fused kernels are chosen without a trial


def model_config(name: str, layers: int | None = None) -> LlamaConfig:
    """The published shape of a Llama, scanned and rematerialised, in bfloat16."""
    vocab, width, hidden, depth, heads, pairs = SIZES[name]
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        head_dim=width // heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        scan_layers=True,
        remat=True,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
    )


def h100() -> Any:
    """One described H100.

    Raises:
        RuntimeError: where the GPU compiler is not installed.
    """
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            platform="cuda", topology_name="h100", target_config=H100, topology="1x1x1"
        )
    except Exception as error:
        raise RuntimeError(
            f"no GPU compiler ({type(error).__name__}): pip install jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt"
        ) from error
    return found.devices[0]


def placed(tree: Any, device: Any, host: bool = False) -> Any:
    """Shapes that lie on the device, or, where they have an axis, in its host's memory."""
    mesh = Mesh(np.array([device]), ("device",))
    here = NamedSharding(mesh, PartitionSpec())
    # A described device has no list of its memories, by which a sharding of it would be checked; an abstract one is not.
    there = NamedSharding(mesh.abstract_mesh, PartitionSpec(), memory_kind="pinned_host")

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there if host and leaf.ndim else here)

    return jax.tree.map(one, tree)


def gib(tree: Any) -> float:
    """Bytes of arrays, in GiB."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / GIB


def training_step(
    config: LlamaConfig, base: str, rows: int, tokens: int, rank: int = 64, offload: bool = False
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One training step, and the shapes of its arguments: trained arrays, the optimizer's state, the rest, ids."""
    model, row = Llama(config), jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), row)["params"]
    sites = jlora.sites(model.apply, {"params": params}, row)
    if base != "bf16":
        params = jax.eval_shape(
            lambda params: jlora.quantize(params, {jlora.ALL_LINEAR: jlora.NF4(double=True)}, sites), params
        )
    spec = {jlora.ALL_LINEAR: jlora.LoRA(rank, alpha=16)}
    adapted = jlora.adapterize(params, spec, sites=sites)
    tx = jlora.optimizer(adapted, optax.adamw, learning_rate=2e-4)
    apply = jlora.lift(model.apply)

    def loss(trained: Any, adapted: Any, row: jax.Array) -> jax.Array:
        logits = apply({"params": adapted.replace(params=trained)}, row)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], row[:, 1:]).mean()

    def step(trained: Any, state: Any, adapted: Any, row: jax.Array) -> Any:
        value, gradient = jax.value_and_grad(loss)(trained, adapted, row)
        updates, state = tx.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, value

    state = jax.eval_shape(tx.init, adapted.params)
    if offload:
        tx = jlora.offload(tx)
    return step, (adapted.params, state, adapted.replace(params={}), row)


def measure(
    config: LlamaConfig, base: str, rows: int, tokens: int, device: Any, rank: int = 64, offload: bool = False
) -> dict[str, Any]:
    """Bytes of one training step's program."""
    step, (trained, state, rest, row) = training_step(config, base, rows, tokens, rank, offload)
    given = placed(trained, device), placed(state, device, host=offload), *placed((rest, row), device)
    found = jax.jit(step, donate_argnums=(0, 1)).lower(*given).compile(compiler_options=OPTIONS).memory_analysis()
    codes = [leaf for leaf in jax.tree.leaves(rest.base, is_leaf=_is_stored) if _is_stored(leaf)]
    return {
        "rows": rows,
        "tokens": tokens,
        "base": base,
        "offload": offload,
        "codes_gib": round(gib(codes), 2),
        "plain_gib": round(gib(rest.base) - gib(codes), 2),
        "trained_gib": round(gib(trained), 2),
        "arguments_gib": round(found.argument_size_in_bytes / GIB, 2),
        "temporary_gib": round(found.temp_size_in_bytes / GIB, 2),
        "peak_gib": round((found.argument_size_in_bytes + found.temp_size_in_bytes) / GIB, 2),
        "moments_gib": round(gib(state), 2),
        "host_gib": round((found.host_argument_size_in_bytes + found.host_temp_size_in_bytes) / GIB, 2),
    }


def _is_stored(leaf: Any) -> bool:
    return isinstance(leaf, jlora.Stored)


def main() -> None:
    """Prints a line a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES)
    parser.add_argument("--base", choices=BASES, default="nf4")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--offload", action="store_true")
    asked = parser.parse_args()
    programs = ((asked.model, asked.base, asked.rows, asked.tokens, asked.offload),) if asked.model else PROGRAMS
    device = h100()
    for model, base, rows, tokens, offload in programs:
        found = measure(model_config(model), base, rows, tokens, device, asked.rank, offload)
        print(json.dumps({"model": model, **found, "jax": jax.__version__}), flush=True)


if __name__ == "__main__":
    main()
