"""What the measurements of serving share: a model, adapters by the thousand, requests, and how long they took."""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora.serving import AdapterStore, Engine, Finished


@dataclass
class Asked:
    """A request of a load.

    Attributes:
        prompt: its tokens.
        adapter: the adapter's name.
        count: tokens to write.
        sent, first, ended: when it was sent, when its first token was told, and its end; seconds.
        ids: what was written.
    """

    prompt: list[int]
    adapter: str | None
    count: int
    sent: float = 0.0
    first: float = 0.0
    ended: float = 0.0
    ids: tuple[int, ...] = ()


def adapters(model: Any, params: Any, count: int, rank: int) -> dict[str, Any]:
    """LoRA of the attention's products with random factors, whose changes are as large as those of training."""
    sites = jlora.sites(model.apply, {"params": params}, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    spec = {".*/(q|k|v|o)_proj/kernel": jlora.LoRA(rank)}
    adapted = jlora.adapterize(params, spec, jax.random.key(0), sites)
    leaves, tree = jax.tree.flatten(adapted.params)
    made = {}
    for n in range(count):
        rng = np.random.default_rng(n)
        drawn = [rng.standard_normal(leaf.shape, np.float32) / 8 for leaf in leaves]
        made[f"adapter-{n}"] = adapted.replace(params=jax.tree.unflatten(tree, drawn))
    return made


def filled(model: Any, params: Any, count: int, rank: int, slots: int) -> AdapterStore:
    """A store of so many adapters."""
    store = AdapterStore(model, params, slots=slots, rank=rank, leaves=".*/(q|k|v|o)_proj/kernel", gains=False)
    for name, adapted in adapters(model, params, count, rank).items():
        store.add(name, adapted)
    return store


def requests(seed: int, count: int, names: int, vocabulary: int, prompt: tuple[int, int], tokens: int) -> list[Asked]:
    """Requests with adapters of which each is as likely as another."""
    rng = np.random.default_rng(seed)
    lengths, chosen = rng.integers(*prompt, count), rng.integers(names, size=count)
    return [
        Asked(rng.integers(3, vocabulary, int(length)).tolist(), f"adapter-{n}", tokens)
        for length, n in zip(lengths, chosen)
    ]


def send(engine: Engine, asked: Asked, done: queue.Queue[Asked]) -> None:
    """Sends a request; when it has ended, it is put into `done`."""
    told: list[int] = []
    asked.sent = time.perf_counter()

    def listen(what: Any) -> None:
        now = time.perf_counter()
        if isinstance(what, Finished):
            if what.reason not in ("length", "stop"):
                raise RuntimeError(f"a request ended by {what}")
            asked.ended, asked.ids = now, tuple(told)
            done.put(asked)
        else:
            asked.first = asked.first or now
            told.append(what.id)

    engine.submit(asked.prompt, adapter=asked.adapter, max_new_tokens=asked.count, listen=listen)


def together(engine: Engine, load: list[Asked]) -> float:
    """Seconds for requests that are all sent at once."""
    done: queue.Queue[Asked] = queue.Queue()
    start = time.perf_counter()
    for asked in load:
        send(engine, asked, done)
    for _ in load:
        done.get(timeout=600)
    return time.perf_counter() - start


def by_adapter(engine: Engine, load: list[Asked]) -> float:
    """Seconds for requests of which only those of one adapter run at a time."""
    groups: dict[str | None, list[Asked]] = {}
    for asked in load:
        groups.setdefault(asked.adapter, []).append(asked)
    return sum(together(engine, group) for group in groups.values())


def arriving(engine: Engine, load: list[Asked], rate: float, seed: int) -> list[Asked]:
    """Requests that arrive at random, so many a second on average."""
    done: queue.Queue[Asked] = queue.Queue()
    for asked, pause in zip(load, np.random.default_rng(seed).exponential(1 / rate, len(load))):
        time.sleep(pause)
        send(engine, asked, done)
    return [done.get(timeout=600) for _ in load]


def memory() -> float:
    """MiB of this process that are in memory."""
    status = Path("/proc/self/status").read_text("utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024
