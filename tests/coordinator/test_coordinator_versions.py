"""Versions of the protocol and sizes of messages: who does not fit is told so."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from coordinator_help import PATIENCE, Fleet, check_in_until, enrol_with, in_parallel, invited
from google.protobuf.descriptor import MethodDescriptor

from edge_runtime import protocol
from edge_runtime.bundle import Bundle
from edge_runtime.client import Client, connect_to_enrol
from edge_runtime.connection import connect
from edge_runtime.errors import VersionError
from edge_runtime.identity import Identity
from edge_runtime.store import Home
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc


def comigs_of_another_time(oldest: int, newest: int) -> list[str]:
    """A command: `comigs` that speaks these versions."""
    code = (
        "import sys; from edge_runtime import protocol; "
        f"protocol.OLDEST, protocol.NEWEST = {oldest}, {newest}; "
        f"protocol.SECURE_AGGREGATION = min({newest}, protocol.SECURE_AGGREGATION); "
        "from edge_runtime.cli import main; sys.exit(main())"
    )
    return [sys.executable, "-c", code]


def moved(fleet: Fleet, client: Client, address: str) -> Client:
    assert isinstance(client.who, Identity)
    return fleet.client(replace(client.who, coordinator=address))


def test_both_speak_the_newest_version_that_both_know(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle)
    (ada,) = fleet.enrolled(served, bundle, "ada")
    ada.check_in(0)
    assert ada.protocol == protocol.NEWEST
    stub = coordinator_pb2_grpc.CoordinatorStub(connect(ada.who, PATIENCE).channel)
    for newest, spoken in ((0, 1), (1, 1), (99, protocol.NEWEST)):
        assert stub.CheckIn(pb.CheckInRequest(protocol=newest), timeout=10).protocol == spoken


def test_a_device_that_is_too_old_is_told_to_update(fleet: Fleet) -> None:
    """When it enrols, and when the coordinator has been updated since."""
    bundle = fleet.bundle()
    served = fleet.serve(bundle)
    (ada,) = fleet.enrolled(served, bundle, "ada")
    served.stop()
    newer = fleet.serve(
        bundle, program=comigs_of_another_time(protocol.NEWEST + 1, protocol.NEWEST + 2)
    )
    newest = protocol.NEWEST
    words = rf"speaks version {newest} of the protocol, .* is {newest + 1}; update"
    with pytest.raises(VersionError, match=words):
        moved(fleet, ada, newer.ready()).check_in(0)
    (invitation,) = invited(newer, "ben")
    with pytest.raises(VersionError, match="update comigs on the device"):
        enrol_with(invitation, bundle)


def test_a_device_that_is_too_new_says_what_to_update(
    fleet: Fleet, tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    served = fleet.serve(tiny_bundle, "--insecure")
    arguments = ["device", "run", "--home", tmp_path / "home", "--data", text_dir]
    arguments += ["--bundle", tiny_bundle.path, "--coordinator", served.ready(), "--insecure"]
    done = subprocess.run(
        [*comigs_of_another_time(protocol.NEWEST + 1, protocol.NEWEST + 2), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 23, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        f"error: the coordinator at {served.ready()} speaks version {protocol.NEWEST}"
    )
    assert last.endswith("update comigs there")


def test_secure_aggregation_of_another_time_is_refused(
    fleet: Fleet, tiny_bundle: Bundle, text_dir: Path, tmp_path: Path
) -> None:
    """From before all keys of a large group were signed, on either side: neither waits."""
    before = comigs_of_another_time(1, protocol.SECURE_AGGREGATION - 1)
    words = r"speaks version 5 of the protocol, and the oldest understood here is 6; update comigs "
    options = ("--secure-aggregation", "--min-devices", "3", "--enrolment-port", "0")
    options = (*options, "--deadline", "600")
    served = fleet.serve(tiny_bundle, *options)
    ada, ben, eve = invited(served, "ada", "ben", "eve")
    Home(tmp_path / "home").save_identity(enrol_with(ada, tiny_bundle))
    arguments = ["device", "run", "--home", tmp_path / "home", "--data", text_dir]
    arguments += ["--bundle", tiny_bundle.path]
    done = subprocess.run(
        [*before, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 23, done.stderr
    assert re.search(words + "on the device", done.stderr)
    clients = [fleet.client(enrol_with(invitation, tiny_bundle)) for invitation in (ben, eve)]
    served.stop()
    earlier = fleet.serve(tiny_bundle, *options, "--min-devices", "3", program=before)
    address = earlier.ready()
    moved_there = [moved(fleet, client, address) for client in clients]
    (fay,) = fleet.enrolled(earlier, tiny_bundle, "fay")

    def told_to_train(client: Client) -> None:
        with pytest.raises(VersionError, match=words + "there"):
            check_in_until(client, pb.CheckInReply.TRAIN)

    in_parallel(*(lambda c=c: told_to_train(c) for c in (*moved_there, fay)))


def methods() -> list[MethodDescriptor]:
    services = pb.DESCRIPTOR.services_by_name.values()
    return [method for service in services for method in service.methods]


def test_every_message_that_travels_has_a_limit() -> None:
    travelling = {m for each in methods() for m in (each.input_type.name, each.output_type.name)}
    assert travelling == protocol.MOST_BYTES.keys()
    from_devices = {m.input_type.name for m in methods()}
    assert max(protocol.MOST_BYTES[name] for name in from_devices) == protocol.LARGEST
    assert max(protocol.MOST_BYTES.values()) == protocol.LARGEST_LIST


def unknown_field(size: int) -> bytes:
    """A message of `size` bytes of any kind: it has one field, which no kind knows."""
    content = size - 6
    length = bytes(content >> 7 * i & 127 | (128 if i < 3 else 0) for i in range(4))
    return b"\xfa\x7f" + length + bytes(content)


def test_a_message_that_is_too_large_is_refused(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle)
    (ada,) = fleet.enrolled(served, bundle, "ada")
    (invitation,) = invited(served, "ben")
    with (
        connect(ada.who, PATIENCE) as device,
        connect(served.administrator(), PATIENCE) as administrator,
        connect_to_enrol(invitation, PATIENCE) as enrolment,
    ):
        channels = {"Coordinator": device, "Admin": administrator, "Enrolment": enrolment}
        for method in methods():
            channel = channels[method.containing_service.name].channel
            path = f"/{method.containing_service.full_name}/{method.name}"
            most = protocol.MOST_BYTES[method.input_type.name]
            assert _code(channel, method, path, most) != grpc.StatusCode.RESOURCE_EXHAUSTED, path
            assert _code(channel, method, path, most + 1) == grpc.StatusCode.RESOURCE_EXHAUSTED
            # Compressed it is as large, and nobody unpacks it.
            bomb = _code(channel, method, path, 2**20, compression=grpc.Compression.Gzip)
            assert bomb == grpc.StatusCode.RESOURCE_EXHAUSTED


def _code(
    channel: grpc.Channel, method: MethodDescriptor, path: str, size: int, **options: Any
) -> grpc.StatusCode:
    """With what the call ends that sends `size` bytes."""
    request = unknown_field(size)
    assert len(request) == size
    kind = ("stream" if method.client_streaming else "unary") + (
        "_stream" if method.server_streaming else "_unary"
    )
    sent = iter([request]) if method.client_streaming else request
    try:
        reply = getattr(channel, kind)(path)(sent, timeout=30, **options)
        list(reply if method.server_streaming else [reply])
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK
