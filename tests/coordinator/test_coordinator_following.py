"""Several coordinators on one PostgreSQL share the fleet; each may be killed at any moment.

8 kills; with COMIGS_SOAK=1, 80.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import grpc
import numpy as np
import pytest
from coordinator_help import (
    PATIENCE,
    Fleet,
    Served,
    check_in_until,
    enrol_with,
    free_port,
    header,
    in_parallel,
    invited,
    join_round,
    mean_of,
    train,
    until,
)
from masking_help import Masked, expected, joined, step_of, vector
from postgres_help import live, replay, rows

from coordinator.administrator import Administrator
from coordinator.tls import Authority
from edge_runtime import wire
from edge_runtime.bundle import Bundle
from edge_runtime.client import Client
from edge_runtime.connection import Patience, connect
from edge_runtime.errors import DataError, RefusedError, TrustError, UnreachableError
from edge_runtime.identity import Identity, public_key_of
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc, link_pb2, link_pb2_grpc

SOAK = bool(os.environ.get("COMIGS_SOAK"))


def serve_three(fleet: Fleet, bundle: Bundle, *options: str) -> tuple[Served, Served, Served]:
    """One that leads, and two that follow."""
    leader = fleet.serve(bundle, *options)
    leader.ready()
    followers = fleet.serve(bundle, *options), fleet.serve(bundle, *options)
    for follower in followers:
        follower.wait_for("following")
    return leader, *followers


def address(served: Served) -> str:
    (listening,) = (e for e in served.events if e["event"] in ("listening", "following"))
    return str(listening["address"])


def at(fleet: Fleet, served: Served, client: Client, **more: Patience) -> Client:
    """The same device at another coordinator."""
    assert isinstance(client.who, Identity)
    return fleet.client(replace(client.who, coordinator=address(served)), **more)


def at_each(fleet: Fleet, processes: tuple[Served, ...], bundle: Bundle) -> list[Client]:
    """A device at each."""
    names = [f"device {index}" for index in range(len(processes))]
    enrolled = fleet.enrolled(processes[0], bundle, *names)
    return [at(fleet, *pair) for pair in zip(processes, enrolled, strict=True)]


def test_one_whose_gate_cannot_measure_does_not_stand_by(
    fleet: Fleet, tiny_bundle: Bundle, url: str
) -> None:
    leader = fleet.serve(tiny_bundle, "--database", url)
    leader.ready()
    gate = ("--quality-gate", str(fleet.directory / "nowhere"))
    standby = fleet.serve(tiny_bundle, "--database", url, *gate)
    assert standby.process.wait(timeout=60) == DataError.code
    assert "nowhere" in standby.stderr()
    assert not standby.has_said("standing_by")


def test_one_with_another_directory_does_no_harm(fleet: Fleet, url: str) -> None:
    """Mistyped, or not mounted."""
    bundle = fleet.bundle()
    leader = fleet.serve(bundle, "--database", url)
    leader.ready()
    elsewhere = fleet.directory / "elsewhere"
    wrong = fleet.serve(bundle, "--database", url, state=elsewhere)
    assert "has no authority" in wrong.wait_for("not_ready")["reason"]
    assert not (elsewhere / "ca.pem").exists(), "it was made for nobody"
    before = rows(url, "select term from lead")
    leader.kill()
    assert "lacks generalists/1-" in wrong.wait_for("not_ready")["reason"]
    assert rows(url, "select term from lead") == before, "who leads would end"
    wrong.stop()
    fleet.serve(bundle, "--database", url).ready()


def test_devices_at_three_coordinators_are_in_the_same_rounds(fleet: Fleet, url: str) -> None:
    bundle = fleet.bundle(width=20_000)
    options = ("--database", url, "--rounds", "3", "--min-devices", "3", "--exit-when-done")
    processes = serve_three(fleet, bundle, *options)
    clients = at_each(fleet, processes, bundle)
    lives = in_parallel(*(lambda i=i: live(bundle, clients[i], i) for i in range(3)))
    assert processes[0].end()[-1]["event"] == "finished"
    final = replay(fleet, bundle, url, [acknowledged for acknowledged, _ in lives])
    assert [generalist for _, generalist in lives] == [final] * 3


def test_a_device_goes_on_at_another_coordinator(fleet: Fleet, url: str) -> None:
    """With the invitation, the upload that broke, and the next rounds."""
    bundle = fleet.bundle(width=300_000)  # 2.4 MB
    leader, second, third = serve_three(fleet, bundle, "--database", url, "--min-devices", "1")
    (invitation,) = invited(leader, "ada")
    (following,) = (e for e in second.events if e["event"] == "following")
    invitation.enrolment_port = int(following["enrolment"].rpartition(":")[2])
    ada = fleet.client(enrol_with(invitation, bundle))
    ada = at(fleet, second, ada)
    number = check_in_until(ada, pb.CheckInReply.TRAIN).round
    update = train(bundle, ada.download(number), 0, number)
    announced = header(number, total_bytes=len(update), sha256=hashlib.sha256(update).digest())
    half = len(update) // 2
    sent = threading.Event()

    def first_half() -> Iterator[pb.UploadPart]:
        yield pb.UploadPart(header=announced)
        for data in wire.chunks(update[:half]):
            yield pb.UploadPart(data=data)
        sent.set()
        threading.Event().wait(60)

    with connect(ada.who, PATIENCE) as raw:
        call = coordinator_pb2_grpc.CoordinatorStub(raw.channel).Upload.future(first_half())
        assert sent.wait(30)
        (partial,) = fleet.state.glob("updates/*/*/*.partial")
        until(lambda: partial.stat().st_size == half, "not all that was sent came")
        elsewhere = at(fleet, third, ada)
        impatient = at(fleet, third, ada, patience=Patience(0, on_wait=lambda _: None))
        with pytest.raises(UnreachableError, match="another process has this update open"):
            impatient.upload(announced, update, resume=True)
        call.cancel()
    assert elsewhere.upload(header(number), update, resume=True).accepted
    assert elsewhere.traffic.sent < len(update) - half + 10_000
    leader.wait_for("round_closed", updates=1)
    nxt = check_in_until(at(fleet, leader, ada), pb.CheckInReply.TRAIN).round
    final = wire.encode(bundle.manifest, {"generalist": mean_of(bundle, [update])})
    assert {at(fleet, each, ada).download(nxt) for each in (leader, second, third)} == {final}


def test_what_the_administrator_does_holds_at_every_coordinator(fleet: Fleet, url: str) -> None:
    """Revoked at one, refused at the others, also where a call is open; refusals are in the one
    audit log."""
    bundle = fleet.bundle(width=100_000)
    processes = serve_three(fleet, bundle, "--database", url, "--min-devices", "3")
    leader, second, _ = processes
    ada, ben, cy = at_each(fleet, processes, bundle)
    numbers = {reply.round for reply in join_round(ada, ben, cy)}
    assert numbers == {1}
    start = ben.download(1)
    bad = wire.encode(bundle.manifest, {"generalist": np.full(200_016, np.nan, np.float32)})
    reply = cy.upload(header(1), bad)
    assert not reply.accepted
    assert "NaN" in reply.reason
    assert leader.wait_for("update_refused")["kind"] == "malformed"

    administrator = replace(leader.administrator(), coordinator=address(second))
    with Administrator(administrator) as elsewhere, connect(cy.who, PATIENCE) as raw:
        assert [entry.name for entry in elsewhere.devices()] == [f"device {i}" for i in range(3)]
        elsewhere.pause()
        begun, over = threading.Event(), threading.Event()

        def slowly() -> Iterator[pb.UploadPart]:
            yield pb.UploadPart(header=header(1, total_bytes=len(start), sha256=bytes(32)))
            yield pb.UploadPart(data=start[:1000])
            begun.set()
            over.wait(60)

        stub = coordinator_pb2_grpc.CoordinatorStub(raw.channel)
        uploading = stub.Upload.future(slowly())
        waiting = stub.CheckIn.future(pb.CheckInRequest(wait_seconds=30, protocol=4))
        assert begun.wait(30)
        elsewhere.revoke("device 2")
        for call in (uploading, waiting):
            assert "revoked" in call.exception(30).details()
        over.set()
        for each in processes:
            again = at(fleet, each, cy)
            for attempt in (lambda c=again: c.check_in(0), lambda c=again: c.download(1)):
                with pytest.raises(TrustError, match="revoked"):
                    attempt()
        with pytest.raises(RefusedError, match="no round 9"):
            elsewhere.roll_back(9)
        elsewhere.resume()
    logged = [json.loads(line) for line in (fleet.state / "audit.jsonl").open()]
    acts = {entry["act"] for entry in logged if entry["event"] == "act"}
    assert {"Pause", "Revoke", "Resume", "RollBack"} <= acts
    calls = {entry["call"] for entry in logged if entry["event"] == "call_refused"}
    assert {"Download", "CheckIn"} <= calls
    for seed, client in enumerate((ada, ben)):
        assert client.upload(header(1), train(bundle, start, seed, 1)).accepted
    assert rows(url, "select count(*) from updates") == [(2,)]


def test_who_has_other_bundles_or_only_a_devices_certificate_is_not_let_in(
    fleet: Fleet, url: str
) -> None:
    bundle, other = fleet.bundle(), fleet.bundle(width=24)
    leader = fleet.serve(bundle, "--database", url)
    leader.ready()
    second = fleet.serve(bundle, "--bundle", str(other.path), "--database", url)
    second.wait_for("not_following")
    strange = fleet.serve(other, "--database", url)
    assert "another base" in strange.wait_for("not_following")["reason"]
    assert strange.process.poll() is None
    (ada,) = fleet.enrolled(leader, bundle, "ada")
    assert isinstance(ada.who, Identity)
    ((link,),) = rows(url, "select address from lead")
    as_device = replace(ada.who, coordinator=link)
    with connect(as_device, PATIENCE) as raw:
        stub = link_pb2_grpc.LinkStub(raw.channel)
        with pytest.raises(grpc.RpcError) as refused:  # in the handshake
            stub.GetTerms(link_pb2.GetTermsRequest(), timeout=10)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    # With what certifies coordinators, too, a device would be no coordinator.
    authority = Authority.open(fleet.state, datetime.timedelta(days=1)).for_links()
    issued = authority.issue_to_device(public_key_of(as_device.key), "ada", "another")
    with connect(replace(as_device, certificate=issued.pem), PATIENCE) as raw:
        stub = link_pb2_grpc.LinkStub(raw.channel)
        with pytest.raises(grpc.RpcError, match="this is between coordinators"):
            stub.GetTerms(link_pb2.GetTermsRequest(), timeout=10)
        # As a coordinator would speak for the administrator, who may list devices.
        speaking = (("comigs-caller-bin", leader.administrator().certificate.encode()),)
        admin = coordinator_pb2_grpc.AdminStub(raw.channel)
        with pytest.raises(grpc.RpcError, match="this one's is device"):
            admin.ListDevices(pb.ListDevicesRequest(), timeout=10, metadata=speaking)


def test_secure_aggregation_over_two_coordinators(fleet: Fleet, url: str) -> None:
    bundle = fleet.bundle()
    options = ("--database", url, "--secure-aggregation", "--min-devices", "3", "--rounds", "1")
    leader, second, _ = serve_three(fleet, bundle, *options, "--stage-seconds", "10")
    clients = fleet.enrolled(leader, bundle, *(f"device {i}" for i in range(4)))
    clients[2:] = [at(fleet, second, client) for client in clients[2:]]
    number = in_parallel(*(lambda c=c: joined([c]) for c in clients))[0]
    start = vector(bundle, clients[3].download(number))
    steps = [step_of(bundle, i, number) for i in range(4)]
    in_parallel(*(lambda i=i: Masked(clients[i], number).run(steps[i]) for i in range(4)))
    leader.wait_for("round_closed", round=number)
    got = vector(bundle, clients[3].download(number + 1))
    np.testing.assert_array_equal(got, expected(start, steps, group=4))


@pytest.mark.timeout(300)
def test_kills_of_any_of_three_coordinators(fleet: Fleet, url: str) -> None:
    """On one port, which the kernel deals out; while devices send without a pause."""
    kills, devices = 80 if SOAK else 8, 4
    bundle = fleet.bundle(width=100_000)  # four chunks
    listen, enrolment = f"127.0.0.1:{free_port()}", str(free_port())
    options = ("--database", url, "--min-devices", str(devices), "--enrolment-port", enrolment)

    def start(rounds: int = 10**6) -> Served:
        return fleet.serve(bundle, *options, "--rounds", str(rounds), listen=listen)

    processes = [start()]
    processes[0].ready()
    processes += [start(), start()]
    for follower in processes[1:]:
        follower.wait_for("following")
    clients = fleet.enrolled(processes[0], bundle, *(f"device {i}" for i in range(devices)))
    killed = {"listening": 0, "following": 0}

    def leading() -> Served:
        found: list[Served] = []

        def look() -> bool:
            found.extend(each for each in processes if each.has_said("listening"))
            return bool(found)

        until(look, "nobody takes the lead")
        return found[0]

    def kill_again_and_again() -> None:
        moments = random.Random(3)
        for _ in range(kills):
            leader = leading()
            leader.wait_for("update_accepted")
            time.sleep(moments.uniform(0, 0.1))
            follower = moments.choice([each for each in processes if each is not leader])
            victim = moments.choice([leader, follower])
            killed["listening" if victim is leader else "following"] += 1
            victim.kill()
            processes.remove(victim)
            processes.append(start())
            processes[-1].wait_for("standing_by")
        leading().wait_for("round_closed")
        for each in processes:
            each.kill()
        ended = "select count(*) from rounds where status = 'aggregated'"
        start(rounds=rows(url, ended)[0][0] + 2)

    *lives, _ = in_parallel(
        *(lambda i=i: live(bundle, clients[i], i) for i in range(devices)), kill_again_and_again
    )
    final = replay(fleet, bundle, url, [dict(acknowledged) for acknowledged, _ in lives])
    assert [generalist for _, generalist in lives] == [final] * devices
    assert rows(url, "select count(*) from refusals") == [(0,)]
    assert min(killed.values()) > 0
    print(
        f"killed {killed['listening']} that led and {killed['following']} that followed: "
        f"{sum(len(acknowledged) for acknowledged, _ in lives)} updates were acknowledged, each "
        "counted once"
    )
