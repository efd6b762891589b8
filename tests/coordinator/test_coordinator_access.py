"""Who gets in, who trusts whom, and what a wrong start or a wrong address is told."""

import asyncio
import contextlib
import datetime
import itertools
import socket
import sqlite3
import ssl
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from coordinator_help import (
    PATIENCE,
    TIMEOUT,
    Fleet,
    Served,
    enrol_with,
    free_port,
    header,
    ids,
    invited,
    join_round,
    make_bundle,
    misused,
    train,
)
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from coordinator.calls import Calls
from coordinator.limits import Limits
from coordinator.listening import Ports
from coordinator.tls import Authority
from edge_runtime import training_config
from edge_runtime.client import connect_to_enrol
from edge_runtime.connection import Patience, Unproven, connect
from edge_runtime.errors import (
    AddressError,
    BundleError,
    RefusedError,
    StorageError,
    TrustError,
    UnreachableError,
    VersionError,
)
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc


@pytest.fixture
def served(fleet: Fleet) -> Served:
    return fleet.serve(fleet.bundle())


def test_health_and_reflection_answer(fleet: Fleet, served: Served) -> None:
    (invitation,) = invited(served, "ada")
    ada = enrol_with(invitation, fleet.bundle())
    for connection, services in (
        (connect(ada, PATIENCE), {"comigs.v1.Coordinator", "comigs.v1.Admin"}),
        (connect_to_enrol(invitation, PATIENCE), {"comigs.v1.Enrolment"}),
    ):
        with connection:
            assert 0 < connection.ping() < 5
            health = health_pb2_grpc.HealthStub(connection.channel)
            for service in ("", *services):
                reply = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
                assert reply.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.RpcError) as held:  # without end, and nobody is counted for it
                next(health.Watch(health_pb2.HealthCheckRequest(), timeout=10))
            assert held.value.code() == grpc.StatusCode.UNIMPLEMENTED
            reflection = reflection_pb2_grpc.ServerReflectionStub(connection.channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            (answer,) = reflection.ServerReflectionInfo(iter([request]), timeout=10)
            names = {service.name for service in answer.list_services_response.service}
            assert {name for name in names if name.startswith("comigs")} == services


def test_server_certificates(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--name", "127.0.0.3", "--name", "x.test", listen="0.0.0.0:0")
    port = served.ready().rpartition(":")[2]
    (invitation,) = invited(served, "ada")
    assert invitation.host == "127.0.0.3"
    ada = enrol_with(invitation, bundle)
    assert ada.coordinator == f"127.0.0.3:{port}"
    for host in ("127.0.0.1", "localhost", "127.0.0.3"):
        fleet.client(replace(ada, coordinator=f"{host}:{port}")).check_in(0)
    with pytest.raises(TrustError, match="certificate for other names"):
        fleet.client(replace(ada, coordinator=f"127.0.0.2:{port}")).check_in(0)

    other = fleet.serve(bundle, state=fleet.directory / "other")
    waits: list[str] = []
    with pytest.raises(TrustError, match="certificate of another authority"):
        fleet.client(
            replace(ada, coordinator=other.ready()), Patience(TIMEOUT, waits.append)
        ).check_in(0)
    assert not waits, "it must not retry"

    for name in ("ca-key.pem", "admin.json"):
        assert stat.S_IMODE((fleet.state / name).stat().st_mode) == 0o600
    ca = x509.load_pem_x509_certificate((fleet.state / "ca.pem").read_bytes())
    # Not from when it was made: the clock may have been ahead.
    shown = x509.load_pem_x509_certificate(
        ssl.get_server_certificate(("127.0.0.1", int(port))).encode()
    )
    assert shown.not_valid_before_utc == ca.not_valid_before_utc
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_the_state_is_its_owners_alone_also_in_a_directory_that_was_there(fleet: Fleet) -> None:
    fleet.state.mkdir()
    fleet.state.chmod(0o755)
    bundle = fleet.bundle(width=60_000)
    served = fleet.serve(bundle, "--min-devices", "2")
    ada, ben, eve = fleet.enrolled(served, bundle, "ada", "ben", "eve")
    join_round(ada, ben, eve)
    update = train(bundle, ada.download(1), 0, 1)
    assert ada.upload(header(1), update).accepted
    half = header(1, total_bytes=len(update), sha256=sha256(update).digest())
    sent = iter([pb.UploadPart(header=half), pb.UploadPart(data=update[:1000])])
    with connect(eve.who, PATIENCE) as connection:
        stub = coordinator_pb2_grpc.CoordinatorStub(connection.channel)
        with pytest.raises(grpc.RpcError, match="truncated"):
            stub.Upload(sent, timeout=TIMEOUT)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in fleet.state.rglob("*")}
    kinds = {path.suffix for path in modes}
    assert {".sqlite3", ".safetensors", ".partial", ".jsonl"} <= kinds
    assert [path.name for path, mode in modes.items() if mode & 0o077] == ["ca.pem"]


def test_ipv6(fleet: Fleet) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--name", "::1", listen="[::]:0")
    (ada,) = fleet.enrolled(served, bundle, "ada")
    assert ada.who.coordinator.startswith("[::1]:")
    ada.check_in(0)


def test_a_coordinator_that_devices_cannot_address_invites_nobody(fleet: Fleet) -> None:
    served = fleet.serve(fleet.bundle(), listen="0.0.0.0:0")
    with pytest.raises(RefusedError, match="start it with --name"):
        invited(served, "ada")


def test_one_side_without_tls(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    secure = fleet.serve(bundle, state=fleet.directory / "secure")
    plain = fleet.serve(bundle, "--insecure", state=fleet.directory / "plain").ready()
    (ada,) = fleet.enrolled(secure, bundle, "ada")
    with pytest.raises(TrustError, match="does not speak TLS"):
        fleet.client(replace(ada.who, coordinator=plain)).check_in(0)
    with pytest.raises(UnreachableError, match="speaks without TLS"):
        fleet.client(Unproven(secure.ready(), "ada"), Patience(1, print)).check_in(0)


def test_without_tls_devices_are_who_they_say(fleet: Fleet) -> None:
    served = fleet.serve(fleet.bundle(), "--insecure", "--min-devices", "2")
    ada, ben = (fleet.client(Unproven(served.ready(), name)) for name in ("ada", "bén"))
    join_round(ada, ben)
    assert set(ids(fleet.state)) == {"ada", "bén"}
    with pytest.raises(RefusedError, match="1 to 64 bytes"):
        fleet.client(Unproven(served.ready(), "")).check_in(0)
    # Nobody is administrator, and nobody gets a certificate that would outlast this mode.
    assert served.listening["admin"] is None
    assert not (fleet.state / "admin.json").exists()
    with connect(ada.who, PATIENCE) as connection:
        admin = coordinator_pb2_grpc.AdminStub(connection.channel)
        with pytest.raises(RefusedError, match="no coordinator of this version"):
            connection.retry(lambda: admin.ListDevices(pb.ListDevicesRequest()))
        stub = coordinator_pb2_grpc.CoordinatorStub(connection.channel)
        metadata = (("comigs-device-bin", b"ada"),)
        with pytest.raises(RefusedError, match="without TLS"):
            connection.retry(lambda: stub.Renew(pb.SigningRequest(), metadata=metadata))


def test_unreachable_after_retries_with_messages(fleet: Fleet) -> None:
    address = f"127.0.0.1:{free_port()}"
    messages: list[str] = []
    client = fleet.client(Unproven(address, "ada"), Patience(2, messages.append))
    begin = time.monotonic()
    with pytest.raises(UnreachableError, match=f"{address}.*refused.*check that it runs"):
        client.check_in(0)
    assert time.monotonic() - begin >= 2
    assert messages
    assert all(address in message and "trying again in" in message for message in messages)


def test_a_coordinator_that_comes_back_is_found(fleet: Fleet) -> None:
    listen = f"127.0.0.1:{free_port()}"
    waited: list[str] = []
    client = fleet.client(Unproven(listen, "ada"), Patience(30, waited.append))
    fleet.serve(fleet.bundle(), "--insecure", listen=listen)
    client.check_in(0)
    assert waited


@contextlib.contextmanager
def answering(check_in: Callable[[bytes], bytes]) -> Iterator[str]:
    """The address of a service that answers check-ins so."""
    handler = grpc.unary_unary_rpc_method_handler(lambda request, _: check_in(request))
    server = grpc.server(ThreadPoolExecutor(1))
    name = pb.DESCRIPTOR.services_by_name["Coordinator"].full_name
    handlers = grpc.method_handlers_generic_handler(name, {"CheckIn": handler})
    server.add_generic_rpc_handlers((handlers,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def failing(times: int) -> contextlib.AbstractContextManager[str]:
    """Likewise; it fails so often before it answers one."""
    calls = itertools.count()

    def check_in(request: bytes) -> bytes:
        if next(calls) < times:
            raise RuntimeError("disk on fire")
        protocol = pb.CheckInRequest.FromString(request).protocol
        return pb.CheckInReply(protocol=protocol).SerializeToString()

    return answering(check_in)


def test_an_answer_that_cannot_be_read_is_not_waited_for(fleet: Fleet) -> None:
    waited: list[str] = []
    with (
        answering(lambda _: b"\xff not protobuf") as address,
        pytest.raises(RefusedError, match="deserializing"),
    ):
        fleet.client(Unproven(address, "ada"), Patience(30, waited.append)).check_in(0)
    assert not waited


def test_a_coordinator_that_fails_inside_is_asked_again(fleet: Fleet) -> None:
    waited: list[str] = []
    with failing(2) as address:
        fleet.client(Unproven(address, "ada"), Patience(30, waited.append)).check_in(0)
    assert len(waited) == 2
    assert all("failed" in message and "on fire" in message for message in waited)
    with (
        failing(99) as address,
        pytest.raises(UnreachableError, match=r"answers, but it failed.*its own log"),
    ):
        fleet.client(Unproven(address, "ada"), Patience(1, waited.append)).check_in(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--name", "ü.example"), "in ASCII"),
        (("--name", "fl.example:50051"), "without a port"),
        (("--max-idle", "inf"), "--max-idle"),
        (("--insecure", "--cohort", "a"), "--cohort is about"),
        (("--insecure", "--enrolment-port", "0"), "--enrolment-port is about"),
        (("--insecure", "--certificate-days", "3"), "--certificate-days is about"),
        (("--rounds", "0"), "--rounds"),
        (("--rounds", str(10**20)), "--rounds"),
        (("--asynchronous", "2", "--max-staleness", str(10**20)), "--max-staleness"),
        (("--min-devices", "0"), "--min-devices"),
        (("--deadline", "0"), "--deadline"),
        (("--aggregation", "best"), "best is not one of"),
        (("--aggregation", "krum"), "give --min-devices 5"),
        (("--server-tau", "1"), "without --server-optimizer"),
    ],
)
def test_options_that_are_refused(fleet: Fleet, options: tuple[str, ...], message: str) -> None:
    assert message in misused(fleet.bundle(), *options)


def test_starts_that_are_refused(fleet: Fleet, served: Served) -> None:
    address = served.ready()
    port = address.rpartition(":")[2]
    bundle = fleet.bundle()
    bad_training = fleet.directory / "training.json"
    bad_training.write_text('{"beta1": 1.5}')
    old = fleet.directory / "old"
    old.mkdir()
    with sqlite3.connect(old / "coordinator.sqlite3") as connection:
        connection.execute("create table rounds (number integer primary key)")
    elsewhere = {"state": fleet.directory / "elsewhere"}
    damaged = make_bundle(fleet.directory / "damaged")
    (damaged.path / "adapters/generalist/adapter_model.safetensors").write_bytes(b"")
    for starting, code, message in (
        (fleet.serve(bundle, listen=address, **elsewhere), AddressError.code, "in use"),
        (fleet.serve(bundle, listen="nonsense", **elsewhere), AddressError.code, "HOST:PORT"),
        (fleet.serve(bundle, listen="ü.example:0", **elsewhere), AddressError.code, "HOST:PORT"),
        (
            fleet.serve(bundle, "--enrolment-port", port, state=fleet.directory / "third"),
            AddressError.code,
            "choose another --enrolment-port",
        ),
        (fleet.serve(bundle), StorageError.code, "in use by another coordinator"),
        (fleet.serve(bundle, state=old), VersionError.code, "made by another version"),
        (fleet.serve(damaged, **elsewhere), BundleError.code, "0 bytes instead of"),
        (fleet.serve(bundle, "--training", str(bad_training), **elsewhere), 2, "beta1"),
    ):
        stderr = starting.stderr()
        assert starting.process.wait(30) == code, stderr
        assert message in " ".join(stderr.split())
        assert "Traceback" not in stderr
    served.stop()
    other = fleet.serve(fleet.bundle(rank=4))
    assert other.process.wait(30) == BundleError.code
    assert "began with a bundle of another base" in other.stderr()


@pytest.mark.parametrize("database", [None, "postgresql://nowhere/"])
def test_ports_that_cannot_be(tmp_path: Path, database: str | None) -> None:
    """Also with a database, when others may listen on the same port."""
    authority = Authority.open(tmp_path, datetime.timedelta(days=1))

    async def opened(port: int, enrolment: int | None) -> None:
        options = SimpleNamespace(
            listen=f"127.0.0.1:{port}", names=(), limits=Limits(), database=database,
            enrolment_port=enrolment,
        )  # fmt: skip
        Ports.open(options, authority, Calls(None))

    port = free_port()
    with pytest.raises(AddressError, match=f"--enrolment-port {port} is the port of --listen"):
        asyncio.run(opened(port, port))
    with pytest.raises(AddressError, match=r"65535 has the last port.*give --enrolment-port"):
        asyncio.run(opened(65535, None))


def test_training_config(tmp_path: Path) -> None:
    default = training_config.load(None)
    assert (default.tau, default.local_steps, default.batch_sequences) == (30, 10, 8)
    assert default.weight_decay == pytest.approx(0.01)
    file = tmp_path / "training.json"
    file.write_text('{"local_steps": 3, "learning_rate": 0.5}')
    own = training_config.load(file)
    assert (own.local_steps, own.learning_rate, own.router_steps) == (3, 0.5, 10)
    assert (own.tau, own.weight_decay) == (default.tau, default.weight_decay)
    file.write_text('{"tau": null, "weightDecay": null}')  # in proto3's JSON: not named
    assert training_config.load(file) == default
    file.write_text('{"tau": 0, "weightDecay": 0}')
    own = training_config.load(file)
    assert (own.tau, own.weight_decay) == (0, 0)
    for text in ("{", '{"stepz": 1}', '{"tau": -1}', '{"weight_decay": "NaN"}', '{"beta2": 1.0}',
                 '{"final_rate_share": 2}'):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ValueError, match=r"training\.json"):
            training_config.load(file)
    with pytest.raises(ValueError, match="No such file"):
        training_config.load(tmp_path / "missing.json")
