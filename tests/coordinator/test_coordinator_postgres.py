"""PostgreSQL instead of SQLite, with a real server: lost, found again, and taken over."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time

import numpy as np
import psycopg
import pytest
from coordinator_help import (
    Fleet,
    Served,
    comigs,
    free_port,
    header,
    in_parallel,
    join_round,
    mean_of,
    train,
)
from masking_help import Masked, expected, joined, step_of, vector
from postgres_help import Server, live, replay, rows

from coordinator import backup
from edge_runtime import wire
from edge_runtime.client import Client
from edge_runtime.connection import Patience
from edge_runtime.errors import UnreachableError


def test_rounds_with_postgres_and_what_is_kept_there(fleet: Fleet, url: str) -> None:
    bundle = fleet.bundle()
    options = ("--database", url, "--rounds", "2", "--server-optimizer", "adam")
    served = fleet.serve(bundle, *options, "--exit-when-done")
    clients = fleet.enrolled(served, bundle, "device 0", "device 1")
    # A reason with a NUL in it, which PostgreSQL cannot keep, and more tokens than 32 bits hold.
    join_round(*clients)
    start = clients[0].download(1)
    name = b'{"generalist/\\u0000":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    hostile = len(name).to_bytes(8, "little") + name + bytes(4)
    assert not clients[1].upload(header(1), hostile).accepted
    update = train(bundle, start, 0, 1)
    assert clients[0].upload(header(1, tokens=2**50), update).accepted
    assert clients[1].upload(header(1), train(bundle, start, 1, 1)).accepted
    in_parallel(*(lambda i=i: live(bundle, clients[i], i) for i in range(2)))
    assert served.end()[-1]["event"] == "finished"
    assert not (fleet.state / "coordinator.sqlite3").exists()
    assert rows(url, "select max(tokens) from updates") == [(2**50,)]
    command = [*(sys.executable, "-m", "edge_runtime", "rounds", "--state", str(fleet.state))]
    listed = subprocess.run(
        [*command, "--format", "json"],
        env={**os.environ, "COMIGS_DATABASE": url},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [row["status"] for row in json.loads(listed.stdout)["rounds"]] == ["aggregated"] * 2
    # A second start goes on with the same state, and another directory is not taken for its own.
    again = fleet.serve(bundle, *options, "--exit-when-done")
    assert again.end()[-1]["event"] == "finished"
    other = fleet.serve(bundle, *options, state=fleet.directory / "other")
    assert other.process.wait(30) == 17
    assert "give the --state that belongs to it" in other.stderr()
    # Nor is another database taken for that of the directory.
    without = tuple(option for option in options if option not in ("--database", url))
    forgotten = fleet.serve(bundle, *without)
    assert forgotten.process.wait(30) == 17
    assert "give the --database that belongs to it" in " ".join(forgotten.stderr().split())
    assert fleet.serve(bundle, *options).ready()


def test_a_database_that_is_gone_for_a_while_loses_nothing(
    fleet: Fleet, server: Server, url: str
) -> None:
    """It crashes and comes back, three times, under a coordinator and devices that go on."""
    bundle = fleet.bundle(width=20_000)
    served = fleet.serve(bundle, "--database", url, "--rounds", "12", "--exit-when-done")
    clients = fleet.enrolled(served, bundle, *(f"device {i}" for i in range(2)))
    moments = random.Random(1)

    def crash_again_and_again() -> None:
        for _ in range(3):
            served.wait_for("round_closed")
            time.sleep(moments.uniform(0, 0.05))
            server.stop()
            if not any(event["event"] == "storage_failed" for event in served.events):
                served.wait_for("storage_failed")
            server.start()

    *lives, _ = in_parallel(
        *(lambda i=i: live(bundle, clients[i], i) for i in range(2)), crash_again_and_again
    )
    assert served.end()[-1]["event"] == "finished"
    final = replay(fleet, bundle, url, [acknowledged for acknowledged, _ in lives])
    assert [generalist for _, generalist in lives] == [final] * 2
    reasons = [e["reason"] for e in served.events if e["event"] == "storage_failed"]
    assert "postgresql" in reasons[0]
    assert "secret" not in "".join(reasons)


def test_another_coordinator_takes_over_when_one_is_killed(fleet: Fleet, url: str) -> None:
    """On one address, one at a time, again and again; the same round goes on."""
    bundle = fleet.bundle(width=20_000)
    options = ("--database", url, "--rounds", "12", "--exit-when-done", "--enrolment-port", "0")
    listen = f"127.0.0.1:{free_port()}"

    def start() -> Served:
        return fleet.serve(bundle, *options, listen=listen)

    leader = start()
    clients = fleet.enrolled(leader, bundle, *(f"device {i}" for i in range(2)))
    moments = random.Random(2)
    # So that the rounds do not end before the kills do.
    turns = [threading.Semaphore(3) for _ in clients]

    def kill_again_and_again() -> Served:
        current = leader
        for _ in range(4):
            standby = start()
            standby.wait_for("standing_by")
            current.wait_for(moments.choice(["update_accepted", "round_opened"]))
            time.sleep(moments.uniform(0, 0.05))
            current.kill()
            standby.ready()
            current = standby
            for turn in turns:
                turn.release(2)
        for turn in turns:
            turn.release(12)
        return current

    *lives, last = in_parallel(
        *(lambda i=i: live(bundle, clients[i], i, turns[i]) for i in range(2)),
        kill_again_and_again,
    )
    assert last.end()[-1]["event"] == "finished"
    final = replay(fleet, bundle, url, [acknowledged for acknowledged, _ in lives])
    assert [generalist for _, generalist in lives] == [final] * 2


def test_whoever_was_taken_over_can_write_nothing_more(fleet: Fleet, url: str) -> None:
    """Though it never noticed: its database refuses it, and it ends."""
    bundle = fleet.bundle()
    served = fleet.serve(bundle, "--database", url, "--rounds", "1")
    ada, ben = fleet.enrolled(served, bundle, "ada", "ben")
    join_round(ada, ben)
    start = ada.download(1)
    with psycopg.connect(url) as connection:
        connection.execute("update lead set term = term + 1")  # as one that takes over does
    with pytest.raises(UnreachableError):
        impatient(fleet, ada).upload(header(1), train(bundle, start, 0, 1))
    assert served.process.wait(30) == 17
    assert "another coordinator has taken over" in served.stderr()
    assert rows(url, "select count(*) from updates") == [(0,)]


def impatient(fleet: Fleet, client: Client) -> Client:
    return fleet.client(client.who, patience=Patience(1, on_wait=lambda _: None))


def test_bad_addresses_of_databases(fleet: Fleet) -> None:
    bundle = fleet.bundle()
    nobody = f"postgresql://comigs:secret@127.0.0.1:{free_port()}/comigs"
    for url, code, words in (
        ("mysql://root@localhost/x", 2, "give postgresql://"),
        ("nonsense", 2, "give postgresql://"),
        (nobody, 17, "Connection refused"),
    ):
        served = fleet.serve(bundle, "--database", url)
        assert served.process.wait(30) == code
        message = " ".join(served.stderr().replace("│", " ").split())
        assert words in message
        assert "secret" not in message
        assert "Traceback" not in message


def test_a_backup_of_postgres_is_restored_anywhere(fleet: Fleet, server: Server, url: str) -> None:
    """Into another database and into SQLite; and the rounds go on from it."""
    bundle = fleet.bundle()
    options = ("--rounds", "3", "--server-optimizer", "adam", "--enrolment-port", "0")
    listen = f"127.0.0.1:{free_port()}"
    served = fleet.serve(bundle, "--database", url, *options, listen=listen)
    clients = fleet.enrolled(served, bundle, *(f"device {i}" for i in range(3)))

    def play(number: int, reporting: list[int]) -> bytes:
        """A round in which device 2 is refused; what it started from."""
        start = clients[0].download(number)
        assert not clients[2].upload(header(number), b"nonsense").accepted
        for seed in reporting:
            update = train(bundle, start, seed, number)
            assert clients[seed].upload(header(number), update).accepted
        return start

    join_round(*clients)
    play(1, [0, 1])
    served.wait_for("round_closed", round=1)
    join_round(*clients)
    start = play(2, [0])
    file = fleet.directory / "backup"
    made = comigs("backup", "--state", fleet.state, "--out", file, "--database", url)
    assert made.returncode == 0, made.stderr
    served.kill()
    results = set()
    into = {"postgres": ("--database", server.url("restored")), "sqlite": ()}
    for name, where in into.items():
        state = fleet.directory / name
        restored = comigs("restore", file, "--state", state, *where)
        assert restored.returncode == 0, restored.stderr
        assert (state / "coordinator.sqlite3").exists() == (name == "sqlite")
        again = fleet.serve(bundle, *where, *options, state=state, listen=listen)
        again.ready()
        join_round(*clients)
        assert play(3, [0, 1]) == start, "round 2 was open, so it is abandoned"
        again.wait_for("round_closed", round=3)
        results.add(clients[0].download(4))
        again.kill()
    assert len(results) == 1, "the optimizer's memory is there too"
    other = fleet.directory / "other"
    with pytest.raises(ValueError, match="not empty; give an empty database"):
        backup.restore(file, other, into["postgres"][1])
    with pytest.raises(ValueError, match="--database too if it has one"):
        backup.back_up(fleet.state, other)
    with pytest.raises(ValueError, match="holds no state of a coordinator"):
        backup.back_up(fleet.state, other, server.url("new"))
    assert not other.exists()


def test_secure_aggregation_with_postgres(fleet: Fleet, url: str) -> None:
    """One device vanishes and the coordinator is killed while shares are revealed."""
    bundle = fleet.bundle()
    options = ("--database", url, "--secure-aggregation", "--min-devices", "3", "--rounds", "1")
    options = (*options, "--secure-threshold", "0.75", "--stage-seconds", "10")
    options = (*options, "--enrolment-port", "0")
    listen = f"127.0.0.1:{free_port()}"
    served = fleet.serve(bundle, *options, listen=listen)
    clients = fleet.enrolled(served, bundle, *(f"device {i}" for i in range(4)))
    number = in_parallel(*(lambda c=c: joined([c]) for c in clients))[0]
    start = vector(bundle, clients[0].download(number))
    maskers = [Masked(client, number) for client in clients]
    reached = threading.Event()
    maskers[0].reached = "unmask", reached

    def killed() -> Served:
        assert reached.wait(60)
        served.kill()
        (stage,) = rows(url, "select stage from masking_groups")
        assert stage == ("unmask",)
        return fleet.serve(bundle, *options, listen=listen)

    steps = [step_of(bundle, i, number) for i in range(4)]
    *_, again = in_parallel(
        *(
            lambda i=i, m=m: m.run(steps[i], until="unmask" if i == 3 else None)
            for i, m in enumerate(maskers)
        ),
        killed,
    )
    again.wait_for("round_closed", round=number)
    got = vector(bundle, clients[0].download(number + 1))
    np.testing.assert_array_equal(got, expected(start, steps, group=4))
    assert rows(url, "select * from masking_members") == [], "secrets go with the round"


def test_two_cohorts_with_postgres(fleet: Fleet, url: str) -> None:
    """The rounds of both go on, each with its own updates, when the coordinator is killed."""
    bundles = [fleet.bundle(), fleet.bundle(width=24)]
    options = ("--bundle", str(bundles[1].path), "--database", url, "--rounds", "2")
    options = (*options, "--enrolment-port", "0")
    listen = f"127.0.0.1:{free_port()}"
    served = fleet.serve(bundles[0], *options, listen=listen)
    members = [
        (bundle, fleet.enrolled(served, bundle, f"{place} a", f"{place} b"))
        for place, bundle in enumerate(bundles)
    ]
    starts, updates = [], []
    for bundle, clients in members:
        join_round(*clients)
        starts.append(clients[0].download(1))
        updates.append([train(bundle, starts[-1], seed, 1) for seed in range(2)])
        assert clients[0].upload(header(1), updates[-1][0]).accepted
    served.kill()
    again = fleet.serve(bundles[0], *options, listen=listen)
    again.ready()
    for (bundle, clients), sent, start in zip(members, updates, starts, strict=True):
        assert clients[1].upload(header(1), sent[1]).accepted
        join_round(*clients)
        got = wire.decode(bundle.manifest, clients[1].download(2))["generalist"]
        np.testing.assert_allclose(got, mean_of(bundle, sent), rtol=1e-5, atol=1e-6)
        assert clients[0].download(1) == start
    ended = "select cohort, count(*) from rounds where status = 'aggregated' group by cohort"
    assert sorted(count for _, count in rows(url, ended)) == [1, 1]
    assert rows(url, "select count(distinct cohort), count(*) from updates") == [(2, 4)]
