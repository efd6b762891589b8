"""A coordinator killed at any moment counts every acknowledged update exactly once.

20 kills; with COMIGS_SOAK=1, 200.
"""

import os
import random
import sqlite3
import threading
import time

import numpy as np
import pytest
from coordinator_help import (
    PATIENCE,
    Fleet,
    Served,
    enrol_with,
    finish,
    free_port,
    header,
    ids,
    in_parallel,
    invited,
    mean_of,
    train,
    until,
)

from edge_runtime import adapters, wire
from edge_runtime.bundle import Bundle
from edge_runtime.client import Client
from edge_runtime.connection import connect
from protos import coordinator_pb2 as pb
from protos import coordinator_pb2_grpc

SOAK = bool(os.environ.get("COMIGS_SOAK"))
DEVICES = 4


def live(bundle: Bundle, client: Client, seed: int) -> tuple[dict[int, bytes], bytes]:
    """A device's acknowledged updates by round, and the final generalist. It sends without a pause,
    but for some rounds in which it trains for a moment."""
    pace = random.Random(seed)
    acknowledged: dict[int, bytes] = {}
    while True:
        reply = client.check_in(2)
        if reply.action == pb.CheckInReply.FINISH:
            return acknowledged, finish(client, reply.round)
        if reply.action == pb.CheckInReply.TRAIN:
            update = train(bundle, client.download(reply.round), seed, reply.round)
            if pace.random() < 0.3:
                time.sleep(pace.uniform(0, 0.1))
            assert client.upload(header(reply.round), update).accepted
            assert reply.round not in acknowledged, "asked to train a round again"
            acknowledged[reply.round] = update


def torment(client: Client, size: int) -> int:
    """A device that takes part and hangs up in the middle of its uploads, until it sends one that
    is refused. Returns how many it broke off, none of which may count."""
    broken_off = 0
    with connect(client.who, PATIENCE) as raw:
        stub = coordinator_pb2_grpc.CoordinatorStub(raw.channel)
        while (reply := client.check_in(2)).action != pb.CheckInReply.FINISH:
            if reply.action != pb.CheckInReply.TRAIN:
                continue
            for _ in range(3):
                broken_off += break_off(stub, header(reply.round, total_bytes=size))
            assert not client.upload(header(reply.round), bytes(size)).accepted
    return broken_off


def break_off(stub: coordinator_pb2_grpc.CoordinatorStub, announced: pb.UploadHeader) -> bool:
    """Hangs up after the first chunk. Returns whether it got that far."""
    sent, over = threading.Event(), threading.Event()
    announced.sha256 = bytes(32)

    def begin():
        yield pb.UploadPart(header=announced)
        yield pb.UploadPart(data=bytes(wire.CHUNK_BYTES))
        sent.set()
        over.wait()

    call = stub.Upload.future(begin())
    call.add_done_callback(lambda _: sent.set())
    sent.wait()
    broken_off = call.cancel()
    over.set()
    return broken_off


class Mean:
    """What a round makes of the updates, by numpy."""

    options: tuple[str, ...] = ()

    def close(self, bundle: Bundle, generalist: bytes, updates: list[bytes]) -> np.ndarray:
        return mean_of(bundle, updates)


class Adam:
    """FedAdam (Reddi et al. 2021, algorithm 2) in float64; remembers what a kill must not cost."""

    options = ("--server-optimizer", "adam", "--server-rate", "0.05")
    m, v = 0.0, 1e-3**2

    def close(self, bundle: Bundle, generalist: bytes, updates: list[bytes]) -> np.ndarray:
        start, *vectors = (
            wire.decode(bundle.manifest, payload)["generalist"].astype(np.float64)
            for payload in (generalist, *updates)
        )
        delta = sum(vectors) / len(vectors) - start
        self.m = 0.9 * self.m + (1 - 0.9) * delta
        self.v = 0.99 * self.v + (1 - 0.99) * delta**2
        return (start + 0.05 * self.m / (np.sqrt(self.v) + 1e-3)).astype(np.float32)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("reference", "kills"), [(Mean(), 14), (Adam(), 6)], ids=["mean", "adam"])
