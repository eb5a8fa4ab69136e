"""What one replica counts of itself, in Prometheus' text format."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import SummaryMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

Outcome = Literal["answered", "refused", "unsafe", "failed"]
Stage = Literal["request", "forward"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
_WINDOW = 1000
_QUANTILES = (0.5, 0.9, 0.99)


class Metrics:
    """Counters of one replica; every sample carries its name, because a scrape reaches one replica of several."""

    def __init__(self, replica: str) -> None:
        # Its own: in prometheus_client's global one a second replica of a process could not register the same names.
        self._registry = CollectorRegistry()
        self._latency = _Latency(replica)
        self._registry.register(self._latency)
        self._requests = Counter(
            "maps_ray_requests",
            "Observations by protocol and by what became of them.",
            ["replica", "protocol", "outcome"],
            registry=self._registry,
        )
        self._rows = Histogram(
            "maps_ray_forward_rows",
            "Observations in one forward pass.",
            ["replica"],
            buckets=(1, 2, 4, 8, 16, 32),
            registry=self._registry,
        ).labels(replica)
        self.connections = Gauge(
            "maps_ray_connections", "Open websocket connections.", ["replica"], registry=self._registry
        ).labels(replica)
        self._replica = replica

    def count(self, protocol: Literal["http", "websocket"], outcome: Outcome) -> None:
        """Counts one observation."""
        self._requests.labels(self._replica, protocol, outcome).inc()

    def forward(self, rows: int, seconds: float) -> None:
        """Notes one forward pass."""
        self._rows.observe(rows)
        self._latency.observe("forward", seconds)

    def request(self, began: float) -> None:
        """Notes one answered observation; `began` is `time.monotonic` when it came in."""
        self._latency.observe("request", time.monotonic() - began)

    def text(self) -> bytes:
        """The page for Prometheus."""
        return generate_latest(self._registry)


class _Latency(Collector):
    """Quantiles over the last observations, which prometheus_client's own summary does not give."""

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._recent: dict[Stage, deque[float]] = {}
        self._count: dict[Stage, int] = {}
        self._sum: dict[Stage, float] = {}

    def observe(self, stage: Stage, seconds: float) -> None:
        self._recent.setdefault(stage, deque(maxlen=_WINDOW)).append(seconds)
        self._count[stage] = self._count.get(stage, 0) + 1
        self._sum[stage] = self._sum.get(stage, 0.0) + seconds

    def collect(self) -> Iterator[SummaryMetricFamily]:
        text = f"Seconds from observation to answer, and of forward passes; quantiles over the last {_WINDOW}."
        family = SummaryMetricFamily("maps_ray_latency_seconds", text, labels=["replica", "stage"])
        for stage, recent in self._recent.items():
            ordered = sorted(recent)
            labels = {"replica": self._replica, "stage": stage}
            for quantile in _QUANTILES:
                # The nearest rank: a latency that was seen.
                value = ordered[max(math.ceil(quantile * len(ordered)) - 1, 0)]
                family.add_sample("maps_ray_latency_seconds", {**labels, "quantile": str(quantile)}, value)
            family.add_metric([self._replica, stage], self._count[stage], self._sum[stage])
        yield family
