"""What the server and its engine do, as Prometheus reads it; knows no HTTP and no model.

The names: `pixtral_…`, in seconds and tokens, as https://prometheus.io/docs/practices/naming/ asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import inf

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from pixtral_cli.engine.driver import Driver

CONTENT_TYPE = CONTENT_TYPE_LATEST
FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
KINDS = {
    401: "authentication",
    403: "permission",
    404: "not_found",
    408: "timeout",
    413: "too_large",
    429: "queue_full",
    499: "client_left",
    503: "unavailable",
}
"""What an error counts as, by its status; "invalid_request" and "server_error" are the rest."""
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)


class Metrics:
    """One server's. Any thread may count, but for `per_token`, which is the event loop's."""

    def __init__(self, driver: Driver) -> None:
        disable_created_metrics()  # a second series for each, of when it began
        self.registry = CollectorRegistry()
        self.registry.register(_EngineState(driver))
        self._requests = Counter("pixtral_requests", "Requests answered.", ("route", "status"), registry=self.registry)
        self._errors = Counter("pixtral_errors", "Requests that failed.", ("kind",), registry=self.registry)
        self.first_token = Histogram(
            "pixtral_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=FIRST_TOKEN,
            registry=self.registry,
        )
        self.per_token = QuickHistogram(
            "pixtral_time_per_token_seconds", "From each token of an answer to the next.", PER_TOKEN
        )
        self.registry.register(self.per_token)

    def answered(self, route: str, status: int) -> None:
        """A request to `route`, one of the server's own or "other", was answered."""
        self._requests.labels(route, status).inc()
        if status >= 400:
            self.failed(status)

    def failed(self, status: int) -> None:
        """A request failed, in a way that has this HTTP status, which a stream can no longer say."""
        self._errors.labels(KINDS.get(status, "invalid_request" if status < 500 else "server_error")).inc()

    def exposition(self) -> bytes:
        """All of it in Prometheus' text format, of type `CONTENT_TYPE`."""
        return generate_latest(self.registry)


class QuickHistogram(Collector):
    """As prometheus_client's, for what is counted with every token: one thread counts, and so it takes no locks."""

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        self.name, self.documentation, self.bounds = name, documentation, bounds
        self._counts, self._sum = [0] * (len(bounds) + 1), 0.0

    def observe(self, amount: float) -> None:
        self._counts[bisect_left(self.bounds, amount)] += 1
        self._sum += amount

    def collect(self) -> Iterator[Metric]:
        bounds = map(floatToGoString, (*self.bounds, inf))
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self.name, self.documentation, buckets, self._sum)


class _EngineState(Collector):
    """Read from the engine when somebody asks: nothing is counted twice, nothing is forgotten."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def collect(self) -> Iterator[Metric]:
        engine, done = self.driver.engine, self.driver.engine.counters
        used = engine.table.in_use / engine.table.count
        yield GaugeMetricFamily("pixtral_requests_running", "Requests being computed.", engine.running)
        yield GaugeMetricFamily("pixtral_requests_queued", "Requests that wait for their turn.", self.driver.waiting)
        yield GaugeMetricFamily("pixtral_kv_cache_used_ratio", "Share of the KV cache that requests hold.", used)
        yield CounterMetricFamily("pixtral_prompt_tokens", "Tokens of prompts.", value=done.prompt_tokens)
        yield CounterMetricFamily(
            "pixtral_cached_tokens", "Tokens of prompts that had been computed before.", value=done.cached_tokens
        )
        yield CounterMetricFamily("pixtral_generated_tokens", "Tokens of answers.", value=done.generated_tokens)
        yield CounterMetricFamily(
            "pixtral_proposed_tokens", "Tokens looked up and computed in advance.", value=done.proposed_tokens
        )
        yield CounterMetricFamily("pixtral_accepted_tokens", "Those of them that came.", value=done.accepted_tokens)
        yield CounterMetricFamily(
            "pixtral_preemptions",
            "Requests put back into the queue because the KV cache was full.",
            value=engine.scheduler.preemptions,
        )
