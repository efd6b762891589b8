"""`comigs serve --monitor`: metrics, the dashboard in a browser, and who may read them."""

import http.client
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from coordinator_help import (
    PATIENCE,
    Fleet,
    Served,
    header,
    invited,
    join_round,
    serve_command,
    train,
)
from prometheus_client.parser import text_string_to_metric_families

from coordinator.administrator import Administrator
from coordinator.monitor import MOST_CONNECTIONS
from edge_runtime.connection import connect
from edge_runtime.errors import AddressError, TrustError
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc

NAMES = ("ada-of-the-lab", "ben-of-the-lab", "cy-of-the-lab")


def monitored(fleet: Fleet, *options: str) -> tuple[Served, str]:
    """A coordinator, and the address of its monitor."""
    served = fleet.serve(fleet.bundle(), "--monitor", "127.0.0.1:0", *options)
    return served, str(served.wait_for("monitoring")["address"])


def get(address: str, path: str) -> bytes:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
        return bytes(answer.read())


def metrics(address: str) -> dict[tuple[str, ...], float]:
    """(name, label values in the order of label names...) -> value."""
    families = text_string_to_metric_families(get(address, "/metrics").decode())
    found = {}
    for sample in (sample for family in families for sample in family.samples):
        labels = {name: label for name, label in sample.labels.items() if name != "cohort"}
        found[sample.name, *(labels[name] for name in sorted(labels))] = sample.value
    return found


def one_round(fleet: Fleet, served: Served) -> None:
    """A round in which one of three is refused and one is silent, and the next one's beginning."""
    bundle = fleet.bundle()
    trio = fleet.enrolled(served, bundle, *NAMES)
    join_round(*trio)
    start = trio[0].download(1)
    assert not trio[1].upload(header(1), b"nonsense").accepted
    assert trio[0].upload(header(1), train(bundle, start, 0, 1)).accepted
    with Administrator(served.administrator()) as administrator:
        administrator.revoke(NAMES[2])
    served.wait_for("round_closed")
    trio[0].check_in(0)


def test_metrics_say_what_happened(fleet: Fleet) -> None:
    served, address = monitored(fleet, "--min-devices", "1")
    one_round(fleet, served)
    (ada,) = fleet.enrolled(served, fleet.bundle(), "ada")
    with connect(ada.who, PATIENCE) as connection:
        stub = coordinator_pb2_grpc.AdminStub(connection.channel)
        with pytest.raises(TrustError):
            connection.retry(lambda: stub.ListDevices(pb.ListDevicesRequest()))
    found = metrics(address)
    assert found["comigs_updates_accepted_total",] == 1
    assert found["comigs_updates_refused_total", "malformed"] == 1
    assert found["comigs_rounds_total", "aggregated"] == 1
    assert found["comigs_round_seconds_count",] == 1
    assert found["comigs_generalist_version",] == 2
    assert found["comigs_enrolments_total",] == 4
    assert found["comigs_calls_total", "PERMISSION_DENIED", "ListDevices"] == 1
    assert found["comigs_calls_total", "OK", "Upload"] == 2
    assert found["comigs_open_calls", "Upload"] == 0
    assert found["comigs_devices_connected",] == 3
    # What devices counted on their side, they and nobody else.
    traffic = [client.traffic for client in fleet._clients]
    assert found["comigs_received_bytes_total",] == sum(count.sent for count in traffic)
    assert found["comigs_sent_bytes_total",] == sum(count.received for count in traffic)
    assert found["process_resident_memory_bytes",] > 10e6
    text = get(address, "/metrics").decode()
    assert "of-the-lab" not in text
    families = list(text_string_to_metric_families(text))
    assert all(family.documentation for family in families if family.name.startswith("comigs"))


