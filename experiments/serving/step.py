"""A decoding step whose rows have an adapter each, beside the same step of the base alone."""

from __future__ import annotations

import statistics
import time

import jax
import numpy as np

from jlora import models
from jlora.serving import AdapterStore, Engine

#: A decoder of 23 million parameters with random values: what a step costs does not depend on them.
SHAPE = models.LlamaConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1376,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
)


def sizes(tree) -> int:
    """Bytes of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def step(rows: int, rank: int, leaves: str, length: int = 128, rounds: int = 30) -> dict[str, float]:
    """The time of a step over that of the base alone, by turns, and the same of the bytes that both must read.

    The bound counts each parameter, each row's adapter and its part of the cache once.
    """
    model = models.Llama(SHAPE)
    params = model.init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    store = AdapterStore(model, params, rank=rank, leaves=leaves, gains=False)
    engines = [Engine(model, params, rows=rows, length=length, chunk=16, adapters=each) for each in (None, store)]
    calls = []
    for engine in engines:
        engine._loop.warm()
        calls.append(_call(engine._loop))
    for call in calls:
        call()
    times = [[_timed(call) for call in calls] for _ in range(rounds)]
    loops = [engine._loop for engine in engines]
    base = sizes(params) + sizes(loops[0]._device.cache)
    adapters = sizes(loops[1]._params.params)
    return {
        "time": statistics.median(with_ / without for without, with_ in times),
        "bytes": (base + adapters) / base,
        "adapters": adapters / 2**20,
        "base": base / 2**20,
    }


def _call(loop):
    def call() -> None:
        loop._device, _ = loop._programs.decode(loop._params, loop._device, loop._on_device())
        jax.block_until_ready(loop._device)

    return call


def _timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
