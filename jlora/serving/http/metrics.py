"""What a server does, in numbers, as Prometheus reads them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from jlora.serving.engine import Engine

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_GAUGES = {
    "rows": ("rows", "Requests that can run at once"),
    "running": ("requests_running", "Requests that run"),
    "waiting": ("requests_waiting", "Requests in the queue"),
    "adapters": ("adapters", "Adapters in host memory"),
    "resident": ("adapters_resident", "Adapters with arrays on the device"),
    "programs": ("programs", "Programs that were compiled; stays the same after the start"),
}
_COUNTERS = {
    "requests": ("requests", "Requests that the engine took"),
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts that were read"),
    "tokens": ("generation_tokens", "Tokens that were written"),
    "steps": ("decode_steps", "Decoding steps of all rows"),
    "chunks": ("prompt_chunks", "Chunks of prompts that were read"),
    "swaps": ("adapter_swaps", "Adapters that were written into a row"),
    "loads": ("adapter_loads", "Adapters that were moved to the device"),
}


class Metrics:
    """The numbers of one server."""

    def __init__(self, engine: Engine):
        self._registry = CollectorRegistry()
        self._registry.register(_OfEngine(engine))  # type: ignore[arg-type]
        counted: dict[str, Any] = {"registry": self._registry, "namespace": "jlora"}
        self.calls = Counter("http_requests", "Calls, by route and status", ("route", "status"), **counted)
        self._models = (
            Counter("model_requests", "Calls, by model", ("model",), **counted),
            Counter("model_generation_tokens", "Tokens that were written, by model", ("model",), **counted),
        )
        self.first = Histogram(
            "time_to_first_token_seconds", "From a call to the first text of its answer", buckets=_SECONDS, **counted
        )
        self.seconds = Histogram("request_seconds", "From a call to the end of its answer", buckets=_SECONDS, **counted)

    def of(self, model: str) -> tuple[Any, Any]:
        """The counters of calls and of tokens of a model."""
        calls, tokens = (counter.labels(model) for counter in self._models)
        return calls, tokens

    def forget(self, model: str) -> None:
        """Takes the counters of a model away that is no more."""
        for counter in self._models:
            with contextlib.suppress(KeyError):  # nobody called it
                counter.remove(model)

    def text(self) -> bytes:
        """All numbers, in Prometheus' text format."""
        return generate_latest(self._registry)


class _OfEngine:
    """The engine's own numbers, asked for when somebody reads them."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Any]:
        state = self._engine.state()
        for field, (name, what) in _GAUGES.items():
            yield GaugeMetricFamily(f"jlora_{name}", what, value=getattr(state, field))
        for field, (name, what) in _COUNTERS.items():
            yield CounterMetricFamily(f"jlora_{name}", what, value=getattr(state, field))
        ended = CounterMetricFamily("jlora_requests_finished", "Requests that have ended, by reason", labels=["reason"])
        for reason, count in state.finished.items():
            ended.add_metric([reason], count)
        yield ended
        yield GaugeMetricFamily("jlora_up", "1 where new requests are taken, else 0", value=float(state.open))
