"""What the steps of `step_time.py --shape gpu` move on an H100, compiled without one.

    pip install jax-cuda13-plugin jax-cuda13-pjrt      (of JAX's own version: the compiler; no GPU, no other package)
    python experiments/benchmarks/gpu_programs.py [--batch N] [--length N] [--layers N] [--rank N] [--only NAME ..]

Two layers of a 7B model in bfloat16 unless told otherwise. For each variant (see step_time.py) the bytes that its program's
kernels read and write, by the rules of hlo.py, over the bound's; its temporary memory; and how many bytes of float32 arrays
as large as a layer's output are written. `apart` is jlora with the plan "factored". Kernels are chosen without a trial, so the
real ones may differ; no time is measured.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # CUDA's own libraries are not needed to compile

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import variants
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from problems import Problem, Settings, next_token_loss, settings_for
from qlora_memory import OPTIONS, h100

import jlora
from jlora.core.products.backend import traced_for
from jlora.models import Llama, LlamaConfig

MB = 2**20


def problem(s: Settings) -> Problem:
    """The shape's problem, with zeros for weights: nothing is computed."""
    dtype = jnp.dtype(s.dtype)
    config = LlamaConfig(
        vocab_size=s.vocab,
        hidden_size=s.width,
        intermediate_size=s.hidden,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.heads,
        head_dim=s.width // s.heads,
        max_position_embeddings=s.length,
        rms_norm_eps=1e-5,
        dtype=dtype,
        param_dtype=dtype,
    )
    net, tokens = Llama(config), jnp.zeros((s.batch, s.length), jnp.int32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return Problem(net, params, tokens, next_token_loss, ("embed_tokens", "embedding"), (tokens,))


def made(p: Problem, rank: int) -> dict[str, Callable[[], variants.Variant]]:
    """How each variant is made."""
    lora = jlora.LoRA(rank, alpha=2 * rank)
    dora = jlora.DoRA(lora)
    return {
        "bound": lambda: variants.bound(p),
        "naive": lambda: variants.naive(p, variants.adapt(p, lora)),
        "jlora": lambda: variants.lifted(p, variants.adapt(p, lora)),
        "jlora apart": lambda: variants.lifted(p, variants.adapt(p, lora), "factored"),
        "jlora DoRA": lambda: variants.lifted(p, variants.adapt(p, dora)),
        "jlora DoRA apart": lambda: variants.lifted(p, variants.adapt(p, dora), "factored"),
        "full": lambda: variants.full(p),
    }


def measure(variant: variants.Variant, device: Any, large: int, dump: str | None = None) -> dict[str, float]:
    """What one step's program moves and keeps."""
    place = NamedSharding(Mesh(np.array([device]), ("device",)), PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), variant.arguments)
    with traced_for(device.platform):
        compiled = variant.step.lower(*placed).compile(compiler_options=OPTIONS)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if dump:
        with open(dump, "w", encoding="utf-8") as file:
            file.write(text)
    module = hlo.Module(text)
    tally = module.tally()
    wide = sum(
        shape.bytes
        for i in module.computations[module.entry].values()
        if i.op not in hlo.FREE
        for shape in i.shapes
        if shape.dtype == "f32" and np.prod(shape.sizes) >= large
    )
    return {
        "bytes": tally.bytes,
        "temporary_mb": round(memory.temp_size_in_bytes / MB),
        "wide_float32_mb": round(wide / MB),
    }


def main() -> None:
    """Prints a line a variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("batch", "length", "layers", "rank", "width", "hidden", "heads", "vocab"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--dump", help="a folder for the programs' texts")
    arguments = vars(parser.parse_args())
    only, dump = arguments.pop("only"), arguments.pop("dump")
    s = settings_for("gpu", **arguments)
    p, device, least = problem(s), h100(), None
    for name, make in made(p, s.rank).items():
        if only and name not in only:
            continue
        path = dump and os.path.join(dump, name.replace(" ", "_") + ".txt")
        found = measure(make(), device, s.batch * s.length * s.width, path)
        least = least or found["bytes"]
        line = {"variant": name, "gb": round(found.pop("bytes") / 1e9, 2), **found}
        print(json.dumps(line | {"over_first": round(line["gb"] * 1e9 / least, 3)}), flush=True)


if __name__ == "__main__":
    main()