def test_kills_at_random_moments(fleet: Fleet, reference: Mean | Adam, kills: int) -> None:
    kills *= 10 if SOAK else 1
    bundle = fleet.bundle(width=100_000)  # four chunks
    listen = f"127.0.0.1:{free_port()}"
    options = ("--min-devices", str(DEVICES), "--enrolment-port", "0", *reference.options)

    def start(rounds: int = 10**6) -> Served:
        return fleet.serve(bundle, *options, "--rounds", str(rounds), listen=listen)

    served = start()
    names = [*(f"device {index}" for index in range(DEVICES)), "eve"]
    *clients, eve = fleet.enrolled(served, bundle, *names)
    fresh = wire.encode(bundle.manifest, adapters.load_fresh(bundle))

    def kill_again_and_again() -> None:
        moments, current = random.Random(7), served
        for kill in range(kills):
            if kill % 10 == 9:
                time.sleep(moments.uniform(0, 1.5))  # perhaps before it listens
            else:
                # Around arrivals, and the end of a round.
                for _ in range(moments.randrange(1, 2 * DEVICES)):
                    event = current.wait_for("update_accepted")
                if moments.random() < 0.3:
                    current.wait_for("round_closed", round=event["round"])
                time.sleep(moments.uniform(0, 0.06))
            current.kill()
            current = start()
        current.wait_for("round_closed")
        current.kill()
        start(rounds=count(fleet, "rounds where status = 'aggregated'") + 2)

    *lives, broken_off, _ = in_parallel(
        *(lambda i=i: live(bundle, clients[i], i) for i in range(DEVICES)),
        lambda: torment(eve, len(fresh)),
        kill_again_and_again,
    )

    rounds = count(fleet, "rounds where status = 'aggregated'")
    known = ids(fleet.state)
    order = sorted(range(DEVICES), key=lambda i: known[f"device {i}"])
    generalist = fresh
    for number in range(1, rounds + 1):
        updates = [lives[index][0].pop(number) for index in order]
        expected = [train(bundle, generalist, index, number) for index in order]
        assert updates == expected, f"round {number} started from something else"
        closed = reference.close(bundle, generalist, updates)
        generalist = wire.encode(bundle.manifest, {"generalist": closed})
    assert lives == [({}, generalist)] * DEVICES
    assert count(fleet, "updates") == rounds * DEVICES
    assert count(fleet, f"refusals where device != '{known['eve']}'") == 0
    memories = list((fleet.state / "memories").glob("*"))
    assert len(memories) == bool(reference.options), "only the next round's is kept"
    print(
        f"killed {kills} times in {rounds} rounds: {rounds * DEVICES} updates were acknowledged, "
        f"each counted once; {broken_off} were broken off, none counted"
    )


def count(fleet: Fleet, what: str) -> int:
    with sqlite3.connect(fleet.state / "coordinator.sqlite3") as connection:
        return int(connection.execute(f"select count(*) from {what}").fetchone()[0])


def test_kills_while_devices_enrol_do_not_cost_them_their_invitations(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    listen, port = f"127.0.0.1:{free_port()}", ("--enrolment-port", str(free_port()))
    served = fleet.serve(bundle, *port, listen=listen)
    names = [f"device {index}" for index in range(60)]
    invitations = invited(served, *names)

    enrolled: list[str] = []

    def enrol() -> None:
        for invitation in invitations:
            client = fleet.client(enrol_with(invitation, bundle))
            client.check_in(0)
            client.close()
            enrolled.append(invitation.name)

    def kill_twice() -> None:
        current = served
        for least in (5, 25):
            until(lambda least=least: len(enrolled) >= least, "nobody enrols")
            current.kill()
            assert len(enrolled) < len(names), "some had still to enrol"
            current = fleet.serve(bundle, *port, listen=listen)
            current.ready()

    in_parallel(enrol, kill_twice)
    with sqlite3.connect(fleet.state / "coordinator.sqlite3") as connection:
        known = connection.execute("select name from devices order by name").fetchall()
    assert known == [(name,) for name in sorted(names)]
