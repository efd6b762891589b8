"""Who gets in, who trusts whom, and what a wrong start or a wrong address is told."""

import sqlite3
import stat
import time
from pathlib import Path

import grpc
import pytest
from coordinator_help import Fleet, Served, free_port, make_bundle
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from edge_runtime import training_config
from edge_runtime.bundle import contract_sha256
from edge_runtime.client import Identity
from edge_runtime.errors import (
    AddressError,
    BundleError,
    RefusedError,
    StorageError,
    TrustError,
    UnreachableError,
)
from protos import coordinator_pb2 as pb


@pytest.fixture
def served(fleet: Fleet) -> Served:
    return fleet.serve(fleet.bundle())


def test_identity_is_proved_on_every_call(fleet: Fleet, served: Served) -> None:
    ada, ben = fleet.enrolled(served, fleet.bundle(), "ada", "ben")
    own = ada.identity
    for identity in (
        Identity(own.device_id, "guess"),
        Identity(own.device_id, ben.identity.token),
        Identity("nobody", own.token),
        Identity("", ""),
    ):
        ada.identity = identity
        for call in (
            lambda: ada.check_in(0),
            lambda: ada.download(1),
            lambda: ada.upload(pb.UploadHeader(round=1), b"x"),
        ):
            with pytest.raises(TrustError, match="does not know the device or its token"):
                call()
    ada.identity = own
    assert ada.check_in(0).action == pb.CheckInReply.WAIT


def test_enrolment_is_refused_for_another_contract_or_a_taken_name(
    fleet: Fleet, served: Served
) -> None:
    contract = contract_sha256(fleet.bundle().manifest)
    address, ca = served.ready()
    ada, eve = fleet.client(address, ca), fleet.client(address, ca)
    with pytest.raises(RefusedError, match="other shared tensors"):
        ada.enroll("ada", contract_sha256(fleet.bundle(rank=4).manifest))
    for name in ("", "x" * 65, "a\nb"):
        with pytest.raises(RefusedError, match="1 to 64 printable"):
            ada.enroll(name, contract)
    with pytest.raises(RefusedError, match="16 to 64 bytes"):
        ada.enroll("ada", contract, key=b"short")
    first = ada.enroll("ada", contract, key=b"k" * 16)
    with pytest.raises(RefusedError, match="another device is called ada"):
        eve.enroll("ada", contract)
    # A device that crashed before it saw the reply asks again with the key that it saved.
    second = ada.enroll("ada", contract, key=b"k" * 16)
    assert second.device_id == first.device_id
    assert second.token != first.token
    ada.check_in(0)


def test_health_and_reflection_answer(served: Served) -> None:
    address, ca = served.ready()
    credentials = grpc.ssl_channel_credentials(ca.read_bytes())
    with grpc.secure_channel(address, credentials) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "comigs.v1.Coordinator"):
            reply = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection.ServerReflectionInfo(iter([request]), timeout=10)
        names = {service.name for service in answer.list_services_response.service}
        assert {"comigs.v1.Coordinator", "grpc.health.v1.Health"} <= names


