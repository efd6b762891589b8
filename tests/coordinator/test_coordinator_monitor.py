"""`comigs serve --monitor`: metrics, the dashboard in a browser, and who may read them."""

import contextlib
import http.client
import json
import math
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from coordinator_help import (
    PATIENCE,
    TIMEOUT,
    Fleet,
    Served,
    header,
    invited,
    join_round,
    serve_command,
    train,
    until,
)
from prometheus_client.parser import text_string_to_metric_families

from coordinator import listing
from coordinator import monitor as monitor_module
from coordinator.administrator import Administrator
from coordinator.audit import LOG, AuditLog, Auditor
from coordinator.calls import Calls
from coordinator.commands import _json_line
from coordinator.metrics import Metrics
from coordinator.monitor import MOST_CONNECTIONS, Monitor
from coordinator.overview import Live, Overview
from coordinator.state import State
from coordinator.tables import Settings
from edge_runtime.cli import emit
from edge_runtime.connection import Traffic, connect
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


def shown(address: str, **last: Any) -> Any:
    """What the page gets once that is so of the last round: what it read is kept for a second."""
    end = time.monotonic() + TIMEOUT
    while True:
        overview = json.loads(get(address, "/overview.json"))
        if last.items() <= overview["cohorts"][0]["rounds"][-1].items():
            return overview
        assert time.monotonic() < end
        time.sleep(0.05)


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
    refused = ("comigs_calls_total", "PERMISSION_DENIED", "ListDevices")
    until(lambda: refused in metrics(address), "a call is counted when it has ended")
    found = metrics(address)
    assert found["comigs_updates_accepted_total",] == 1
    assert found["comigs_updates_refused_total", "malformed"] == 1
    assert found["comigs_rounds_total", "aggregated"] == 1
    assert found["comigs_round_seconds_count",] == 1
    assert found["comigs_generalist_version",] == 2
    assert found["comigs_enrolments_total",] == 4
    assert found[refused] == 1
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
    overview = shown(address, round=2, status="open")
    assert "of-the-lab" not in json.dumps(overview)
    (cohort,) = overview["cohorts"]
    assert (cohort["rounds_wanted"], cohort["ended"]) == (7, {"aggregated": 1})
    first, second = cohort["rounds"]
    outcome = {"participants": 3, "accepted": 1, "without": 1, "silent": 1, "refusals": 1}
    assert {name: first[name] for name in outcome} == outcome
    assert second["participants"] == 1
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