def test_the_event_loop_is_measured(fleet: Fleet) -> None:
    _, address = monitored(fleet)
    end = time.monotonic() + 20
    while metrics(address)["comigs_event_loop_lag_seconds_count",] < 2:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_page_is_fed_and_names_nobody(fleet: Fleet) -> None:
    served, address = monitored(fleet, "--min-devices", "1", "--rounds", "7")
    one_round(fleet, served)
    time.sleep(1.1)  # what was read before is kept for a second
    text = get(address, "/overview.json").decode()
    assert "of-the-lab" not in text
    overview = json.loads(text)
    (cohort,) = overview["cohorts"]
    assert (cohort["rounds_wanted"], cohort["ended"]) == (7, {"aggregated": 1})
    first, second = cohort["rounds"]
    outcome = {"participants": 3, "accepted": 1, "without": 1, "silent": 1, "refusals": 1}
    assert {name: first[name] for name in outcome} == outcome
    assert second["status"] == "open"
    assert [generalist["number"] for generalist in cohort["generalists"]] == [1, 2]
    assert overview["tiers"] == [{"tier": "phone-low", "enrolled": 2, "connected": 2}]


def test_a_device_that_is_accepted_after_all_is_counted_once(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served, address = monitored(fleet, "--min-devices", "2")
    ada, ben = fleet.enrolled(served, bundle, "ada", "ben")
    join_round(ada, ben)
    assert not ada.upload(header(1), b"nonsense").accepted
    assert ada.upload(header(1), train(bundle, ada.download(1), 0, 1)).accepted
    (row,) = json.loads(get(address, "/overview.json"))["cohorts"][0]["rounds"]
    outcome = {"participants": 2, "accepted": 1, "without": 0, "silent": 1, "refusals": 1}
    assert {name: row[name] for name in outcome} == outcome


def browser(url: str, directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("there is no chromium on this machine")
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={directory}", "--virtual-time-budget=3000", *options, url]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


def test_the_dashboard_in_a_browser(fleet: Fleet) -> None:
    served, address = monitored(fleet, "--min-devices", "1", "--rounds", "7")
    one_round(fleet, served)
    done = browser(f"http://{address}/", fleet.directory / "browser", "--dump-dom")
    assert "CONSOLE" not in done.stderr, "an error, or something that the page's policy forbids"
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", done.stdout.partition("<body")[2]))
    for shown in (
        "Round 2 open",
        "1 of 7 none abandoned",
        "phone-low 2 of 2",
        "Round 1, aggregated: 1 accepted, 1 refused, 1 without report",
    ):
        assert shown in text, text
    assert "live, " in text
    assert "of-the-lab" not in text


def request(address: str, path: str, host: str, method: str = "GET") -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(address, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host)
    connection.endheaders()
    return connection.getresponse()


def test_what_the_monitor_refuses(fleet: Fleet) -> None:
    served, address = monitored(fleet, "--name", "127.0.0.1", "--name", "lab.test")
    port = address.rpartition(":")[2]
    # A page of elsewhere whose name leads here must not read along.
    for host, status in (
        *((f"127.0.0.1:{port}", 200), (f"localhost:{port}", 200), ("lab.test", 200)),
        *((f"[::1]:{port}", 200), ("evil.test", 421), (f"evil.test:{port}", 421), ("", 421)),
    ):
        assert request(address, "/overview.json", host).status == status, host
    for path in ("/admin.json", "/../state.py", "/%2e%2e/", "//etc/passwd", "/icon.svg/"):
        assert request(address, path, "localhost").status == 404, path
    assert request(address, "/", "localhost", "POST").status == 501
    answer = request(address, "/", "localhost")
    assert "default-src 'none'" in str(answer.getheader("Content-Security-Policy"))
    assert answer.getheader("Access-Control-Allow-Origin") is None

    # Who holds connections open keeps others out for seconds, and devices not at all.
    host, _, number = address.rpartition(":")
    idle = [socket.create_connection((host, int(number))) for _ in range(MOST_CONNECTIONS + 5)]
    invited(served, "ada")
    idle[0].settimeout(30)
    assert idle[0].recv(1) == b"", "it is closed"
    assert request(address, "/", "localhost").status == 200
    for connection in idle:
        connection.close()


def test_an_address_that_is_taken(fleet: Fleet) -> None:
    _, address = monitored(fleet)
    command = serve_command(fleet.bundle().path, fleet.directory / "other", "--monitor", address)
    done = subprocess.run(
        [*command, "--listen", "127.0.0.1:0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == AddressError.code
    assert "choose another --monitor" in " ".join(done.stderr.split())
