"""A coordinator killed at any moment counts every acknowledged update exactly once."""

import random
import sqlite3
import threading
import time

import numpy as np
import pytest
from coordinator_help import (
    Fleet,
    enrol_with,
    finish,
    free_port,
    header,
    ids,
    in_parallel,
    invited,
    mean_of,
    train,
)

from edge_runtime import adapters, wire
from edge_runtime.bundle import Bundle
from edge_runtime.client import Client
from protos import coordinator_pb2 as pb

KILLS = 12
ROUNDS = 20
DEVICES = 3


def live(bundle: Bundle, client: Client, seed: int) -> tuple[dict[int, bytes], bytes]:
    """A device's acknowledged updates by round, and the final generalist."""
    pace = random.Random(seed)
    acknowledged: dict[int, bytes] = {}
    while True:
        reply = client.check_in(2)
        if reply.action == pb.CheckInReply.FINISH:
            return acknowledged, finish(client, reply.round)
        if reply.action == pb.CheckInReply.TRAIN:
            update = train(bundle, client.download(reply.round), seed, reply.round)
            time.sleep(pace.uniform(0, 0.08))
            assert client.upload(header(reply.round), update).accepted
            assert reply.round not in acknowledged, "asked to train a round again"
            acknowledged[reply.round] = update


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


@pytest.mark.parametrize("reference", [Mean(), Adam()], ids=["mean", "adam"])
def test_kills_at_random_moments(fleet: Fleet, reference: Mean | Adam) -> None:
    bundle = fleet.bundle(width=100_000)  # four chunks
    listen = f"127.0.0.1:{free_port()}"
    options = ("--rounds", str(ROUNDS), "--min-devices", str(DEVICES), "--enrolment-port", "0")
    options = (*options, *reference.options)
    served = fleet.serve(bundle, *options, listen=listen)
    clients = fleet.enrolled(served, bundle, *(f"device {i}" for i in range(DEVICES)))
    moments = random.Random(7)
    done = threading.Event()

    def kill_again_and_again() -> int:
        current = served
        for kill in range(KILLS):
            # Around arrivals, the end of a round, and the moment after a start.
            current.wait_for(moments.choice(["update_accepted", "round_opened", "update_accepted"]))
            time.sleep(moments.uniform(0, 0.06))
            if done.is_set():
                return kill
            current.kill()
            current = fleet.serve(bundle, *options, listen=listen)
        return KILLS

    def devices() -> list[tuple[dict[int, bytes], bytes]]:
        lives = in_parallel(*(lambda i=i: live(bundle, clients[i], i) for i in range(DEVICES)))
        done.set()
        return lives

    lives, kills = in_parallel(devices, kill_again_and_again)
    assert kills == KILLS

    known = ids(fleet.state)
    order = sorted(range(DEVICES), key=lambda i: known[f"device {i}"])
    generalist = wire.encode(bundle.manifest, adapters.load_fresh(bundle))
    for number in range(1, ROUNDS + 1):
        updates = [lives[index][0][number] for index in order]
        expected = [train(bundle, generalist, index, number) for index in order]
        assert updates == expected, f"round {number} started from something else"
        closed = reference.close(bundle, generalist, updates)
        generalist = wire.encode(bundle.manifest, {"generalist": closed})
    assert [final for _, final in lives] == [generalist] * DEVICES
    with sqlite3.connect(fleet.state / "coordinator.sqlite3") as connection:
        counts = connection.execute(
            "select count(*), (select count(*) from refusals) from updates"
        ).fetchone()
    assert counts == (ROUNDS * DEVICES, 0)
    memories = list((fleet.state / "memories").glob("*"))
    assert len(memories) == bool(reference.options), "only the next round's is kept"


def test_kills_while_devices_enrol_do_not_cost_them_their_invitations(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    listen, port = f"127.0.0.1:{free_port()}", ("--enrolment-port", str(free_port()))
    served = fleet.serve(bundle, *port, listen=listen)
    names = [f"device {index}" for index in range(60)]
    invitations = invited(served, *names)

    def enrol() -> None:
        for invitation in invitations:
            client = fleet.client(enrol_with(invitation, bundle))
            client.check_in(0)
            client.close()

    def kill_twice() -> None:
        time.sleep(0.1)
        served.kill()
        again = fleet.serve(bundle, *port, listen=listen)
        again.ready()
        time.sleep(0.3)
        again.kill()
        fleet.serve(bundle, *port, listen=listen)

    in_parallel(enrol, kill_twice)
    with sqlite3.connect(fleet.state / "coordinator.sqlite3") as connection:
        known = connection.execute("select name from devices order by name").fetchall()
    assert known == [(name,) for name in sorted(names)]
