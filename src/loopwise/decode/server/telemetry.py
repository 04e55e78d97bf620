"""Counters of a server in the form that Prometheus reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from loopwise.decode.server.reply import Reply

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
# Name of the metric, what the engine calls it, what it is.
_COUNTERS = (
    ("loopwise_engine_ticks", "ticks", "steps of the engine"),
    ("loopwise_engine_tokens", "tokens", "tokens that were made"),
    ("loopwise_core_runs", "core_runs", "runs of one iteration for new tokens"),
    ("loopwise_row_iterations_executed", "executed_row_iterations", "rows in those runs"),
    ("loopwise_row_iterations_useful", "useful_row_iterations", "those of them that a live request needed"),
    ("loopwise_prompt_iterations_executed", "prompt_executed_iterations", "iterations of tokens of prompts, padded"),
    ("loopwise_prompt_iterations_useful", "prompt_useful_iterations", "those of them that were not padding"),
)
_GAUGES = (
    ("loopwise_slots", "max_requests", "slots for requests"),
    ("loopwise_slots_in_use", "slots_in_use", "slots that hold a request"),
    ("loopwise_slot_tokens", "capacity", "tokens of a slot, prompt and answer together"),
    ("loopwise_cache_bytes", "cache_bytes", "bytes of keys and values"),
)


class _EngineCollector(Collector):
    """Reads the engine's counters when they are asked for."""

    def __init__(self, stats: Callable[[], dict[str, Any]]):
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, key, text in _COUNTERS:
            yield CounterMetricFamily(name, text, value=stats.get(key, 0))
        for name, key, text in _GAUGES:
            yield GaugeMetricFamily(name, text, value=stats.get(key, 0))
        queues = GaugeMetricFamily("loopwise_queue_requests", "requests by what they wait for", labels=["queue"])
        for queue, length in stats.get("queues", {}).items():
            queues.add_metric([queue], length)
        yield queues


class Metrics:
    """All counters of one server.

    Args:
        stats: gives the engine's counters.
    """

    def __init__(self, stats: Callable[[], dict[str, Any]]):
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(stats))
        self.http = Counter("loopwise_http_requests", "HTTP requests", ["path", "status"], registry=self.registry)
        self.outcomes = Counter(
            "loopwise_replies", "prompts by how their reply ended", ["outcome"], registry=self.registry
        )
        self.prompt_tokens = Counter("loopwise_prompt_tokens", "tokens of prompts", registry=self.registry)
        self.seconds = Histogram(
            "loopwise_request_seconds", "from the request to its last token", buckets=_SECONDS, registry=self.registry
        )
        self.first_token = Histogram(
            "loopwise_first_token_seconds",
            "from the request to its first token",
            buckets=_SECONDS,
            registry=self.registry,
        )

    def ended(self, reply: Reply, outcome: str) -> None:
        """Count a reply that has ended."""
        self.outcomes.labels(outcome).inc(len(reply.parts))
        if outcome == "refused":
            return
        self.prompt_tokens.inc(reply.prompt_tokens)
        self.seconds.observe(reply.seconds)
        if reply.first_token_seconds is not None:
            self.first_token.observe(reply.first_token_seconds)

    def text(self) -> bytes:
        """All of them, as Prometheus reads it."""
        return generate_latest(self.registry)


class Counted:
    """ASGI middleware that counts responses by path and status.

    Args:
        app: the application.
        metrics: where to count.
        paths: those that are counted by name; all others together.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Sequence[str]):
        self.app, self.metrics, self.paths = app, metrics, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and look at the status on its way back."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self.paths else "other"
                self.metrics.http.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)