def test_certificates(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    contract = contract_sha256(bundle.manifest)
    served = fleet.serve(bundle, "--name", "127.0.0.3", listen="0.0.0.0:0")
    port = served.ready()[0].rpartition(":")[2]
    ca = fleet.state / "ca.pem"
    for number, host in enumerate(("127.0.0.1", "localhost", "127.0.0.3")):
        fleet.client(f"{host}:{port}", ca).enroll(f"device {number}", contract)
    with pytest.raises(TrustError, match="certificate for other names"):
        fleet.client(f"127.0.0.2:{port}", ca).enroll("x", contract)

    other = fleet.serve(bundle, state=fleet.directory / "other")
    wrong = other.ready()[1]
    junk = fleet.directory / "junk.pem"
    junk.write_text("junk")
    address = f"127.0.0.1:{port}"
    for begin, untrusted, message in (
        (time.monotonic(), wrong, "authority that this device does not trust"),
        (time.monotonic(), junk, "holds no certificate"),
    ):
        with pytest.raises(TrustError, match=message):
            fleet.client(address, untrusted).enroll("x", contract)
        assert time.monotonic() - begin < 5, "it must not retry"
    with pytest.raises(TrustError, match="authority that this device does not trust"):
        fleet.client(address, None, insecure=False).enroll("x", contract)
    with pytest.raises(TrustError, match="--ca"):
        fleet.client(address, fleet.directory / "missing.pem")

    key = fleet.state / "ca-key.pem"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    constraints = x509.load_pem_x509_certificate(ca.read_bytes()).extensions
    assert constraints.get_extension_for_class(x509.BasicConstraints).value.ca


def test_one_side_without_tls(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    contract = contract_sha256(bundle.manifest)
    secure = fleet.serve(bundle, state=fleet.directory / "secure").ready()
    plain = fleet.serve(bundle, "--insecure", state=fleet.directory / "plain").ready()
    assert plain[1] is None
    fleet.client(plain[0], None).enroll("ada", contract)
    with pytest.raises(TrustError, match="does not speak TLS"):
        fleet.client(plain[0], secure[1]).enroll("x", contract)
    with pytest.raises(UnreachableError, match="speaks without TLS"):
        fleet.client(secure[0], None, retry_seconds=1).enroll("x", contract)


def test_unreachable_after_retries_with_messages(fleet: Fleet) -> None:
    address = f"127.0.0.1:{free_port()}"
    messages: list[str] = []
    client = fleet.client(address, None, retry_seconds=2, on_wait=messages.append)
    begin = time.monotonic()
    with pytest.raises(UnreachableError, match=f"{address}.*refused.*check that it runs"):
        client.enroll("x", "contract")
    assert 2 <= time.monotonic() - begin < 6
    assert 3 <= len(messages) <= 8
    assert all(address in message and "trying again in" in message for message in messages)


def test_a_coordinator_that_comes_back_is_found(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    listen = f"127.0.0.1:{free_port()}"
    client = fleet.client(listen, None, on_wait=lambda _: waited.append(True))
    waited: list[bool] = []
    fleet.serve(bundle, "--insecure", listen=listen)
    client.enroll("ada", contract_sha256(bundle.manifest))
    assert waited


def test_starts_that_are_refused(fleet: Fleet, served: Served) -> None:
    address, _ = served.ready()
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
        (fleet.serve(bundle), StorageError.code, "in use by another coordinator"),
        (fleet.serve(bundle, state=old), StorageError.code, "made by another version"),
        (fleet.serve(damaged, **elsewhere), BundleError.code, "0 bytes instead of"),
        (fleet.serve(bundle, "--rounds", "0", **elsewhere), 2, "--rounds"),
        (fleet.serve(bundle, "--min-devices", "0", **elsewhere), 2, "--min-devices"),
        (fleet.serve(bundle, "--deadline", "0", **elsewhere), 2, "--deadline"),
        (fleet.serve(bundle, "--aggregation", "best", **elsewhere), 2, "best is not one of"),
        (fleet.serve(bundle, "--aggregation", "krum", **elsewhere), 2, "give --min-devices 5"),
        (fleet.serve(bundle, "--server-tau", "1", **elsewhere), 2, "without --server-optimizer"),
        (fleet.serve(bundle, "--training", str(bad_training), **elsewhere), 2, "beta1"),
    ):
        stderr = starting.stderr()
        assert starting.process.wait(30) == code, stderr
        assert message in " ".join(stderr.split())
        assert "Traceback" not in stderr
    served.stop()
    other = fleet.serve(fleet.bundle(rank=4))
    assert other.process.wait(30) == BundleError.code
    assert "belongs to a bundle with another base" in other.stderr()


def test_training_config(tmp_path: Path) -> None:
    default = training_config.load(None)
    assert (default.tau, default.local_steps, default.batch_sequences) == (30, 10, 8)
    assert default.weight_decay == pytest.approx(0.01)
    file = tmp_path / "training.json"
    file.write_text('{"local_steps": 3, "learning_rate": 0.5}')
    own = training_config.load(file)
    assert (own.local_steps, own.learning_rate, own.router_steps) == (3, 0.5, 10)
    assert (own.tau, own.weight_decay) == (0, 0), "zero means none here"
    for text in ("{", '{"stepz": 1}', '{"tau": -1}', '{"weight_decay": "NaN"}', '{"beta2": 1.0}',
                 '{"final_rate_share": 2}'):  # fmt: skip
        file.write_text(text)
        with pytest.raises(ValueError, match=r"training\.json"):
            training_config.load(file)
    with pytest.raises(ValueError, match="No such file"):
        training_config.load(tmp_path / "missing.json")
