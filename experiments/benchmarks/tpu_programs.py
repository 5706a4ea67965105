"""The training steps of large models on TPU pods, compiled without a pod and without a weight.

    pip install -U "jax[tpu]"     (only its libtpu is needed: the compiler; no TPU)
    python experiments/benchmarks/tpu_programs.py                                  every program; hours on two cores
    python experiments/benchmarks/tpu_programs.py --model 8b --topology v5e:4x4 --tensor 1 --kind jlora      one of them
    python experiments/benchmarks/tpu_programs.py --table                          the table of what results/ holds

Shapes go in, with shardings over the devices of a described topology; XLA's TPU compiler gives back the program of one
chip, and from it come memory, flops, bytes and every collective with its size (see hlo.py for how loops are counted).

bound     only the embedding's scale is trained: forward, backward to the inputs, no weight gradient. The least that
          any adapter method can cost.
jlora     LoRA on all linear weights but the head, by `lift`.
naive     the same by `x @ w + s * ((x @ a) @ b)` in every Dense and plain automatic differentiation.
full      every leaf trained.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no machine to ask for its place in a pod
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # the compiler alone may run twice at a time

import flax.linen as nn
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from variants import beside, with_factors

import jlora
from jlora import mesh as meshes
from jlora import paths
from jlora.models import Llama, LlamaConfig
from jlora.models.rope import RopeConfig

RESULTS = Path(__file__).parent / "results"
KINDS = ("bound", "jlora", "naive", "full")
_LLAMA = {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "head_dim": 128, "num_key_value_heads": 8}
_SIZES = {
    "8b": (128256, 4096, 14336, 32, 32),
    "70b": (128256, 8192, 28672, 80, 64),
}
# (model, topology, sizes of the axis `tensor`); the chips that are left are the axis `fsdp`.
PROGRAMS = (("8b", "v5e:4x4", (1, 2, 4)), ("8b", "v5e:16x16", (1, 4, 16)), ("70b", "v5p:4x4x4", (1, 4, 8)))
# Without this XLA's TPU compiler may turn a product with a gathered weight into a loop over the weight's shards, which adds
# up partial results in HBM: more bytes than all the rest of the step.
WHOLE_PRODUCTS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
HBM = {"v5e": 16e9, "v5p": 95e9}


@dataclass(frozen=True)
class Program:
    """One program to compile: `sequences` a chip of `length` tokens each, on `fsdp` x `tensor` chips."""

    model: str = "8b"
    topology: str = "v5e:4x4"
    tensor: int = 1
    kind: str = "jlora"
    rank: int = 16
    length: int = 4096
    plan: str = "auto"
    windowed: bool = False

    @property
    def name(self) -> str:
        topology = self.topology.replace(":", "-")
        ending = ("" if self.plan == "auto" else f"-{self.plan}") + ("-windowed" if self.windowed else "")
        return f"{self.model}-{topology}-tensor{self.tensor}-{self.kind}{ending}"


def model_config(name: str) -> LlamaConfig:
    """The published shape of Llama 3, scanned and rematerialised, in bfloat16."""
    vocab, width, hidden, layers, heads = _SIZES[name]
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        rope=RopeConfig(theta=500000.0),
        scan_layers=True,
        remat=True,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
        **_LLAMA,
    )


def topology_devices(topology: str) -> list[Any]:
    """The devices of a described topology.

    Raises:
        RuntimeError: where the TPU compiler is not installed.
    """
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        reason = str(error).strip().splitlines()[:1]
        raise RuntimeError(
            f"no TPU compiler for {topology} ({type(error).__name__}: {' '.join(reason)}): install the libtpu that this JAX, "
            f'{jax.__version__}, names, by pip install "jax[tpu]"'
        ) from error


def make_mesh(devices: list[Any], tensor: int) -> Mesh:
    """`fsdp` x `tensor`, with `tensor` along neighbours."""
    if len(devices) % tensor:
        raise ValueError(f"tensor={tensor} does not divide {len(devices)} chips")
    from jax.experimental import mesh_utils

    shape = (len(devices) // tensor, tensor)
    return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), ("fsdp", "tensor"))


def weight_spec(path: str, shape: tuple[int, ...]) -> P:
    """How a base weight is cut: the model's width by `fsdp`, heads, hidden units and words by `tensor`."""
    if path.endswith(("embedding", "o_proj/kernel", "down_proj/kernel")):
        return P(*[None] * (len(shape) - 2), "tensor", "fsdp")
    return P(*[None] * (len(shape) - 2), "fsdp", "tensor") if path.endswith("kernel") else P()


