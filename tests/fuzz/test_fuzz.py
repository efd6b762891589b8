"""Nothing that somebody else wrote brings a decoder or the live service down.

Here a small share of the inputs; `COMIGS_SOAK=1` (`make soak`) runs more than a million.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from coordinator_help import PATIENCE, Fleet, invited, join_round
from fuzz.targets import ASKED, SAID, STAGES, SUMMERS, TARGETS, seeds
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.client import connect_to_enrol
from edge_runtime.connection import connect
from protos import coordinator_pb2 as pb
from tests.golden.__main__ import example

CORPUS = Path(__file__).parent / "corpus"
SOAK = bool(os.environ.get("COMIGS_SOAK"))
SEEDS = seeds()


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_that_were_found_before(name: str) -> None:
    for path in sorted((CORPUS / name).glob("*")):
        TARGETS[name](path.read_bytes())


def test_what_is_mutated_was_good_in_its_stage() -> None:
    """Else all that is made of it is turned away at the door."""
    for asked, (_, device, secure) in zip(ASKED, SUMMERS, strict=True):
        request = pb.AggregateRequest()
        request.CopyFrom(asked)
        request.round = 1
        secure.step(device, request)
    for said, (_, session, act) in zip(SAID, STAGES, strict=True):
        act(session, said)


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A good input with some bytes replaced, removed and inserted; or any bytes."""
    data = bytearray(draw(st.sampled_from([*seeds, b""])))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        data[start : start + draw(st.integers(0, 8))] = draw(st.binary(max_size=12))
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_inputs(name: str) -> None:
    @settings(
        max_examples=2000 if SOAK else 30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(mutated(SEEDS[name]))
    def run(data: bytes) -> None:
        TARGETS[name](data)

    run()


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris is not installed; pip install -c constraints.txt atheris",
)
@pytest.mark.parametrize("name", TARGETS if SOAK else ["payload", "compressed", "state"])
def test_inputs_that_follow_the_code(name: str, tmp_path: Path) -> None:
    runs = 105_000 if SOAK else 1000
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", name, "--runs", str(runs)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(CORPUS.parents[2])},
        capture_output=True,
        text=True,
        timeout=3600 if SOAK else 120,
        check=False,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    ended = re.search(rf"^Done {runs} runs.*", log, re.MULTILINE)
    assert ended, log[-3000:]
    print(name, ended[0], *re.findall(r"(?:slowest_unit_time_sec|peak_rss_mb): +\d+", log))


def methods() -> list[MethodDescriptor]:
    services = pb.DESCRIPTOR.services_by_name.values()
    return [method for service in services for method in service.methods]


def peak_memory(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]


CALLS = 60_000 if SOAK else 600


@pytest.mark.timeout(300)
def test_the_live_service_answers_any_message(tmp_path: Path) -> None:
    """Every call of every service, with random and mutated messages, by those who may make it:
    each ends soon, none with an error that was not thought of, and the round goes on."""
    fleet = Fleet(tmp_path)
    try:
        bundle = fleet.bundle()
        # Or most calls would only wait for their turn.
        unhurried = ("--calls-per-second", "100000")
        served = fleet.serve(bundle, "--min-devices", "3", "--compression", "int8", *unhurried)
        ada, ben, eve = fleet.enrolled(served, bundle, "ada", "ben", "eve")
        join_round(ada, ben, eve)
        (invitation,) = invited(served, "fay")
        before = peak_memory(served.process.pid)
        with (
            connect(eve.who, PATIENCE) as device,
            connect(served.administrator(), PATIENCE) as administrator,
            connect_to_enrol(invitation, PATIENCE) as enrolment,
        ):
            channels = {"Coordinator": device, "Admin": administrator, "Enrolment": enrolment}
            _call_all(channels)
        assert served.process.poll() is None
        assert peak_memory(served.process.pid) - before < 128 * 2**20
        ada.check_in(0)
        served.stop()
        assert "Traceback" not in served.stderr()
    finally:
        fleet.close()


def _call_all(channels: dict[str, grpc.Channel]) -> None:
    every = methods()

    @settings(
        max_examples=CALLS, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        method = data.draw(st.sampled_from(every))
        if method.name in HARMFUL:
            return
        kind = message_factory.GetMessageClass(method.input_type)
        good = [kind().SerializeToString(), example(method.input_type).SerializeToString()]
        for oneof in method.input_type.oneofs:
            for field in oneof.fields:
                good.append(example(method.input_type, field.name).SerializeToString())
        sent = [data.draw(mutated(good)) for _ in range(2 if method.client_streaming else 1)]
        code = _code(channels[method.containing_service.name].channel, method, sent)
        assert code != grpc.StatusCode.UNKNOWN, (method.name, sent)
        assert method.name in WAITING or code != grpc.StatusCode.DEADLINE_EXCEEDED, sent

    run()


# An administrator may end rounds and devices, and asked to, the coordinator does.
HARMFUL = {"Revoke", "Pause", "Abort", "RollBack"}
# These may be held open until there is something to say.
WAITING = {"CheckIn", "Aggregate"}


def _code(channel: grpc.Channel, method: MethodDescriptor, sent: list[bytes]) -> grpc.StatusCode:
    kind = ("stream" if method.client_streaming else "unary") + (
        "_stream" if method.server_streaming else "_unary"
    )
    call = getattr(channel, kind)(f"/{method.containing_service.full_name}/{method.name}")
    timeout = 0.2 if method.name in WAITING else 30
    try:
        reply = call(iter(sent) if method.client_streaming else sent[0], timeout=timeout)
        list(reply if method.server_streaming else [reply])
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK
