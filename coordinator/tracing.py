"""Traces of calls and rounds, sent to an OpenTelemetry collector.

One span per gRPC call, with its method and status, and one per round, from its opening to its end,
with an event for each update. Spans name no device.
"""

from __future__ import annotations

from typing import Any

import grpc
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from coordinator.calls import Call
from coordinator.metrics import VERSION

EXPORT_SECONDS = 5.0
# Calls that end so are the coordinator's fault.
FAULTS = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE}


class Tracing:
    """Is told of events and of calls. Sends in a thread of its own; drops what is too much."""

    def __init__(self, endpoint: str) -> None:
        """
        Args:
            endpoint: of OTLP over gRPC, such as http://127.0.0.1:4317; https for TLS.
        """
        resource = Resource.create(
            {"service.name": "comigs-coordinator", "service.version": VERSION}
        )
        self._provider = TracerProvider(resource=resource)
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("comigs.coordinator")
        # The open round of each cohort.
        self._rounds: dict[str, Span] = {}

    def close(self) -> None:
        """Sends what is left. Blocks, for some seconds if nobody answers."""
        for span in self._rounds.values():
            span.end()
        self._provider.shutdown()

    def observe(self, event: str, fields: dict[str, Any]) -> None:
        """Takes the coordinator's events."""
        cohort = fields.get("cohort", "")
        if event in ("round_opened", "round_resumed"):
            attributes = {"comigs.round": fields["round"], "comigs.cohort": cohort}
            self._rounds[cohort] = self._tracer.start_span("round", attributes=attributes)
        elif event in ("round_closed", "round_abandoned"):
            self._end_round(cohort, event.removeprefix("round_"), fields)
        elif cohort in self._rounds and event in ("update_accepted", "update_refused"):
            known = {
                f"comigs.{name}": str(fields[name]) for name in ("bytes", "kind") if name in fields
            }
            self._rounds[cohort].add_event(event, known)

    def _end_round(self, cohort: str, outcome: str, fields: dict[str, Any]) -> None:
        span = self._rounds.pop(cohort, None)
        if span is None:
            return  # it never opened
        span.set_attributes({"comigs.outcome": outcome, "comigs.updates": fields["updates"]})
        if outcome == "abandoned":
            span.set_status(Status(StatusCode.ERROR, fields["reason"]))
        span.end()

    def ended(self, call: Call) -> None:
        """Takes every call that has ended."""
        span = self._tracer.start_span(
            f"{call.service}/{call.method}",
            kind=SpanKind.SERVER,
            start_time=int(1e9 * call.started),
            attributes={
                "rpc.system": "grpc",
                "rpc.service": call.service,
                "rpc.method": call.method,
                "rpc.grpc.status_code": call.code.value[0],
            },
        )
        if call.code in FAULTS:
            span.set_status(Status(StatusCode.ERROR, call.code.name))
        span.end(int(1e9 * (call.started + call.seconds)))