def struct(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def keep_rows_apart(mesh: Mesh, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Every activation between layers is cut by its rows, as models for pods say themselves."""
    rows = NamedSharding(mesh, P("fsdp", None, None))

    def interceptor(call, args, kwargs, context):
        name = type(context.module).__name__
        if name == "Layer" and context.method_name == "__call__":
            x, layer = call(jax.lax.with_sharding_constraint(args[0], rows), *args[1:], **kwargs)
            return jax.lax.with_sharding_constraint(x, rows), layer
        y = call(*args, **kwargs)
        return jax.lax.with_sharding_constraint(y, rows) if name == "Embed" else y

    def constrained(*args, **kwargs):
        with nn.intercept_methods(interceptor):
            return fn(*args, **kwargs)

    return constrained


def loss_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean cross entropy of the next token; the last position predicts nothing."""
    wanted = jnp.roll(tokens, -1, axis=1)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
    return jnp.mean(each[:, :-1])


@dataclass(frozen=True)
class Step:
    """A training step and the shapes it takes: `fn(base, trained, state, tokens)`."""

    fn: Callable[..., Any]
    base: Any
    trained: Any
    state: Any
    tokens: Any
    leaves: dict[str, tuple[int, ...]]


def make_step(program: Program, config: LlamaConfig, mesh: Mesh, sequences: int) -> Step:
    """The step of a program, with every argument as a shape that lies on the mesh."""
    net = Llama(config)
    tokens = jax.ShapeDtypeStruct((sequences, program.length), jnp.int32, sharding=NamedSharding(mesh, P("fsdp")))
    shapes = jax.eval_shape(net.init, jax.random.key(0), tokens)["params"]
    leaves = {"/".join(keys): leaf.shape for keys, leaf in paths.flatten_with_keys(shapes)[0]}
    base = jax.tree_util.tree_map_with_path(
        lambda path, leaf: struct(leaf, NamedSharding(mesh, weight_spec("/".join(k.key for k in path), leaf.shape))),
        shapes,
    )
    loss, trained, tx = _variant(program, keep_rows_apart(mesh, net.apply), base, tokens, mesh)
    whole = NamedSharding(mesh, P())
    state = jax.eval_shape(tx.init, trained)
    placed = optax.tree.map_params(
        tx,
        lambda leaf, like: leaf if isinstance(leaf, optax.MaskedNode) else struct(leaf, like.sharding),
        state,
        trained,
        transform_non_params=lambda leaf: struct(leaf, whole),
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )

    def step(base, trained, state, tokens):
        value, grads = jax.value_and_grad(lambda t: loss(base, t, tokens))(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    return Step(step, None if program.kind == "full" else base, trained, placed, tokens, leaves)


def _variant(program: Program, apply: Callable[..., Any], base: Any, tokens: Any, mesh: Mesh) -> tuple[Any, Any, Any]:
    """(loss of (base, trained, tokens), trained shapes, optimizer)."""
    if program.kind == "full":
        return lambda _, p, t: loss_of(apply({"params": p}, t), t), base, optax.adamw(1e-5)
    if program.kind == "bound":

        def loss(base, scale, t):
            table = base["embed_tokens"]["embedding"] * scale.astype(jnp.bfloat16)
            return loss_of(apply({"params": {**base, "embed_tokens": {"embedding": table}}}, t), t)

        width = base["embed_tokens"]["embedding"].shape[1]
        scale = jax.ShapeDtypeStruct((width,), jnp.float32, sharding=NamedSharding(mesh, P()))
        return loss, scale, optax.adamw(1e-4)
    adapted = adapt(program, apply, base, tokens)
    tx = jlora.optimizer(adapted, optax.adamw, 1e-4)
    if program.kind == "naive":
        formula = with_factors(apply, 2.0)
        return lambda base, p, t: loss_of(formula({"params": beside(base, p)}, t), t), adapted.params, tx
    lifted = jlora.lift(apply, plan=program.plan, cuts=meshes.cuts(adapted, {"tensor"}))
    return (
        lambda base, p, t: loss_of(lifted({"params": adapted.replace(base=base, params=p)}, t), t),
        adapted.params,
        tx,
    )


def adapt(program: Program, apply: Callable[..., Any], base: Any, tokens: Any) -> jlora.Adapted:
    """LoRA on every linear weight but the head, as shapes that lie where their base does."""
    report = jlora.sites(apply, {"params": base}, tokens)
    method = jlora.LoRA(program.rank, alpha=2 * program.rank)
    return jlora.adapterize(base, {jlora.ALL_LINEAR: method}, sites=report)


def measure(program: Program, config: LlamaConfig, devices: list[Any], sequences: int | None = None) -> dict[str, Any]:
    """Compiles a program; per chip its memory, flops, bytes and collectives."""
    mesh = make_mesh(devices, program.tensor)
    step = make_step(program, config, mesh, sequences or len(devices))
    start = time.perf_counter()
    lowered = jax.jit(step.fn, donate_argnums=(1, 2)).lower(step.base, step.trained, step.state, step.tokens)
    traced = time.perf_counter() - start
    on_tpu = devices[0].platform == "tpu" and not program.windowed
    compiled = lowered.compile(compiler_options=WHOLE_PRODUCTS if on_tpu else None)
    row = {"program": asdict(program), "mesh": dict(mesh.shape), "sequences": step.tokens.shape[0]}
    row |= {"trace_seconds": round(traced, 1), "compile_seconds": round(time.perf_counter() - start - traced, 1)}
    text = compiled.as_text()
    if folder := os.environ.get("JLORA_HLO"):
        (Path(folder) / f"{program.name}.hlo").write_text(text)
    return row | {"jax": jax.__version__} | analyse(text, compiled.memory_analysis(), step.leaves)


def analyse(text: str, memory: Any, leaves: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """What the table is made of."""
    tally = hlo.Module(text).tally()
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    total = arguments + outputs - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    each = sorted(tally.collectives.items(), key=lambda item: -item[1] * item[0][2])
    return {
        "argument_bytes": arguments,
        "temp_bytes": memory.temp_size_in_bytes,
        "total_bytes": total,
        "flops": tally.flops,
        "bytes": tally.bytes,
        "hbm_bytes": tally.hbm_bytes,
        "collective_bytes": sum(count * key[2] for key, count in tally.collectives.items()),
        "collectives": [{"kind": k, "shape": s, "bytes": b, "count": n} for (k, s, b), n in each],
        "leaves": {name: list(shape) for name, shape in leaves.items()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A markdown table: a line for each program, beside the bound on the same mesh."""
    head = ("program", "chips", "HBM: arguments", "temp", "total GB", "fits", "TFLOP", "GB moved", "in HBM",
            "beside the bound", "GB of collectives")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in sorted(rows, key=lambda row: _order(row["program"])):
        bound = bound_of(row, rows)
        ratio = (
            "-"
            if bound is None
            else f"{row['bytes'] / bound['bytes']:.3f}, {row['hbm_bytes'] / bound['hbm_bytes']:.3f}"
        )
        p, sizes = row["program"], " x ".join(f"{name} {size}" for name, size in row["mesh"].items())
        numbers = (f"{row[name] / 1e9:.2f}" for name in ("argument_bytes", "temp_bytes", "total_bytes"))
        cells = [f"{p['model']} {p['topology']}, {sizes}, {p['kind']}{_ending(p)}", str(_chips(row)), *numbers]
        cells += ["yes" if fits(row) else "NO", f"{row['flops'] / 1e12:.1f}", f"{row['bytes'] / 1e9:.0f}"]
        cells += [f"{row['hbm_bytes'] / 1e9:.0f}", ratio, f"{row['collective_bytes'] / 1e9:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _chips(row: dict[str, Any]) -> int:
    return int(np.prod(list(row["mesh"].values())))


def _ending(program: dict[str, Any]) -> str:
    plan = "" if program["plan"] == "auto" else f", {program['plan']}"
    return plan + (", windowed products" if program["windowed"] else "")


def _order(program: dict[str, Any]) -> tuple[Any, ...]:
    place = program["model"] == "70b", len(program["topology"]), program["topology"], program["tensor"]
    return *place, program["windowed"], KINDS.index(program["kind"]), program["plan"]


def bound_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The bound's program with the same model, mesh and options."""
    wanted = {**row["program"], "kind": "bound", "plan": "auto"}
    return next((other for other in rows if other["program"] == wanted), None)


def fits(row: dict[str, Any]) -> bool:
    """Whether a chip's memory holds the program."""
    return row["total_bytes"] <= HBM.get(row["program"]["topology"].split(":")[0], math.inf)


def weight_gradients(row: dict[str, Any], bound: dict[str, Any]) -> list[str]:
    """Sums over chips that may carry a base weight's gradient, and that the bound has not.

    Suspect is every sum of as many values as a base matrix has, or a piece of it that is cut by axes of the mesh, of one
    layer or of the whole stack, unless one of its axes is a rank (of one factor, or of up to four that share an input).
    """
    cuts = {i * o for i in (1, *row["mesh"].values()) for o in (1, *row["mesh"].values())}
    matrices = [shape for shape in row["leaves"].values() if len(shape) > 1 and min(shape[-2:]) > 1]
    pieces = {math.prod(axes) // cut for shape in matrices for axes in (shape, shape[-2:]) for cut in cuts}
    rank = row["program"]["rank"]

    def sums(program: dict[str, Any], ranks: tuple[int, ...]) -> Counter:
        found: Counter = Counter()
        for each in program["collectives"]:
            sizes = json.loads(each["shape"][each["shape"].index("[") :])
            suspect = math.prod(sizes) in pieces and not any(n in ranks for n in sizes)
            if each["kind"] in ("all-reduce", "reduce-scatter") and suspect:
                found[math.prod(sizes)] += each["count"]
        return found

    known = sums(bound, ())  # the bound has no ranks; a gather may be written as a sum too, of shards among zeros
    found = sums(row, (rank, 2 * rank, 3 * rank, 4 * rank))
    more = {size: count for size, count in found.items() if count > known[size]}
    return [f"{count} sums of {size:,} values, the bound has {known[size]}" for size, count in more.items()]


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """What the LoRA programs were to show, in sentences that say whether they do."""
    found = []
    for row in rows:
        bound = bound_of(row, rows)
        if row["program"]["kind"] != "jlora" or bound is None:
            continue
        name = Program(**row["program"]).name
        found.append(f"{name}: {'fits' if fits(row) else 'DOES NOT FIT'} with {row['total_bytes'] / 1e9:.2f} GB a chip")
        sums = weight_gradients(row, bound)
        found.append(
            f"{name}: {'NO: ' + '; '.join(sums) if sums else 'no collective carries the gradient of a frozen weight'}"
        )
        more = {what: row[what] / bound[what] - 1 for what in ("hbm_bytes", "collective_bytes", "bytes")}
        numbers = f"HBM {100 * more['hbm_bytes']:+.1f} %, collectives {100 * more['collective_bytes']:+.1f} %"
        most = max(more["hbm_bytes"], more["collective_bytes"])
        found.append(
            f"{name}: {'at most' if most <= 0.1 else 'MORE THAN'} 10 % above the bound's bytes: {numbers} "
            f"(with on-chip memory {100 * more['bytes']:+.1f} %)"
        )
    return found


def stored() -> list[dict[str, Any]]:
    """The programs in results/."""
    return [json.loads(path.read_text()) for path in sorted((RESULTS / "tpu_programs").glob("*.json"))]


def show() -> None:
    """Prints the table and the verdicts, and writes them to results/."""
    rows = stored()
    text = table(rows) + "\n\n" + "\n".join(f"- {sentence}" for sentence in verdicts(rows)) + "\n"
    (RESULTS / "tpu_programs.md").write_text(text)
    print(text)


def chosen(arguments: argparse.Namespace) -> list[Program]:
    """The programs that the options leave."""
    programs = [
        Program(
            model,
            topology,
            tensor,
            kind,
            plan=arguments.plan if kind == "jlora" else "auto",
            windowed=arguments.windowed,
        )
        for model, topology, tensors in PROGRAMS
        for tensor in tensors
        for kind in KINDS
    ]
    fields = ("model", "topology", "tensor", "kind")
    kept = [p for p in programs if all(getattr(arguments, f) in (None, getattr(p, f)) for f in fields)]
    if not kept:
        raise SystemExit(f"no such program; there are {PROGRAMS}, each as {', '.join(KINDS)}")
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(_SIZES))
    parser.add_argument("--topology")
    parser.add_argument("--tensor", type=int)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--plan", default="auto")
    parser.add_argument("--windowed", action="store_true", help="leave XLA its loops over the shards of a weight")
    parser.add_argument("--table", action="store_true", help="compile nothing, show what is there")
    arguments = parser.parse_args()
    for program in [] if arguments.table else chosen(arguments):
        print(f"compiling {program.name}", flush=True)
        row = measure(program, model_config(program.model), topology_devices(program.topology))
        path = RESULTS / "tpu_programs" / f"{program.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row, indent=1) + "\n")
    show()


if __name__ == "__main__":
    main()
