"""Who is who: invitations, certificates, roles, renewal, revocation."""

import datetime
import json
import re
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from coordinator_help import (
    PATIENCE,
    TIMEOUT,
    Fleet,
    Served,
    aged,
    check_in_until,
    enrol_with,
    files_of,
    finish,
    free_port,
    header,
    ids,
    invited,
    join_round,
    seen,
    train,
    until,
)
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from coordinator.administrator import Administrator
from coordinator.tls import ADMIN_FILE, CA_FILE, CA_KEY_FILE, Authority
from edge_runtime import invitation as invitations
from edge_runtime.bundle import contract_sha256
from edge_runtime.client import connect_to_enrol
from edge_runtime.connection import Patience, Traffic, connect
from edge_runtime.enrolment import identity_from
from edge_runtime.errors import RefusedError, TrustError, UnreachableError
from edge_runtime.identity import Identity, new_key
from edge_runtime.invitation import is_name
from edge_runtime.store import Enrolment, Home
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc

HOUR = datetime.timedelta(hours=1)


@pytest.fixture
def served(fleet: Fleet) -> Served:
    return fleet.serve(fleet.bundle())


# Invitations


def test_an_invitation_works_for_one_key(fleet: Fleet, served: Served) -> None:
    (invitation,) = invited(served, "ada")
    key = new_key()
    first = enrol_with(invitation, fleet.bundle(), key=key)
    known = ids(fleet.state)
    with pytest.raises(TrustError, match="already used by another device"):
        enrol_with(invitation, fleet.bundle())
    # Who was killed before the reply arrived asks again, and is the same device.
    second = enrol_with(invitation, fleet.bundle(), key=key)
    assert ids(fleet.state) == known
    for identity in (first, second):
        assert identity.name == "ada"
        assert fleet.client(identity).check_in(0).action == pb.CheckInReply.WAIT


def test_invitations_that_are_not_accepted(fleet: Fleet, served: Served) -> None:
    bundle = fleet.bundle()
    (expired,) = invited(served, "ada", seconds=0.01)
    time.sleep(0.02)
    with pytest.raises(TrustError, match="has expired"):
        enrol_with(expired, bundle)

    (replaced,), (newer,) = invited(served, "ben"), invited(served, "ben")
    with pytest.raises(TrustError, match="was replaced or revoked"):
        enrol_with(replaced, bundle)
    enrol_with(newer, bundle)

    (revoked,) = invited(served, "cy")
    with Administrator(served.administrator()) as administrator:
        administrator.revoke("cy")
    with pytest.raises(TrustError, match="was replaced or revoked"):
        enrol_with(revoked, bundle)

    other = fleet.serve(bundle, state=fleet.directory / "other")
    (foreign,) = invited(other, "dan")
    (local,) = invited(served, "dan")
    foreign.enrolment_port = local.enrolment_port
    with pytest.raises(TrustError, match="certificate of another authority"):
        enrol_with(foreign, bundle)
    foreign.authority = local.authority
    with pytest.raises(TrustError, match="not from here"):
        enrol_with(foreign, bundle)
    foreign.authority = b"junk"
    with pytest.raises(TrustError, match="holds no certificate"):
        enrol_with(foreign, bundle)
    assert set(ids(fleet.state)) == {"ben"}


def test_a_wrong_bundle_does_not_use_an_invitation_up(fleet: Fleet, served: Served) -> None:
    (invitation,) = invited(served, "ada")
    with pytest.raises(RefusedError, match="other shared tensors"):
        enrol_with(invitation, fleet.bundle(rank=4))
    enrol_with(invitation, fleet.bundle())


NOT_WHOLE = r"incomplete or altered|no invitation"
INVITATIONS = st.builds(
    pb.Invitation,
    name=st.text(st.characters(exclude_categories=["Cs"]), max_size=64).filter(is_name),
    token=st.binary(min_size=16, max_size=16),
    host=st.text(st.characters(codec="ascii"), max_size=40),
    port=st.integers(0, 65535),
    enrolment_port=st.integers(0, 65535),
    authority=st.binary(max_size=500),
)


