"""The coordinator in numbers, for Prometheus. docs/coordinator.md lists them.

Labels have few values, and none of them is chosen by a device: no metric names one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from coordinator.calls import Call
from coordinator.overview import Live

# How often it is looked whether the event loop is late.
LAG_SECONDS = 0.25
LAG_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
CALL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120)
ROUND_BUCKETS = (1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600, 4 * 3600, 24 * 3600)


class Metrics:
    """Counts from the start of the process. Is told of events and of calls."""

    def __init__(self, live: Live) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(_Live(live))
        info = Info("comigs_build", "Version of the coordinator.", registry=self.registry)
        info.info({"version": VERSION})

        self._round = self._gauge(
            "comigs_round", "Number of the open round, or of the last one that was.", ["cohort"]
        )
        self._generalist = self._gauge(
            "comigs_generalist_version",
            "Number of the round that starts from the present generalist.",
            ["cohort"],
        )
        self._rounds = self._counter(
            "comigs_rounds", "Rounds that ended, by how.", ["cohort", "outcome"]
        )
        self._round_seconds = Histogram(
            "comigs_round_seconds",
            "From the opening of a round to its end, if it was aggregated.",
            ["cohort"],
            buckets=ROUND_BUCKETS,
            registry=self.registry,
        )
        self._accepted = self._counter("comigs_updates_accepted", "Updates that count.", ["cohort"])
        self._refused = self._counter(
            "comigs_updates_refused", "Updates that do not count, by why.", ["cohort", "reason"]
        )
        self._clipped = self._counter(
            "comigs_updates_clipped", "Updates whose step was shortened.", ["cohort"]
        )
        self._clipped_coordinates = self._counter(
            "comigs_coordinates_clipped",
            "Coordinates of masked steps that were too large for secure aggregation.",
            ["cohort"],
        )
        self._perplexity = self._gauge(
            "comigs_generalist_perplexity",
            "Of the present generalist on the quality gate's text, if there is a gate.",
            ["cohort"],
        )
        self._epsilon = self._gauge(
            "comigs_privacy_epsilon",
            "Epsilon of the rounds so far, with differential privacy.",
            ["cohort"],
        )
        self._budget = self._gauge(
            "comigs_privacy_budget", "The largest epsilon that is allowed, if any.", ["cohort"]
        )
        # Events that are only counted.
        self._counted = {
            "device_enrolled": self._counter(
                "comigs_enrolments", "Invitations that were used.", []
            ),
            "shares_refused": self._counter(
                "comigs_shares_refused",
                "Devices that dealt out or revealed false shares in secure aggregation.",
                [],
            ),
            "storage_failed": self._counter(
                "comigs_storage_failures", "Times that the state could not be written.", []
            ),
            "upload_broken": self._counter(
                "comigs_uploads_broken",
                "Uploads that ended before all was there, which devices go on with.",
                [],
            ),
        }
        self._calls = self._counter(
            "comigs_calls", "gRPC calls that ended, by status code.", ["method", "code"]
        )
        self._call_seconds = Histogram(
            "comigs_call_seconds",
            "How long gRPC calls took. CheckIn includes the waiting that the device asked for.",
            ["method"],
            buckets=CALL_BUCKETS,
            registry=self.registry,
        )
        self._lag = Histogram(
            "comigs_event_loop_lag_seconds",
            "How much later than due the event loop ran a timer.",
            buckets=LAG_BUCKETS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)

    def begin(self, number: int, cohort: str = "") -> None:
        """Round `number` is the current one as the coordinator starts."""
        self._generalist.labels(cohort).set(number)

    async def watch_loop(self) -> None:
        """Measures the event loop that it runs in, until it is cancelled."""
        while True:
            due = time.monotonic() + LAG_SECONDS
            await asyncio.sleep(LAG_SECONDS)
            self._lag.observe(max(0.0, time.monotonic() - due))

    def observe(self, event: str, fields: dict[str, Any]) -> None:
        """Takes the coordinator's events."""
        cohort = fields.get("cohort", "")
        if event in self._counted:
            self._counted[event].inc()
        if "epsilon" in fields:
            self._epsilon.labels(cohort).set(fields["epsilon"])
            if fields.get("budget") is not None:
                self._budget.labels(cohort).set(fields["budget"])
        match event:
            case "quality_measured":
                self._perplexity.labels(cohort).set(fields["perplexity"])
            case "round_opened" | "round_resumed":
                self._round.labels(cohort).set(fields["round"])
                self._generalist.labels(cohort).set(fields["round"])
            case "round_closed":
                self._rounds.labels(cohort, "aggregated").inc()
                self._round_seconds.labels(cohort).observe(fields["seconds"])
                self._clipped.labels(cohort).inc(fields["clipped"])
                self._clipped_coordinates.labels(cohort).inc(fields["clipped_coordinates"])
                self._generalist.labels(cohort).set(fields["round"] + 1)
                if "perplexity" in fields:
                    self._perplexity.labels(cohort).set(fields["perplexity"]["candidate"])
            case "round_abandoned":
                self._rounds.labels(cohort, "abandoned").inc()
            case "rolled_back":
                self._generalist.labels(cohort).set(fields["round"])
                with contextlib.suppress(KeyError):  # until the gate has looked at that one again
                    self._perplexity.remove(cohort)
            case "update_accepted":
                self._accepted.labels(cohort).inc()
            case "update_refused":
                self._refused.labels(cohort, fields["kind"]).inc()

    def ended(self, call: Call) -> None:
        """Takes every call that has ended."""
        self._calls.labels(call.method, call.code.name).inc()
        self._call_seconds.labels(call.method).observe(call.seconds)

    def _gauge(self, name: str, text: str, labels: list[str]) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)


class _Live(Collector):
    """What others count already."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "comigs_received_bytes",
            "Serialized gRPC messages from devices, without TLS and HTTP/2 framing.",
            self._live.traffic.received,
        )
        yield CounterMetricFamily(
            "comigs_sent_bytes", "The same to devices.", self._live.traffic.sent
        )
        streams = GaugeMetricFamily(
            "comigs_open_calls", "gRPC calls that are being answered.", labels=["method"]
        )
        for (_, method), count in list(self._live.calls.open.items()):
            streams.add_metric([method], count)
        yield streams
        yield GaugeMetricFamily(
            "comigs_devices_connected",
            "Devices with a call open, or made in the last 35 seconds. One that trains makes none.",
            len(self._live.connected()),
        )


def _version() -> str:
    try:
        return version("comigs")
    except PackageNotFoundError:
        return "unknown"


VERSION = _version()
