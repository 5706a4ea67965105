"""What tracing a lifted training step costs beside tracing the plain one.

    python experiments/benchmarks/trace_time.py

Both steps are of the same Llama (unrolled and scanned layers): forward, backward and AdamW. The plain step trains every
leaf; the lifted one trains LoRA on all linear weights. Variants are interleaved; medians and their ratio are printed and
written to results/trace_time.json. Target: at most twice.
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import jlora
from jlora.models import Llama, LlamaConfig


@dataclass(frozen=True)
class Settings:
    layers: int = 6
    width: int = 64
    repeats: int = 9


def model(settings: Settings, scan: bool) -> Llama:
    return Llama(
        LlamaConfig(
            vocab_size=128,
            hidden_size=settings.width,
            intermediate_size=3 * settings.width,
            num_hidden_layers=settings.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=settings.width // 4,
            max_position_embeddings=128,
            rms_norm_eps=1e-5,
            scan_layers=scan,
            remat=scan,
        )
    )


def step_of(apply, tx, wrap):
    def step(params, state, tokens):
        def loss(p):
            logits = apply({"params": wrap(p)}, tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def steps(settings: Settings, scan: bool) -> dict:
    """{name: (step, params, state, tokens)}, all as shapes."""
    net = model(settings, scan)
    tokens = jnp.zeros((2, 16), jnp.int32)
    params = net.init(jax.random.key(0), tokens)["params"]
    report = jlora.sites(net.apply, {"params": params}, tokens)
    adapted = jlora.adapterize(params, {jlora.ALL_LINEAR: jlora.LoRA(4)}, sites=report)
    plain_tx, lora_tx = optax.adamw(1e-3), jlora.optimizer(adapted, optax.adamw, 1e-3)
    lifted = step_of(jlora.lift(net.apply), lora_tx, lambda p: adapted.replace(params=p))
    return {
        "plain": (step_of(net.apply, plain_tx, lambda p: p), params, plain_tx.init(params), tokens),
        "lifted": (lifted, adapted.params, lora_tx.init(adapted.params), tokens),
    }


def trace_seconds(step, *args) -> float:
    jax.clear_caches()
    start = time.perf_counter()
    jax.make_jaxpr(step)(*args)
    return time.perf_counter() - start


def main(settings: Settings = Settings()) -> None:
    results = {"jax": jax.__version__, "settings": asdict(settings), "milliseconds": {}}
    for scan in (False, True):
        variants = steps(settings, scan)
        times = {name: [] for name in variants}
        for _ in range(settings.repeats):
            for name, (step, *args) in variants.items():
                times[name].append(1e3 * trace_seconds(step, *args))
        medians = {name: statistics.median(values) for name, values in times.items()}
        label = "scanned" if scan else "unrolled"
        results["milliseconds"][label] = {**medians, "ratio": medians["lifted"] / medians["plain"]}
        print(
            label,
            {name: round(value) for name, value in medians.items()},
            f"ratio {medians['lifted'] / medians['plain']:.2f}",
        )
    path = Path(__file__).parent / "results" / "trace_time.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