def test_a_slow_device_of_asynchronous_rounds_is_no_drop_out(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served, address = monitored(fleet, "--asynchronous", "1", "--max-staleness", "1")
    ada, ben, cy = fleet.enrolled(served, bundle, "ada", "ben", "cy")
    join_round(ada, ben, cy)
    for client in (ada, ben):
        assert client.upload(header(1), train(bundle, client.download(1), 0, 1)).accepted
    served.wait_for("round_closed", round=2)

    rows = shown(address, round=3)["cohorts"][0]["rounds"]
    assert [row["accepted"] for row in rows] == [1, 1, 0]
    assert [row.accepted for row in listing.rounds(fleet.state)] == [1, 1, 0]
    # What started in round 1 could count in round 2, and cannot in round 3.
    assert [row["silent"] for row in rows] == [1, 0, 0]


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


def test_what_is_reported_is_shown_and_no_markup_is_read(tmp_path: Path) -> None:
    row = {"status": "aggregated", "opened_at": 1.0, "closed_at": 2.0, "deadline": 9.0}
    row |= {"seconds": 1.0, "aggregation": "mean", "paused": False, "rolled_back_to": None}
    row |= {"participants": 2, "accepted": 2, "without": 0, "silent": 0, "refusals": 0}
    row |= {"clipped": 1, "clipped_coordinates": 4321}
    rounds = [
        row | {"round": 1, "done": 0, "reason": None, "perplexity": 512.25},
        row | {"round": 2, "done": 1, "reason": "<i>worse</i>", "perplexity": 640.5}
        | {"status": "abandoned"},
        row | {"round": 3, "done": 1, "reason": None, "perplexity": None}
        | {"status": "open", "closed_at": None},
    ]  # fmt: skip
    cohort = {"name": "<b>c</b>", "rounds_wanted": 3, "min_devices": 2, "rounds": rounds}
    cohort |= {"ended": {"aggregated": 1, "abandoned": 1}, "generalists": []}
    cohort |= {"privacy": {"epsilon": 3.14159, "delta": 1e-5, "budget": 8.0}}
    overview = {"time": 3.0, "started": 0.0, "open_calls": 1, "cohorts": [cohort]}
    overview |= {"tiers": [{"tier": "<script>alert(1)</script>", "enrolled": 2, "connected": 1}]}
    overview |= {"traffic": {"received": 10, "sent": 20, "samples": []}}
    monitor = Monitor("127.0.0.1", 0, names=(), metrics=lambda: b"", overview=lambda: overview)
    with contextlib.closing(monitor):
        done = browser(f"http://{monitor.address}/", tmp_path / "browser", "--dump-dom")
    assert "CONSOLE" not in done.stderr
    body = done.stdout.partition("<main>")[2].partition("</main>")[0]
    for shown in (
        *("ε 3.14 spent", "of 8<", "Refused as worse: 640.50 in round 2", "Round 1: 512.25"),
        "mean; steps clipped: 1; coordinates clipped: 4321<",
        *("&lt;i&gt;worse&lt;/i&gt;", "&lt;script&gt;alert(1)&lt;/script&gt;", "1 of 2"),
    ):
        assert shown in body, body
    assert "<script" not in body


def test_a_perplexity_beyond_floats_is_null(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One device's update is enough for it, and `Infinity` is no JSON: no browser reads it."""

    def strictly(text: str | bytes) -> dict[str, Any]:
        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} in {text!r}")

        read: dict[str, Any] = json.loads(text, parse_constant=refuse)
        return read

    fields = {"cohort": "", "perplexity": {"incoming": 512.25, "candidate": math.inf}}
    expected = {"incoming": 512.25, "candidate": None}
    monitor = Monitor("127.0.0.1", 0, names=(), metrics=lambda: b"", overview=lambda: fields)
    with contextlib.closing(monitor):
        page = urllib.request.urlopen(f"http://{monitor.address}/overview.json").read()
    assert strictly(page)["perplexity"] == expected
    with contextlib.closing(AuditLog(tmp_path)) as log:
        log.append([("round_abandoned", "coordinator", fields)])
    assert strictly((tmp_path / LOG).read_text())["perplexity"] == expected
    assert strictly(_json_line("round_abandoned", fields))["perplexity"] == expected
    emit(fields)
    assert strictly(capsys.readouterr().out)["perplexity"] == expected


def test_the_latest_privacy_spent_is_kept(tmp_path: Path) -> None:
    with (
        contextlib.closing(State(tmp_path)) as whole,
        contextlib.closing(AuditLog(tmp_path)) as log,
    ):
        settings = Settings(contract_sha256="", rounds=3, min_devices=2, deadline_seconds=9.0)
        settings.recipe = settings.training = ""
        whole.of("c").begin(settings, b"a generalist")
        auditor = Auditor(log)
        live = Live(calls=Calls(auditor), traffic=Traffic())
        overview, metrics = Overview(tmp_path, live), Metrics(live)
        for epsilon in (1.5, 2.5):
            spent = {"round": 1, "epsilon": epsilon, "delta": 1e-6, "budget": 8.0}
            for observer in (overview, metrics):
                observer.observe("privacy_spent", spent)
        (cohort,) = overview()["cohorts"]
        assert cohort["privacy"] == {"epsilon": 2.5, "delta": 1e-6, "budget": 8.0}
        assert b'comigs_privacy_epsilon{cohort=""} 2.5' in metrics.text()
        auditor.close()


def request(address: str, path: str, host: str, method: str = "GET") -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(address, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host)
    connection.endheaders()
    return connection.getresponse()


def test_what_the_monitor_refuses(fleet: Fleet) -> None:
    served, address = monitored(fleet, "--name", "127.0.0.1", "--name", "Lab.test")
    port = address.rpartition(":")[2]
    # A page of elsewhere whose name leads here must not read along.
    for host, status in (
        *((f"127.0.0.1:{port}", 200), (f"localhost:{port}", 200), ("lab.test", 200)),
        *((f"LAB.test:{port}", 200), ("Localhost", 200)),
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


def test_whoever_talks_slowly_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "LONGEST_SECONDS", 1.0)
    monitor = Monitor("127.0.0.1", 0, names=(), metrics=lambda: b"", overview=dict)
    with contextlib.closing(monitor):
        host, _, port = monitor.address.rpartition(":")
        with socket.create_connection((host, int(port))) as slow:

            def talk() -> None:
                slow.sendall(b"GET / HTTP/1.1\r\nX: ")
                end = time.monotonic() + TIMEOUT
                while time.monotonic() < end:  # a byte now and then, never silent
                    slow.sendall(b"x")
                    time.sleep(0.05)

            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                talk()


def test_what_was_rolled_back_tells_no_perplexity_and_a_spent_budget_no_rounds(
    tmp_path: Path,
) -> None:
    with (
        contextlib.closing(State(tmp_path)) as whole,
        contextlib.closing(AuditLog(tmp_path)) as log,
        contextlib.closing(Auditor(log)) as auditor,
    ):
        settings = Settings(contract_sha256="", rounds=3, min_devices=2, deadline_seconds=9.0)
        settings.recipe = settings.training = ""
        whole.of("a").begin(settings, b"start")
        live = Live(calls=Calls(auditor), traffic=Traffic())
        overview, metrics = Overview(tmp_path, live), Metrics(live)
        metrics.observe("quality_measured", {"cohort": "a", "perplexity": 50.0})
        assert b'comigs_generalist_perplexity{cohort="a"} 50' in metrics.text()
        for _ in range(2):
            metrics.observe("rolled_back", {"cohort": "a", "round": 2, "to": 1})
        assert b"comigs_generalist_perplexity{" not in metrics.text()
        spent = {"cohort": "a", "epsilon": 2.5, "delta": 1e-6, "budget": 3.0, "round": 2}
        overview.observe("privacy_spent", spent)
        assert not overview()["cohorts"][0]["budget_spent"]
        overview.observe("budget_spent", spent)
        until(lambda: overview()["cohorts"][0]["budget_spent"], "it says nothing")


def test_an_address_that_is_taken(fleet: Fleet) -> None:
    _, address = monitored(fleet)
    command = serve_command(fleet.bundle().path, fleet.directory / "other", "--monitor", address)
    done = subprocess.run(
        [*command, "--listen", "127.0.0.1:0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == AddressError.code
    assert "choose another --monitor" in " ".join(done.stderr.split())
