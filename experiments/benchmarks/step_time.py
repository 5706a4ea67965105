"""One optimizer step of LoRA beside the least that any adapter method can cost.

    python experiments/benchmarks/step_time.py [--shape llama|scanned|minilm] [--repeats N] [--rank R] [--tokens T]

All variants are compiled first and then run interleaved, so that a noisy machine bends them alike; medians and ratios to
the bound are printed, and written to results/ with what XLA says of flops, bytes and memory, which no noise reaches.

bound     only the input embedding's scale is trained: the whole forward pass, the whole backward pass to the inputs, and
          no weight gradient. No adapter method can beat it.
jlora     `lift` with the plan it chooses, and with each plan forced.
naive     `x @ w + s * ((x @ a) @ b)` in every Dense, by plain automatic differentiation.
full      every leaf trained.
"""

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jlora
from jlora import paths
from jlora.models import Llama, LlamaConfig


@dataclass(frozen=True)
class Settings:
    shape: str = "llama"
    layers: int = 6
    width: int = 512
    hidden: int = 1408
    vocab: int = 512
    batch: int = 4
    length: int = 256
    rank: int = 8
    repeats: int = 15


def network(s: Settings) -> Llama:
    scan = s.shape == "scanned"
    config = LlamaConfig(
        vocab_size=s.vocab,
        hidden_size=s.width,
        intermediate_size=s.hidden,
        num_hidden_layers=s.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=s.width // 8,
        max_position_embeddings=s.length,
        rms_norm_eps=1e-5,
        scan_layers=scan,
        remat=scan,
    )
    return Llama(config)


def loss_of(logits, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def step_with(loss, tx):
    """(base, trained, state, tokens) -> (trained, state, loss); the base is an argument, so no copy of it is compiled in."""

    def step(base, trained, state, tokens):
        value, grads = jax.value_and_grad(lambda t: loss(base, t, tokens))(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    return jax.jit(step, donate_argnums=(1, 2))


def naive_apply(net, base, factors, tokens, scale):
    """The formula as everybody writes it, put into every Dense of the layers."""

    def interceptor(call, args, kwargs, context):
        y = call(*args, **kwargs)
        keys = context.module.path
        if isinstance(context.module, nn.Dense) and keys in factors:
            f = factors[keys]
            y = y + scale * ((args[0] @ f["a"]) @ f["b"])
        return y

    with nn.intercept_methods(interceptor):
        return net.apply({"params": base}, tokens)


def variants(s: Settings):
    """{name: (step, base, trained, state, tokens)}"""
    net = network(s)
    tokens = jax.random.randint(jax.random.key(1), (s.batch, s.length), 0, s.vocab)
    params = net.init(jax.random.key(0), tokens)["params"]
    report = jlora.sites(net.apply, {"params": params}, tokens)
    adapted = jlora.adapterize(params, {jlora.ALL_LINEAR: jlora.LoRA(s.rank, alpha=2 * s.rank)}, sites=report)
    found = {}

    def add(name, loss, base, trained):
        tx = optax.adamw(1e-3)
        trained = jax.tree.map(jnp.copy, trained)
        found[name] = (step_with(loss, tx), base, trained, tx.init(trained), tokens)

    def scaled_embedding(base, scale, tokens):
        embedding = base["embed_tokens"]["embedding"] * scale
        return loss_of(net.apply({"params": {**base, "embed_tokens": {"embedding": embedding}}}, tokens), tokens)

    add("bound", scaled_embedding, params, jnp.ones(s.width))
    for plan in ("auto", "factored", "merged"):
        apply = jlora.lift(net.apply, plan=plan)

        def lifted(base, p, tokens, apply=apply):
            return loss_of(apply({"params": adapted.replace(base=base, params=p)}, tokens), tokens)

        add(f"jlora {plan}", lifted, params, adapted.params)
    if s.shape == "llama":
        factors = {site.keys[:-1]: paths.lookup(adapted.params, site.keys) for site in adapted.plan.sites}
        names = {"/".join(keys): keys for keys in factors}

        def naive(base, flat, tokens):
            by_keys = {names[name]: f for name, f in flat.items()}
            return loss_of(naive_apply(net, base, by_keys, tokens, 2.0), tokens)

        add("naive", naive, params, {name: factors[keys] for name, keys in names.items()})
    add("full", lambda base, p, tokens: loss_of(net.apply({"params": p}, tokens), tokens), None, params)
    return found


def compile_all(found):
    compiled = {}
    for name, (step, *args) in found.items():
        start = time.perf_counter()
        lowered = step.lower(*args)
        traced = time.perf_counter()
        compiled[name] = (lowered.compile(), traced - start, time.perf_counter() - traced)
    return compiled


def measure(s: Settings):
    found = variants(s)
    compiled = compile_all(found)
    state = {name: args[1:3] for name, (_, *args) in found.items()}
    times = {name: [] for name in found}
    for repeat in range(s.repeats + 2):
        for name, (_, base, _, _, tokens) in found.items():
            start = time.perf_counter()
            trained, opt, loss = compiled[name][0](base, *state[name], tokens)
            jax.block_until_ready(loss)
            if repeat >= 2:
                times[name].append(time.perf_counter() - start)
            state[name] = (trained, opt)
    rows = {}
    for name, (program, trace, compile_) in compiled.items():
        cost, memory = program.cost_analysis(), program.memory_analysis()
        pairs = [a / b for a, b in zip(times[name], times["bound"])]
        rows[name] = {
            "milliseconds": 1e3 * statistics.median(times[name]),
            "ratio": statistics.median(pairs),
            "gflop": cost["flops"] / 1e9,
            "gigabytes_moved": cost["bytes accessed"] / 1e9,
            "temp_megabytes": memory.temp_size_in_bytes / 1e6,
            "trace_seconds": trace,
            "compile_seconds": compile_,
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    settings = Settings(**vars(parser.parse_args()))
    rows = measure(settings)
    columns = list(next(iter(rows.values())))
    print(f"{'':16}" + "".join(f"{column:>18}" for column in columns))
    for name, row in rows.items():
        print(f"{name:16}" + "".join(f"{row[column]:18.3f}" for column in columns))
    machine = {"jax": jax.__version__, "device": str(jax.devices()[0].device_kind), "cores": os.cpu_count()}
    result = {"settings": asdict(settings), "machine": {**machine, "platform": platform.platform()}, "rows": rows}
    path = Path(__file__).parent / "results" / f"step_time_{settings.shape}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
