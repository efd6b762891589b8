"""`comigs serve --traces`: what reaches a collector."""

import queue
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from coordinator_help import Fleet, header, join_round, serve_command, train
from opentelemetry.proto.collector.trace.v1 import (
    trace_service_pb2,
    trace_service_pb2_grpc,
)

from edge_runtime.errors import MissingPartError


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what is exported to it."""

    def __init__(self) -> None:
        self.spans: queue.Queue[Any] = queue.Queue()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.put((resource.resource, span))
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    server = grpc.server(ThreadPoolExecutor(2))
    collector = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield collector, f"http://127.0.0.1:{port}"
    server.stop(0)


def values(attributes: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in attributes}


def test_calls_and_rounds_reach_a_collector(fleet: Fleet, collector: tuple[Collector, str]) -> None:
    bundle = fleet.bundle()
    received, url = collector
    served = fleet.serve(bundle, "--min-devices", "1", "--rounds", "2", "--traces", url)
    ada, ben = fleet.enrolled(served, bundle, "ada-of-the-lab", "ben-of-the-lab")
    join_round(ada, ben)
    start = ada.download(1)
    assert not ben.upload(header(1), b"nonsense").accepted
    assert ada.upload(header(1), train(bundle, start, 0, 1)).accepted
    served.wait_for("round_closed")
    served.stop()  # sends what is left

    spans = [received.spans.get_nowait() for _ in range(received.spans.qsize())]
    resource = values(spans[0][0].attributes)
    assert resource["service.name"] == "comigs-coordinator"
    calls = [span for _, span in spans if span.name == "comigs.v1.Coordinator/Upload"]
    assert [values(call.attributes)["rpc.grpc.status_code"] for call in calls] == [0, 0]
    assert all(call.end_time_unix_nano > call.start_time_unix_nano for call in calls)
    first, *_ = (span for _, span in spans if span.name == "round")
    attributes = values(first.attributes)
    assert (attributes["comigs.round"], attributes["comigs.updates"]) == (1, 1)
    assert attributes["comigs.outcome"] == "closed"
    assert [event.name for event in first.events] == ["update_refused", "update_accepted"]
    assert "of-the-lab" not in str(spans)


def test_nobody_at_the_other_end_holds_nothing_up(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--min-devices", "1", "--traces", "http://127.0.0.1:1")
    (ada,) = fleet.enrolled(served, bundle, "ada")
    join_round(ada)
    assert ada.upload(header(1), train(bundle, ada.download(1), 0, 1)).accepted
    served.wait_for("round_closed")
    assert served.stop()


@pytest.mark.parametrize(
    "url", ["collector:4317", "ftp://collector:4317", "http://:4317", "http://a:b", "http://a/v1"]
)
def test_what_is_no_address_of_a_collector_is_refused(fleet: Fleet, url: str) -> None:
    served = fleet.serve(fleet.bundle(), "--traces", url)
    assert served.process.wait(timeout=30) == 2
    assert "no address of a collector" in " ".join(served.stderr().split())
    assert not fleet.state.exists()


def test_without_its_packages_the_extra_is_named(fleet: Fleet) -> None:
    command = serve_command(fleet.bundle().path, fleet.state, "--listen", "127.0.0.1:0")
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        f"sys.argv[1:] = {[*command[3:], '--traces', 'http://127.0.0.1:4317']}\n"
        "from edge_runtime.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == MissingPartError.code
    assert "comigs[tracing]" in done.stderr