@given(INVITATIONS, st.data())
def test_invitations_as_text(invitation: pb.Invitation, data: st.DataObject) -> None:
    text = invitations.encode(invitation)
    assert text.isalnum()
    assert text.isupper()
    copied = f" {text[:20]}\n{text[20:].lower()}\n"
    assert invitations.decode(copied) == invitation
    at = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(TrustError, match=NOT_WHOLE):
        invitations.decode(text[:at])
    other = data.draw(st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567").filter(text[at].__ne__))
    changed = text[:at] + other + text[at + 1 :]
    # The last letter may hold bits that belong to no byte.
    if at < len(text) - 1:
        with pytest.raises(TrustError, match=NOT_WHOLE):
            invitations.decode(changed)


@pytest.mark.parametrize("name", ["", "x" * 65, "é" * 33, "a\nb"])
def test_names_that_no_device_can_have(fleet: Fleet, served: Served, name: str) -> None:
    with pytest.raises(RefusedError, match="1 to 64 bytes"):
        invited(served, name)
    with pytest.raises(TrustError, match="incomplete or altered"):
        invitations.decode(invitations.encode(pb.Invitation(name=name)))


@given(st.text() | st.text(st.characters(codec="ascii")).map("COMIGS1".__add__))
def test_other_text_is_no_invitation(text: str) -> None:
    with pytest.raises(TrustError, match=NOT_WHOLE):
        invitations.decode(text)


# A home


def home_identity(home: Home, invitation: pb.Invitation, contract: str) -> Identity:
    return identity_from(
        invitation, home=home, contract=contract, tier="", patience=PATIENCE, traffic=Traffic()
    )


def test_a_home_enrols_once_whenever_it_is_killed(fleet: Fleet, served: Served) -> None:
    bundle = fleet.bundle()
    contract = contract_sha256(bundle.manifest)
    home = Home(fleet.directory / "home")
    (invitation,) = invited(served, "ada")
    # Killed after the coordinator answered, before the answer was saved.
    begun = Enrolment(invitation=invitations.token_sha256(invitation), key=new_key())
    home.save_enrolment(begun)
    enrol_with(invitation, bundle, key=begun.key)
    known = ids(fleet.state)

    identity = home_identity(home, invitation, contract)
    assert ids(fleet.state) == known
    assert identity == home.identity()
    assert home.enrolment() is None
    assert stat.S_IMODE((home.path / "identity.json").stat().st_mode) == 0o600
    # From here on the invitation is not used again, even if it would not work any more.
    with Administrator(served.administrator()) as administrator:
        administrator.invite("ada", 600)
    assert home_identity(home, invitation, contract) == identity
    fleet.client(identity).check_in(0)


def test_a_home_enrols_again_with_a_new_invitation(fleet: Fleet, served: Served) -> None:
    """The new device takes the place of the old one; a failed attempt costs nothing."""
    bundle = fleet.bundle()
    contract = contract_sha256(bundle.manifest)
    home = Home(fleet.directory / "home")
    (invitation,) = invited(served, "ada")
    old = home_identity(home, invitation, contract)
    (expired,) = invited(served, "ada", seconds=0.01)
    time.sleep(0.02)
    with pytest.raises(TrustError, match="has expired"):
        home_identity(home, expired, contract)
    assert home.identity() == old
    client = fleet.client(old)
    client.check_in(0)
    known = ids(fleet.state)

    (invitation,) = invited(served, "ada")
    new = home_identity(home, invitation, contract)
    assert home.identity() == new
    assert ids(fleet.state) == known
    fleet.client(new).check_in(0)
    with pytest.raises(TrustError, match="another one enrolled under its name"):
        client.check_in(0)


def test_a_device_that_enrols_again_is_counted_once(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--rounds", "1", "--exit-when-done")
    ada, ben = fleet.enrolled(served, bundle, "ada", "ben")
    join_round(ada, ben)
    start = ada.download(1)
    assert ada.upload(header(1), train(bundle, start, 0, 1)).accepted
    (again,) = fleet.enrolled(served, bundle, "ada")
    assert again.check_in(0).action == pb.CheckInReply.WAIT
    refused = again.upload(header(1), train(bundle, start, 2, 1))
    assert "already accepted" in refused.reason
    assert ben.upload(header(1), train(bundle, start, 1, 1)).accepted
    assert served.wait_for("round_closed")["updates"] == 2
    for client in (again, ben):
        finish(client, check_in_until(client, pb.CheckInReply.FINISH).round)
    served.end()


# What a certificate is good for


def request_for(name: str, key: object | None = None) -> pb.SigningRequest:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    key = key or ec.generate_private_key(ec.SECP256R1())
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, algorithm)
    return pb.SigningRequest(pkcs10=request.public_bytes(Encoding.DER))


def test_nobody_gets_a_certificate_for_another_name(fleet: Fleet, served: Served) -> None:
    bundle = fleet.bundle()
    ada, _ = fleet.enrolled(served, bundle, "ada", "ben")
    (invitation,) = invited(served, "cy")
    tampered = bytearray(request_for("cy").pkcs10)
    tampered[-5] ^= 1
    requests = {
        "only {name} can be certified": request_for("ben"),
        "EC key on P-256": request_for("{name}", ec.generate_private_key(ec.SECP384R1())),
        "an EC key": request_for("{name}", ed25519.Ed25519PrivateKey.generate()),
        "not signed with its own key": pb.SigningRequest(pkcs10=bytes(tampered)),
        "no certificate signing request": pb.SigningRequest(pkcs10=b"junk"),
    }
    with connect_to_enrol(invitation, PATIENCE) as anyone, connect(ada.who, PATIENCE) as device:
        enrolment = coordinator_pb2_grpc.EnrolmentStub(anyone.channel)
        coordinator = coordinator_pb2_grpc.CoordinatorStub(device.channel)
        for reason, request in requests.items():
            with pytest.raises(RefusedError, match=reason.format(name="cy")):
                anyone.retry(
                    lambda r=request: enrolment.Enroll(
                        pb.EnrollRequest(
                            token=invitation.token,
                            request=r,
                            contract_sha256=contract_sha256(bundle.manifest),
                        )
                    )
                )
            with pytest.raises(RefusedError, match=reason.format(name="ada")):
                device.retry(lambda r=request: coordinator.Renew(r))
    assert set(ids(fleet.state)) == {"ada", "ben"}
    enrol_with(invitation, bundle)


def test_a_device_cannot_name_another_one(fleet: Fleet, served: Served) -> None:
    """Whatever it claims in metadata, its calls are its own."""
    bundle = fleet.bundle()
    ada, ben = fleet.enrolled(served, bundle, "ada", "ben")
    join_round(ada, ben)
    update = train(bundle, ada.download(1), 0, 1)
    known = ids(fleet.state)
    eve = fleet.client(ada.who)
    eve._metadata = (
        ("comigs-device", known["ben"]),
        ("comigs-device-bin", b"ben"),
        ("x509_common_name", "ben"),
    )
    assert eve.upload(header(1), update).accepted
    assert served.wait_for("update_accepted")["device"] == "ada"
    assert ben.check_in(0).action == pb.CheckInReply.TRAIN


def test_roles_are_kept_apart(fleet: Fleet, served: Served) -> None:
    bundle = fleet.bundle()
    (ada,) = fleet.enrolled(served, bundle, "ada")
    with Administrator(ada.who) as impostor:
        for call in (
            impostor.devices,
            lambda: impostor.invite("eve", 600),
            lambda: impostor.revoke("ada"),
        ):
            with pytest.raises(TrustError, match="needs a certificate of the role administrator"):
                call()
    client = fleet.client(served.administrator())
    for call in (
        lambda: client.check_in(0),
        lambda: client.download(1),
        lambda: client.upload(header(1), b"x"),
        lambda: client.renew(served.administrator()),
    ):
        with pytest.raises(TrustError, match="needs a certificate of the role device"):
            call()
    assert ada.check_in(0).action == pb.CheckInReply.WAIT


def test_no_call_is_served_without_a_certificate_of_this_authority(
    fleet: Fleet, served: Served
) -> None:
    bundle = fleet.bundle()
    (ada,) = fleet.enrolled(served, bundle, "ada")
    other = fleet.serve(bundle, state=fleet.directory / "other")
    (ben,) = fleet.enrolled(other, bundle, "ada")
    ca = ada.who.ca.encode()
    for credentials in (
        grpc.ssl_channel_credentials(ca),
        grpc.ssl_channel_credentials(ca, ben.who.key.encode(), ben.who.certificate.encode()),
        grpc.ssl_channel_credentials(
            ca, ada.who.key.encode(), aged(ada.who, fleet.state, left=-HOUR).certificate.encode()
        ),
    ):
        with grpc.secure_channel(served.ready(), credentials) as channel:
            stub = coordinator_pb2_grpc.CoordinatorStub(channel)
            admin = coordinator_pb2_grpc.AdminStub(channel)
            health = channel.unary_unary("/grpc.health.v1.Health/Check")
            for call, request in (
                (stub.CheckIn, pb.CheckInRequest()),
                (admin.ListDevices, pb.ListDevicesRequest()),
                (health, b""),
            ):
                with pytest.raises(grpc.RpcError) as refused:
                    call(request, timeout=10)
                assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


def test_a_device_cannot_pose_as_the_coordinator(fleet: Fleet, served: Served) -> None:
    """Not even one that an administrator called like a host: its certificate is for clients."""
    ada, eve = fleet.enrolled(served, fleet.bundle(), "ada", "localhost")
    chain = [(eve.who.key.encode(), eve.who.certificate.encode())]
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("localhost:0", grpc.ssl_server_credentials(chain))
    server.start()
    with pytest.raises(TrustError, match="certificate of another authority"):
        fleet.client(replace(ada.who, coordinator=f"localhost:{port}")).check_in(0)
    server.stop(None)


def test_the_enrolment_port_serves_nothing_else(fleet: Fleet, served: Served) -> None:
    (ada,) = fleet.enrolled(served, fleet.bundle(), "ada")
    client = fleet.client(replace(ada.who, coordinator=served.listening["enrolment"]))
    with pytest.raises(RefusedError, match="no coordinator of this version"):
        client.check_in(0)


@pytest.mark.parametrize("port", ["address", "enrolment"])
def test_tls_1_3_only(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    """Also where gRPC is told otherwise by the environment."""
    monkeypatch.setenv("GRPC_SSL_CIPHER_SUITES", "ECDHE-ECDSA-AES128-GCM-SHA256")
    served = fleet.serve(fleet.bundle())
    host, _, number = served.listening[port].rpartition(":")

    def handshake(version: ssl.TLSVersion) -> str | None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.minimum_version = context.maximum_version = version
        context.set_ciphers("ALL:@SECLEVEL=0")
        with (
            socket.create_connection((host, int(number)), timeout=10) as plain,
            context.wrap_socket(plain) as secure,
        ):
            return secure.version()

    assert handshake(ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    with pytest.raises(ssl.SSLError):
        handshake(ssl.TLSVersion.TLSv1_2)


# Revocation


def test_revocation_ends_what_is_open(fleet: Fleet) -> None:
    """A held check-in, a download and an upload end at once; the round goes on without it."""
    # 20 MB: gRPC lets up to 16 be on their way to a device that does not read.
    bundle = fleet.bundle(width=2_500_000)
    served = fleet.serve(bundle, "--rounds", "1", "--deadline", "600")
    ada, ben, eve = fleet.enrolled(served, bundle, "ada", "ben", "eve")
    join_round(ada, ben, eve)
    start = ada.download(1)
    assert ada.upload(header(1), train(bundle, start, 0, 1)).accepted
    revoked = threading.Event()

    def endless() -> Iterator[pb.UploadPart]:
        first = header(1)
        first.total_bytes, first.sha256 = len(start), bytes(32)
        yield pb.UploadPart(header=first)
        revoked.wait(TIMEOUT)

    with (
        connect(eve.who, PATIENCE) as connection,
        connect(ben.who, PATIENCE) as other,
        Administrator(served.administrator()) as administrator,
    ):
        stub = coordinator_pb2_grpc.CoordinatorStub(connection.channel)
        assert ben.upload(header(1), start).accepted
        held = coordinator_pb2_grpc.CoordinatorStub(other.channel).CheckIn.future(
            pb.CheckInRequest(wait_seconds=30)
        )
        download = stub.Download(pb.DownloadRequest(round=1))
        rest = [next(download).data]
        upload = stub.Upload.future(endless())
        gathered = f"updates/*/{ids(fleet.state)['eve']}/*.partial"
        until(lambda: bool(files_of(fleet.state, gathered)), "the upload does not arrive")
        administrator.revoke("eve")
        assert upload.code() == grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.RpcError) as cut:
            rest.extend(chunk.data for chunk in download)
        revoked.set()
        assert cut.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert len(b"".join(rest)) < len(start)
        assert served.wait_for("round_closed")["updates"] == 2
        assert held.result(timeout=10).action == pb.CheckInReply.FINISH
    for call in (
        lambda: eve.check_in(20),
        lambda: eve.download(1),
        lambda: eve.upload(header(1), start),
        lambda: eve.renew(eve.who),
    ):
        with pytest.raises(TrustError, match="was revoked"):
            call()


def test_revocation_ends_a_held_check_in_and_outlives_restarts(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle)
    ada, ben, cy = fleet.enrolled(served, bundle, "ada", "ben", "cy")
    with (
        ThreadPoolExecutor() as pool,
        Administrator(served.administrator()) as administrator,
    ):
        held = pool.submit(ada.check_in, 30)
        until(lambda: seen(administrator, "ada"), "the check-in does not arrive")
        administrator.revoke("ada")
        with pytest.raises(TrustError, match="was revoked"):
            held.result()
        administrator.revoke("ada")  # as when the first answer was lost
        with pytest.raises(RefusedError, match="no device is called dan"):
            administrator.revoke("dan")
        assert cy.check_in(0).action == pb.CheckInReply.WAIT
        administrator.revoke("cy")
        # They are not present any more: ben alone does not open a round of two.
        assert ben.check_in(0.3).action == pb.CheckInReply.WAIT
    address = served.ready()
    served.kill()
    again = fleet.serve(bundle, "--enrolment-port", "0", listen=address)
    again.ready()
    assert ben.check_in(0).action == pb.CheckInReply.WAIT
    with pytest.raises(TrustError, match="was revoked"):
        ada.check_in(0)


def test_revocation_of_the_last_missing_device_closes_the_session(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--rounds", "1", "--min-devices", "1", "--exit-when-done")
    ada, eve = fleet.enrolled(served, bundle, "ada", "eve")
    join_round(ada, eve)
    assert ada.upload(header(1), train(bundle, ada.download(1), 0, 1)).accepted
    with Administrator(served.administrator()) as administrator:
        administrator.revoke("eve")
    final = check_in_until(ada, pb.CheckInReply.FINISH)
    ada.check_in(0, stored_round=final.round)
    assert served.end()[-1]["event"] == "finished"


# Renewal


def test_renewal(fleet: Fleet) -> None:
    """A certificate of ten seconds: renewed in time it goes on, else it stops, even when open."""
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--certificate-days", str(10 / 86400))
    ada, ben, cy = fleet.enrolled(served, bundle, "ada", "ben", "cy")
    ben.check_in(0)
    first = ada.who
    assert not first.needs_renewal()
    until(first.needs_renewal, "it is never due")
    renewed = ada.renew(first)
    assert renewed.key != first.key
    assert renewed.valid_until > first.valid_until
    assert (renewed.name, renewed.invitation) == ("ada", first.invitation)
    ada.check_in(0)
    ada.use(renewed)
    ada.check_in(0)
    assert set(ids(fleet.state)) == {"ada", "ben", "cy"}

    until(lambda: datetime.datetime.now(datetime.UTC) > cy.who.valid_until, "it never lapses")
    with pytest.raises(TrustError, match="has lapsed"):
        ben.check_in(0)  # its connection is open still
    for late in (lambda: cy.check_in(0), lambda: fleet.client(cy.who)):
        with pytest.raises(TrustError, match=r"lapsed on .* ask for a new invitation"):
            late()
    ada.check_in(0)


def test_renewal_where_the_device_s_clock_is_another(fleet: Fleet) -> None:
    """A certificate that has just come is fresh, and one that has been here for long is not."""
    bundle = fleet.bundle()
    (ada,) = fleet.enrolled(fleet.serve(bundle, "--certificate-days", "30"), bundle, "ada")
    now, day = time.time(), 86400
    assert not ada.who.needs_renewal()
    assert not replace(ada.who, received=now - 19 * day).needs_renewal()
    assert replace(ada.who, received=now - 21 * day).needs_renewal()
    assert replace(ada.who, received=now + day).needs_renewal(), "the clock was set back"

    # By a clock that is far ahead, what has just come is about to lapse; it was set right, and its
    # dates say more than when it came.
    late = aged(ada.who, fleet.state, left=datetime.timedelta(days=5))
    assert not replace(late, received=now).needs_renewal()
    assert replace(late, received=now - 2 * day).needs_renewal()
    assert abs(ada.who.received - now) < 60


def test_who_starts_before_its_clock_is_right_waits_for_that(fleet: Fleet) -> None:
    bundle, waited = fleet.bundle(), list[str]()
    (ada,) = fleet.enrolled(fleet.serve(bundle), bundle, "ada")
    other = Authority.open(fleet.state.parent / "other", datetime.timedelta(days=30))
    stranger = replace(ada.who, ca=other.pem.decode())
    client = fleet.client(stranger, Patience(1, waited.append))
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
    client._connection._began = later  # as if this machine's clock were a day behind
    with pytest.raises(UnreachableError, match="before the coordinator was set up"):
        client.check_in(0)
    with pytest.raises(TrustError, match="or this machine's clock is wrong"):
        fleet.client(stranger).check_in(0)


# The administrator


def test_only_the_present_administrator_is_one(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    served = fleet.serve(bundle)
    first = served.administrator()
    with Administrator(first) as administrator:
        assert not administrator.devices()
    served.stop()
    # A restart keeps it, under the new address.
    served = fleet.serve(bundle)
    assert served.administrator() == replace(first, coordinator=served.ready())
    served.stop()
    (fleet.state / "admin.json").unlink()
    served = fleet.serve(bundle)
    with (
        Administrator(replace(first, coordinator=served.ready())) as administrator,
        pytest.raises(TrustError, match="was replaced"),
    ):
        administrator.devices()
    with Administrator(served.administrator()) as administrator:
        assert not administrator.devices()


@pytest.mark.parametrize("name", [CA_FILE, CA_KEY_FILE, ADMIN_FILE])
def test_a_damaged_file_is_named(fleet: Fleet, name: str) -> None:
    served = fleet.serve(fleet.bundle())
    served.ready()
    served.stop()
    (fleet.state / name).write_text("{}")
    again = fleet.serve(fleet.bundle())
    stderr = " ".join(again.stderr().split())
    assert again.process.wait(30) == TrustError.code
    assert name in stderr
    assert "restore" in stderr
    assert "Traceback" not in stderr


def comigs(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "coordinator", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def test_commands_of_the_administrator(fleet: Fleet, served: Served) -> None:
    admin = ("--admin", served.listening["admin"])
    done = comigs("invite", "ada", "bén", *admin)
    assert done.returncode == 0, done.stderr
    texts = done.stdout.split()
    assert [invitations.decode(text).name for text in texts] == ["ada", "bén"]
    assert "for one device, ada, until" in done.stderr
    identities = [enrol_with(invitations.decode(text), fleet.bundle()) for text in texts]

    done = comigs("invite", "cy", "--qr", *admin)
    *rows, text = done.stdout.splitlines()
    assert invitations.decode(text).name == "cy"
    assert {len(row) for row in rows} == {79}, "one row of a QR code, no wider than a terminal"
    done = comigs("invite", "cy", "--hours", 1, *admin, "--format", "json")
    (entry,) = json.loads(done.stdout)["invitations"]
    assert invitations.decode(entry["invitation"]).name == entry["name"] == "cy"
    assert 3500 < entry["expires_at"] - time.time() < 3700

    fleet.client(identities[0]).check_in(0)
    done = comigs("revoke", "nobody", "bén", "no-one", *admin, "--format", "json")
    assert (done.returncode, json.loads(done.stdout)) == (RefusedError.code, {"revoked": ["bén"]})
    assert "called nobody" in done.stderr
    assert "called no-one" in done.stderr
    assert comigs("revoke", "cy", *admin).stdout == "cy is revoked\n"
    ada, ben = json.loads(comigs("devices", *admin, "--format", "json").stdout)["devices"]
    assert (ada["name"], ben["name"]) == ("ada", "bén")
    assert ada["tier"] == ben["tier"] == "phone-low"
    assert ada["enrolled_at"] <= ada["last_seen"] <= time.time() < ada["valid_until"]
    assert (ada["revoked_at"], ben["last_seen"]) == (None, None)
    assert ben["revoked_at"] >= ben["enrolled_at"]
    table = comigs("devices", *admin).stdout
    assert re.search(r"name +cohort +tier +enrolled +certificate until +last seen +revoked", table)
    assert re.search(r"bén +default +phone-low( +[-0-9]+ [:0-9]+){2} +- +[-0-9]+ [:0-9]+", table)


def test_what_an_administrator_gets_wrong(fleet: Fleet, served: Served) -> None:
    path = Path(served.listening["admin"])
    admin = ("--admin", path)
    damaged = fleet.directory / "damaged.json"
    damaged.write_text(path.read_text()[:-100])
    fleet.enrolled(served, fleet.bundle(), "ada")
    nobody = f"127.0.0.1:{free_port()}"
    for arguments, code, message in (
        (("devices", "--admin", fleet.directory / "none.json"), 15, "give --admin"),
        (("devices", "--admin", damaged), 15, "is damaged"),
        (("devices", *admin, "--coordinator", nobody), 14, "no answer from the coordinator"),
        (("revoke", "eve", *admin), 21, "no device is called eve"),
        (("invite", "", *admin), 2, "1 to 64 bytes"),
        (("invite", "é" * 33, *admin), 2, "1 to 64 bytes"),
        (("invite", "\udcff", *admin), 2, "1 to 64 bytes"),
        (("invite", "eve", "--hours", "0", *admin), 21, "up to 720 hours"),
        (("invite", "eve", "--hours", "nan", *admin), 21, "up to 720 hours"),
        (("invite", *admin), 2, "Missing argument"),
    ):
        done = comigs(*arguments)
        assert done.returncode == code, (arguments, done.stderr)
        assert message in " ".join(done.stderr.split())
        assert "Traceback" not in done.stderr
        assert not done.stdout
    assert set(ids(fleet.state)) == {"ada"}
